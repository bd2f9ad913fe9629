"""Run one section of benchmarks/gpu.py with this package, in a worker process."""

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

from rora_theory.lab import llama
from rora_theory.lab.evaluate.choices import EncodedChoice
from rora_theory.lab.evaluate.likelihood import log_likelihoods
from rora_theory.lab.finetune import Batch, FinetuneConfig
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.finetune.memory import StepMemory
from rora_theory.lab.llama.generate import beam_search

REMATS: tuple[Any, ...] = (False, "mlp", True)
"""Settings of rematerialisation, least recomputation first."""

Work = Callable[[str], dict[str, Any]]
"""Function that runs the part of a given name and returns its results."""


def rate(spec: dict[str, Any]) -> Work:
    """Measure what the device reaches at best, in products of square bfloat16 matrices and in copies.

    Copies are measured in bytes read and written per second.
    """
    size, copied_values = spec["sizes"]["product"], spec["sizes"]["copied"]

    def measure_device(_: str) -> dict[str, Any]:
        count = 20
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

        # Each product depends on the one before it; the factor keeps the numbers finite.
        @jax.jit
        def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, count, lambda _, x: (x @ b) * jnp.bfloat16(0.01), a)

        x = jnp.ones((copied_values,), jnp.bfloat16)
        copy = jax.jit(lambda x: x + jnp.bfloat16(1))
        product_seconds, copy_seconds = best_of(5, multiply, a, a), best_of(5, copy, x)
        return {
            "product_flops_per_second": count * 2 * size**3 / product_seconds,
            "copied_bytes_per_second": 2 * x.nbytes / copy_seconds,
            "device": jax.devices()[0].device_kind,
        }

    return measure_device


