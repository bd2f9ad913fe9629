"""This package's side of benchmarks/gpu.py: what a worker process does of one section."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu
import jax
import jax.numpy as jnp
import numpy as np

from rora_theory import adapters, llama
from rora_theory.evaluate.choices import Scored
from rora_theory.evaluate.likelihood import log_likelihoods
from rora_theory.finetune import Batch, FinetuneConfig, capacity
from rora_theory.finetune import step as steps
from rora_theory.llama.generate import beam_search

REMATS: tuple[Any, ...] = (False, "mlp", True)
"""Least work first."""

Work = Callable[[str], dict[str, Any]]


def rate(spec: dict[str, Any]) -> Work:
    """The card's own rates: of products of square bfloat16 matrices, and of copies, read and written bytes together."""
    size, copied = spec["sizes"]["product"], spec["sizes"]["copied"]

    def card(_: str) -> dict[str, Any]:
        many = 20
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
        chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, many, lambda _, x: (x @ b) * jnp.bfloat16(0.01), a))
        x = jnp.ones((copied,), jnp.bfloat16)
        copy = jax.jit(lambda x: x + jnp.bfloat16(1))
        products, copies = (best_of(5, function, *of) for function, of in ((chain, (a, a)), (copy, (x,))))
        return {
            "product_flops_per_second": many * 2 * size**3 / products,
            "copied_bytes_per_second": 2 * x.nbytes / copies,
            "device": jax.devices()[0].device_kind,
        }

    return card


def best_of(count: int, function: Callable[..., Any], *arguments: Any) -> float:
    """Least seconds of a call, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    return min(timed(lambda: function(*arguments))[0] for _ in range(count))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    begin = time.perf_counter()
    found = jax.block_until_ready(work())
    return time.perf_counter() - begin, found


def shape_of(spec: dict[str, Any]) -> llama.LlamaConfig:
    """The model's configuration."""
    return llama.LlamaConfig(**spec["sizes"]["model"], max_position_embeddings=2048)


def random_weights(config: llama.LlamaConfig) -> Any:
    """bfloat16 weights, made one layer at a time: what is held at most stays what training holds."""

    def one(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.ndim < 3:
            return draw(key, like.shape)
        return jax.lax.map(lambda key: draw(key, like.shape[1:]), jax.random.split(key, like.shape[0]))

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, structure = jax.tree.flatten(llama.abstract_params(config, jnp.bfloat16))
    made = jax.jit(one, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [jax.block_until_ready(made(key, like)) for key, like in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, weights)
    return jax.tree.map_with_path(lambda path, a: jnp.ones_like(a) if path[-1].key.endswith("norm") else a, params)


def peak_bytes() -> int | None:
    """The most that this process has held on the device; None where the device does not tell."""
    told = jax.local_devices()[0].memory_stats()
    return None if told is None else told["peak_bytes_in_use"]


def training(spec: dict[str, Any]) -> Work:
    """Steps of training on random tokens, each cell with the least recomputation that fits."""
    model = shape_of(spec)
    params = random_weights(model)
    told = jax.local_devices()[0].memory_stats() or {}
    memory = told.get("bytes_limit", math.inf)
    highest = peak_bytes()

    def cell(name: str) -> dict[str, Any]:
        nonlocal highest
        one = gpu.Cell(**spec["cells"][name])
        config = FinetuneConfig(
            method=one.method, rule="lora", rank=one.rank, alpha=16, dropout=0.0, batch_size=one.rows, dtype="bfloat16"
        )
        flops = None
        for remat in REMATS:
            own = dataclasses.replace(config, remat=remat)
            plan = capacity.account(model, own, one.width)
            flops = flops or plan.flops  # without what is made again
            if plan.total > memory and remat is not REMATS[-1]:
                continue
            try:
                found = run_cell(model, params, own, one, spec)
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or remat is REMATS[-1]:
                    raise
        seconds = found["seconds"]
        peak = peak_bytes()
        risen = peak is not None and highest is not None and peak > highest
        highest = peak
        return found | {
            "remat": str(remat),
            "tokens_per_second": one.rows * one.width / seconds,
            "model_flops_per_second": flops / seconds,
            "utilisation": flops / seconds / spec["rate"] if spec.get("rate") else None,
            "planned_bytes": plan.total,
            # The device tells its highest peak alone: a cell that stayed below an earlier one has none of its own.
            "peak_bytes": peak if risen else None,
        }

    return cell


def run_cell(model: llama.LlamaConfig, params: Any, config: FinetuneConfig, cell: gpu.Cell, spec: Any) -> Any:
    """Timings of a cell's steps, the compiler's own account, and the loss."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (cell.rows, cell.width + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((cell.rows, cell.width), np.float32), None)
    adapter = adapters.init(jax.random.key(0), config.adapter(), model, params)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, 1000), jax.random.key(1))
    begin = time.perf_counter()
    compiled = steps.train_step(adapter, model, config, 1000).lower(state, params, batch).compile()
    compile_seconds = time.perf_counter() - begin
    planned = compiled.memory_analysis()
    timings = []
    for number in range(2 + spec["sizes"]["steps"]):
        seconds, (state, metrics) = timed(lambda state=state: compiled(state, params, batch))
        timings += [seconds] if number > 1 else []
    return gpu.middle(timings) | {
        "compile_seconds": round(compile_seconds, 2),
        "compiler_bytes": planned.argument_size_in_bytes + planned.temp_size_in_bytes,
        "loss": float(metrics.loss),
        "trainable": adapters.count(adapter),
    }


def scoring(spec: dict[str, Any]) -> Work:
    """Log-likelihoods of choices, whose programs are compiled before they are timed."""
    model = shape_of(spec)
    made = gpu.made_items(spec["sizes"]["items"], model.vocab_size)
    items = [[Scored(tokens, count) for tokens, count in one] for one in made]
    params = random_weights(model)

    def score(_: str) -> dict[str, Any]:
        cold, _ = timed(lambda: list(log_likelihoods(params, model, items, batch_size=8)))
        seconds, found = timed(lambda: list(log_likelihoods(params, model, items, batch_size=8)))
        total = math.fsum(value for _, values in found for value in values)
        return {"seconds": seconds, "cold_seconds": cold, "items_per_second": len(items) / seconds, "total": total}

    return score


def generation(spec: dict[str, Any]) -> Work:
    """Texts by 4 beams, all prompts together."""
    model = shape_of(spec)
    sizes = spec["sizes"]
    prompts = gpu.made_prompts(sizes["prompts"], model.vocab_size)
    params = random_weights(model)

    def generate(_: str) -> dict[str, Any]:
        def texts() -> list[list[int]]:
            return beam_search(params, model, prompts, max_new_tokens=sizes["new_tokens"], eos_ids=(), shared=40)

        cold, _ = timed(texts)
        seconds, found = timed(texts)
        assert all(len(text) == sizes["new_tokens"] for text in found)
        return {"seconds": seconds, "cold_seconds": cold, "items_per_second": len(prompts) / seconds}

    return generate


SECTIONS = {"rate": rate, "training": training, "scoring": scoring, "generation": generation}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    gpu.each(given, SECTIONS[given["section"]](given))
