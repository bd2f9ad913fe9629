"""Items per second of evaluation beside the usual tools: same CPU, weights, tokenizer, float32 and items, one run.

    python benchmarks/evaluate.py --data-dir DATA --out evaluate.json

`harness` against lm-evaluation-harness's own model class, `generate` against transformers' `generate` at 4 beams.
Beside `harness` stands what its matrix products take alone, each timed by itself. Each batch size of a peer has its
time and the fastest makes the ratio (lm-eval's default is 1, and the published evaluation generates one item at a
time). Every side tokenizes in its own time. Ours is run once before it is timed, so that compilation is not counted
(`cold` has that first run); the peers compile nothing.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from hardware import Others, in_words, machine

from rora_theory.data import prompts, sources, tasks
from rora_theory.evaluate import likelihood
from rora_theory.evaluate.choices import encode_choices, harness_choices
from rora_theory.evaluate.scoring import Scoring, score
from rora_theory.io.files import write_whole
from rora_theory.llama import Model, load
from sims.common import cli


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m"
    """model of all sides"""
    data_dir: Path = Path("commonsense")
    """folder in the LLM-Adapters schema"""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """tasks of the harness part"""
    items: int = 100
    """items a task in the harness part"""
    generated: int = 16
    """items in the generate part, from BoolQ and OBQA in turn"""
    harness_batches: tuple[int, ...] = (1, 32)
    """batch sizes that lm-eval is tried with"""
    generate_batches: tuple[int, ...] = (1, 8, 16)
    """batch sizes that transformers is tried with; the fastest counts"""
    out: Path | None = None
    """JSON file for the figures"""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


@functools.cache
def product_seconds(rows: int, inner: int, columns: int, *, vocabulary: bool = False) -> float:
    """Median time of one float32 product, as XLA makes it: a layer's, or of a vocabulary's rows with hidden states."""
    left, right = jnp.ones((rows, inner)), jnp.ones((columns, inner) if vocabulary else (inner, columns))
    product = jax.jit(lambda a, b: jnp.einsum("vd,cd->vc", a, b)) if vocabulary else jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, right))
    return statistics.median(timed(lambda: jax.block_until_ready(product(left, right)))[0] for _ in range(15))


def floor(model: Model, records: list[tasks.TaskRecord]) -> float:
    """Seconds of the products of `harness`: of every block's slots with the layers' weights, and of the slots that
    predict with the vocabulary. Attention, and all that is no product, is left out."""
    own = model.config
    asked = [harness_choices(record) for record in records]
    items = encode_choices(model.tokenizer, asked, max_length=own.max_position_embeddings)
    block_tokens, chunk = likelihood.CPU_SHAPE
    _, blocks = likelihood.blocks_of(items, block_tokens=block_tokens, chunk=chunk)
    queries, keys = own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
    hidden, wide = own.hidden_size, own.intermediate_size
    layer = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layer += [(hidden, wide), (hidden, wide), (wide, hidden)]
    in_layers = [product_seconds(block.tokens.size, *shape) for block in blocks for shape in layer]
    chunks = sum(math.ceil(block.used / chunk) for block in blocks)
    of_vocabulary = product_seconds(own.vocab_size, hidden, chunk, vocabulary=True)
    return own.num_hidden_layers * sum(in_layers) + chunks * of_vocabulary


def harness(config: Config, model: Model) -> list[dict[str, Any]]:
    """Rows of the harness part: a task each, and their sum."""
    import lm_eval_peer

    rows = []
    peers = {size: lm_eval_peer.harness_model(model, size) for size in config.harness_batches}
    for key in config.tasks:
        task = tasks.get_task(key)
        records = tasks.read_task(sources.locate_task(config.data_dir, task), task)[: config.items]

        def ours(records: list[tasks.TaskRecord] = records) -> int:
            return sum(1 for _ in score(model.params, model.config, model.tokenizer, records, Scoring("harness")))

        cold, _ = timed(ours)
        warm = min(timed(ours)[0] for _ in range(2))
        requests = lm_eval_peer.task(key, records).instances
        # Its speed settles within a few batches; compiling nothing, it needs no full warm-up.
        theirs = {
            size: timed(functools.partial(peer.loglikelihood, requests, disable_tqdm=True))[0]
            for size, peer in peers.items()
        }
        rows.append(
            {
                "task": key,
                "items": len(records),
                "ours_s": warm,
                "ours_cold_s": cold,
                "products_s": floor(model, records),
                "lm_eval_s": theirs,
                "ratio": min(theirs.values()) / warm,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    total = {name: sum(row[name] for row in rows) for name in ("items", "ours_s", "ours_cold_s", "products_s")}
    sums = {size: sum(row["lm_eval_s"][size] for row in rows) for size in config.harness_batches}
    rows.append({"task": "all", **total, "lm_eval_s": sums, "ratio": min(sums.values()) / total["ours_s"]})
    print(json.dumps(rows[-1]), flush=True)
    return rows


def generate(config: Config, model: Model) -> list[dict[str, Any]]:
    """Rows of the generate part: our batch sizes, then transformers'."""
    import lm_eval_peer

    both = [
        tasks.read_task(sources.locate_task(config.data_dir, tasks.TASKS[key]), tasks.TASKS[key])
        for key in ("boolq", "openbookqa")
    ]
    records = [record for pair in zip(*both, strict=False) for record in pair][: config.generated]
    rows, texts = [], {}
    for size in (8, config.generated):

        def ours(size: int = size) -> dict[tuple[str, int], str | None]:
            found = score(model.params, model.config, model.tokenizer, records, Scoring("generate"), batch_size=size)
            return {(sample.task, sample.index): sample.text for sample in found}

        cold, _ = timed(ours)
        warm, texts = timed(ours)
        rows.append({"side": "ours", "batch_size": size, "seconds": warm, "cold_s": cold})
        print(json.dumps(rows[-1]), flush=True)

    peer, tokenizer = lm_eval_peer.torch_model(model), lm_eval_peer.torch_tokenizer(model)
    tokenizer.padding_side = "left"
    for size in config.generate_batches:
        seconds, answers = timed(lambda size=size: transformers_texts(peer, tokenizer, records, size))
        same = sum(texts[record.task, record.index] == text for record, text in zip(records, answers, strict=True))
        rows.append({"side": "transformers", "batch_size": size, "seconds": seconds, "texts_equal": same})
        print(json.dumps(rows[-1]), flush=True)
    ours_s = min(row["seconds"] for row in rows if row["side"] == "ours")
    for row in rows:
        row |= {"items": len(records), "items_per_s": len(records) / row["seconds"]}
        if row["side"] == "transformers":
            row["ratio"] = row["seconds"] / ours_s
    return rows