def best_of(count: int, function: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of the fastest of ``count`` calls, after a call that compiles."""
    jax.block_until_ready(function(*arguments))
    return min(timed(lambda: function(*arguments))[0] for _ in range(count))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the result of a call is ready, and the result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(work())
    return time.perf_counter() - begin, result


def model_config(spec: dict[str, Any]) -> llama.LlamaConfig:
    """Return the model's configuration."""
    return llama.LlamaConfig(**spec["sizes"]["model"], max_position_embeddings=2048)


def random_weights(config: llama.LlamaConfig) -> Any:
    """Return random bfloat16 weights.

    They are drawn one layer at a time, so that drawing needs less memory than training and does not set the peak.
    """

    def draw_stack(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.ndim < 3:
            return draw(key, like.shape)
        return jax.lax.map(lambda key: draw(key, like.shape[1:]), jax.random.split(key, like.shape[0]))

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, structure = jax.tree.flatten(llama.abstract_params(config, jnp.bfloat16))
    jitted = jax.jit(draw_stack, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [jax.block_until_ready(jitted(key, like)) for key, like in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, weights)
    # Weights of norms are 1.
    return jax.tree.map_with_path(lambda path, a: jnp.ones_like(a) if path[-1].key.endswith("norm") else a, params)


def peak_bytes() -> int | None:
    """Return the peak of this process's memory on the device; None if the device does not report it."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics["peak_bytes_in_use"]


def training(spec: dict[str, Any]) -> Work:
    """Time training steps on random tokens, each cell with the least recomputation that fits the device."""
    model = model_config(spec)
    params = random_weights(model)
    highest_peak = peak_bytes()

    def run_named(name: str) -> dict[str, Any]:
        nonlocal highest_peak
        cell = gpu.Cell(**spec["cells"][name])
        config = FinetuneConfig(
            method=cell.method,
            rule="lora",
            rank=cell.rank,
            alpha=16,
            dropout=0.0,
            batch_size=cell.rows,
            dtype="bfloat16",
        )
        # Try the settings in order, and continue with the next one if one exceeds the memory.
        for remat in REMATS:
            try:
                results = run_cell(model, params, dataclasses.replace(config, remat=remat), cell, spec)
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or remat is REMATS[-1]:
                    raise
        seconds, flops = results["seconds"], model_flops(model, results["trainable"], cell)
        # The device reports its highest peak only: a cell that stayed below an earlier one has no peak of its own.
        peak = peak_bytes()
        has_risen = peak is not None and highest_peak is not None and peak > highest_peak
        highest_peak = peak
        return results | {
            "remat": str(remat),
            "tokens_per_second": cell.rows * cell.width / seconds,
            "model_flops_per_second": flops / seconds,
            "utilisation": flops / seconds / spec["rate"] if spec.get("rate") else None,
            "peak_bytes": peak if has_risen else None,
        }

    return run_named


def model_flops(model: llama.LlamaConfig, trainable: int, cell: gpu.Cell) -> int:
    """Return the operations of a step's matrix products, without recomputation.

    A frozen weight takes part in the forward product and in the gradient of its input, an adapter's also in its own
    gradient. Attention has two products in the forward pass and four in the backward pass.
    """
    linear = sum(p_out * p_in for p_out, p_in in map(model.module_shape, llama.MODULES))
    frozen = model.num_hidden_layers * linear + model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * cell.width * model.num_attention_heads * model.head_dim
    return 2 * cell.rows * cell.width * (2 * frozen + 3 * trainable + 6 * attention)


def run_cell(model: llama.LlamaConfig, params: Any, config: FinetuneConfig, cell: gpu.Cell, spec: Any) -> Any:
    """Train a cell, and return the timings of its steps, the compiler's memory analysis, and the loss.

    Args:
      model: Configuration of the base model.
      params: Weights of the base model.
      config: Fine-tuning configuration.
      cell: Shape of the batch.
      spec: Settings of the worker.
    """
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (cell.rows, cell.width + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((cell.rows, cell.width), np.float32), None)
    adapter = config.adapter().build(jax.random.key(0), model, params)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, 1000), jax.random.key(1))
    # Compile first, so that its time is known and is not part of the first step's.
    begin = time.perf_counter()
    compiled = steps.train_step(adapter, model, config, 1000).lower(state, params, batch).compile()
    compile_seconds = time.perf_counter() - begin
    timings = []
    # The first two steps are a warm-up.
    for number in range(2 + spec["sizes"]["steps"]):
        seconds, (state, metrics) = timed(lambda state=state: compiled(state, params, batch))
        timings += [seconds] if number > 1 else []
    return gpu.summarise_timings(timings) | {
        "compile_seconds": round(compile_seconds, 2),
        "compiler_bytes": StepMemory.from_compiled(compiled).total,
        "loss": float(metrics.loss),
        "trainable": adapter.count(),
    }


def scoring(spec: dict[str, Any]) -> Work:
    """Time the log-likelihoods of choices, after a first run that compiles."""
    model = model_config(spec)
    random_items = gpu.random_items(spec["sizes"]["items"], model.vocab_size)
    items = [[EncodedChoice(tokens, count) for tokens, count in choices] for choices in random_items]
    params = random_weights(model)

    def score(_: str) -> dict[str, Any]:
        cold, _ = timed(lambda: list(log_likelihoods(params, model, items, batch_size=8)))
        seconds, scores = timed(lambda: list(log_likelihoods(params, model, items, batch_size=8)))
        total = math.fsum(value for _, values in scores for value in values)
        return {"seconds": seconds, "cold_seconds": cold, "items_per_second": len(items) / seconds, "total": total}

    return score


def generation(spec: dict[str, Any]) -> Work:
    """Time the generation of texts by 4 beams, all prompts together."""
    model = model_config(spec)
    sizes = spec["sizes"]
    prompts = gpu.random_prompts(sizes["prompts"], model.vocab_size)
    params = random_weights(model)

    def generate(_: str) -> dict[str, Any]:
        def texts() -> list[list[int]]:
            return beam_search(params, model, prompts, max_new_tokens=sizes["new_tokens"], eos_ids=(), shared=40)

        cold, _ = timed(texts)
        seconds, generated = timed(texts)
        assert all(len(text) == sizes["new_tokens"] for text in generated)
        return {"seconds": seconds, "cold_seconds": cold, "items_per_second": len(prompts) / seconds}

    return generate


SECTIONS = {"rate": rate, "training": training, "scoring": scoring, "generation": generation}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    gpu.run_parts(arguments, SECTIONS[arguments["section"]](arguments))
