"""Compare evaluation speed with the usual tools: same CPU, weights, tokenizer, float32 and items, in one run.

    python benchmarks/evaluate.py --data-dir DATA --out evaluate.json

The protocol `harness` is compared with lm-evaluation-harness's own model class, and `generate` with transformers'
`generate` at 4 beams. For `harness`, the time of its matrix products alone is reported too, each timed by itself. The
peers run at several batch sizes, and the fastest one counts (lm-eval's default is 1, and the published evaluation
generates one item at a time). The times include tokenization on every side. This side runs once before it is timed, so
that compilation is not counted (`ours_cold_s` and `cold_s` are the times of that run); the peers compile nothing.
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
from hardware import OtherLoad, describe_machine, format_machine, silence_transformers

from rora_theory.lab.data import prompts, sources, tasks
from rora_theory.lab.evaluate import likelihood
from rora_theory.lab.evaluate.choices import encode_choices, harness_choices
from rora_theory.lab.evaluate.scoring import Scoring, score
from rora_theory.lab.llama import Model, load
from rora_theory.runs.files import write_whole
from sims.common import cli


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    model: str = "smollm2-135m"
    """Model of all sides"""
    data_dir: Path = Path("commonsense")
    """Folder of the tasks in the LLM-Adapters schema"""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """Tasks of the part harness"""
    items: int = 100
    """Number of items of each task in the part harness"""
    generated: int = 16
    """Number of items in the part generate, alternately from BoolQ and OBQA"""
    harness_batches: tuple[int, ...] = (1, 32)
    """Batch sizes of lm-eval, of which the fastest counts"""
    generate_batches: tuple[int, ...] = (1, 8, 16)
    """Batch sizes of transformers, of which the fastest counts"""
    out: Path | None = None
    """JSON file for the results"""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


@functools.cache
def product_seconds(rows: int, inner: int, columns: int, *, vocabulary: bool = False) -> float:
    """Return the median seconds of one float32 matrix product compiled by XLA.

    Args:
      rows: Number of rows of the left matrix.
      inner: Length of the sums.
      columns: Number of columns of the result.
      vocabulary: Whether the right matrix is transposed, as in the product of the vocabulary with hidden states.
    """
    left, right = jnp.ones((rows, inner)), jnp.ones((columns, inner) if vocabulary else (inner, columns))
    product = jax.jit(lambda a, b: jnp.einsum("vd,cd->vc", a, b)) if vocabulary else jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, right))
    return statistics.median(timed(lambda: jax.block_until_ready(product(left, right)))[0] for _ in range(15))


def harness_product_seconds(model: Model, records: list[tasks.TaskRecord]) -> float:
    """Return the seconds that the matrix products of `harness` take: a lower bound of its time.

    These are the products of every block's slots with the layers' weights, and of the predicting slots with the
    vocabulary. Attention and everything that is not a matrix product are left out.
    """
    shape = model.config
    # The blocks that `harness` runs on these records.
    choices = [harness_choices(record) for record in records]
    items = encode_choices(model.tokenizer, choices, max_length=shape.max_position_embeddings)
    block_tokens, chunk = likelihood.CPU_SHAPE
    _, blocks = likelihood.plan_shared_blocks(items, block_tokens=block_tokens, chunk=chunk)
    # Inputs and outputs of the modules of a layer: q, k, v, o; gate, up, down.
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    hidden, wide = shape.hidden_size, shape.intermediate_size
    modules = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    modules += [(hidden, wide), (hidden, wide), (wide, hidden)]
    layer_seconds = [product_seconds(block.tokens.size, *module) for block in blocks for module in modules]
    # Only the predicting slots are projected to the vocabulary, a chunk at a time.
    chunks = sum(math.ceil(block.used / chunk) for block in blocks)
    chunk_seconds = product_seconds(shape.vocab_size, hidden, chunk, vocabulary=True)
    return shape.num_hidden_layers * sum(layer_seconds) + chunks * chunk_seconds


def harness(config: EvaluateOptions, model: Model) -> list[dict[str, Any]]:
    """Measure the part harness; return a row for each task, and one for all of them."""
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
        # The peer compiles nothing and reaches its speed within a few batches, so it runs once, without a warm-up.
        peer_seconds = {
            size: timed(functools.partial(peer.loglikelihood, requests, disable_tqdm=True))[0]
            for size, peer in peers.items()
        }
        rows.append(
            {
                "task": key,
                "items": len(records),
                "ours_s": warm,
                "ours_cold_s": cold,
                "products_s": harness_product_seconds(model, records),
                "lm_eval_s": peer_seconds,
                "ratio": min(peer_seconds.values()) / warm,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    # The row of all tasks: times add up.
    total = {name: sum(row[name] for row in rows) for name in ("items", "ours_s", "ours_cold_s", "products_s")}
    sums = {size: sum(row["lm_eval_s"][size] for row in rows) for size in config.harness_batches}
    rows.append({"task": "all", **total, "lm_eval_s": sums, "ratio": min(sums.values()) / total["ours_s"]})
    print(json.dumps(rows[-1]), flush=True)
    return rows


def generate(config: EvaluateOptions, model: Model) -> list[dict[str, Any]]:
    """Measure the part generate; return a row for each batch size of this side and of transformers."""
    import lm_eval_peer

    # Items of both tasks, alternately.
    both = [
        tasks.read_task(sources.locate_task(config.data_dir, tasks.TASKS[key]), tasks.TASKS[key])
        for key in ("boolq", "openbookqa")
    ]
    records = [record for pair in zip(*both, strict=False) for record in pair][: config.generated]
    rows, texts = [], {}
    for size in (8, config.generated):

        def ours(size: int = size) -> dict[tuple[str, int], str | None]:
            scoring = Scoring("generate")
            samples = score(model.params, model.config, model.tokenizer, records, scoring, batch_size=size)
            return {(sample.task, sample.index): sample.text for sample in samples}

        cold, _ = timed(ours)
        warm, texts = timed(ours)
        rows.append({"side": "ours", "batch_size": size, "seconds": warm, "cold_s": cold})
        print(json.dumps(rows[-1]), flush=True)

    # The peer, with the number of texts that are equal to this side's.
    peer, tokenizer = lm_eval_peer.torch_model(model), lm_eval_peer.torch_tokenizer(model)
    tokenizer.padding_side = "left"
    for size in config.generate_batches:
        seconds, answers = timed(lambda size=size: transformers_texts(peer, tokenizer, records, size))
        equal = sum(texts[record.task, record.index] == text for record, text in zip(records, answers, strict=True))
        rows.append({"side": "transformers", "batch_size": size, "seconds": seconds, "texts_equal": equal})
        print(json.dumps(rows[-1]), flush=True)
    # Ratios to this side's fastest batch size.
    ours_s = min(row["seconds"] for row in rows if row["side"] == "ours")
    for row in rows:
        row |= {"items": len(records), "items_per_s": len(records) / row["seconds"]}
        if row["side"] == "transformers":
            row["ratio"] = row["seconds"] / ours_s
    return rows


def transformers_texts(peer: Any, tokenizer: Any, records: list[tasks.TaskRecord], size: int) -> list[str]:
    """Generate answers with transformers by the published protocol: 4 beams, 32 new tokens.

    Prompts of similar length share a batch.

    Args:
      peer: Model of transformers.
      tokenizer: Tokenizer of transformers, which pads on the left.
      records: Records to answer.
      size: Number of prompts in a batch.
    """
    texts = [prompts.prompt(record.instruction, "eval") for record in records]
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    answers = [""] * len(texts)
    for start in range(0, len(order), size):
        group = order[start : start + size]
        inputs = tokenizer([texts[number] for number in group], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = peer.generate(
                **inputs, num_beams=4, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(group, new, strict=True):
            answers[number] = text.split(prompts.RESPONSE_HEADING)[-1].strip()
    return answers


def main(config: EvaluateOptions) -> None:
    """Measure both parts, print their rows and write them."""
    silence_transformers()
    model = load(config.model)
    names = ("jax", "torch", "transformers", "lm-eval", "tokenizers")
    results = {"config": dataclasses.asdict(config), "machine": describe_machine(packages=names)}
    results["machine"]["torch_threads"] = torch.get_num_threads()
    other_load = OtherLoad()
    print(format_machine(results["machine"]), flush=True)
    results["harness"] = harness(config, model)
    results["generate"] = generate(config, model)
    for row in results["generate"]:
        print(json.dumps(row))
    results["others"] = other_load.share()
    print(other_load.describe())
    if config.out is not None:
        write_whole(config.out, json.dumps(results, indent=2, default=str) + "\n")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse(EvaluateOptions, description=__doc__)))