def transformers_texts(peer: Any, tokenizer: Any, records: list[tasks.TaskRecord], size: int) -> list[str]:
    """The published protocol by transformers: 4 beams, 32 new tokens; prompts of like length together."""
    texts = [prompts.prompt(record.instruction, "eval") for record in records]
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    found = [""] * len(texts)
    for start in range(0, len(order), size):
        group = order[start : start + size]
        inputs = tokenizer([texts[number] for number in group], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = peer.generate(
                **inputs, num_beams=4, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(group, new, strict=True):
            found[number] = text.split(prompts.RESPONSE_HEADING)[-1].strip()
    return found


def main(config: Config) -> None:
    model = load(config.model)
    names = ("jax", "torch", "transformers", "lm-eval", "tokenizers")
    figures = {"config": dataclasses.asdict(config), "machine": machine(packages=names)}
    figures["machine"]["torch_threads"] = torch.get_num_threads()
    others = Others()
    print(in_words(figures["machine"]), flush=True)
    figures["harness"] = harness(config, model)
    figures["generate"] = generate(config, model)
    for row in figures["generate"]:
        print(json.dumps(row))
    figures["others"] = others.share()
    print(others.in_words())
    if config.out is not None:
        write_whole(config.out, json.dumps(figures, indent=2, default=str) + "\n")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, description=__doc__)))
