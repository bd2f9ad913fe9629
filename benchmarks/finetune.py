"""Training speed and memory beside transformers + peft on torch: same model, data, precision and batch, in one run.

    python benchmarks/finetune.py --data DATA/ARC-Easy/train.json DATA/openbookqa/train.json --out finetune.json

Each side is a process of its own, loads the same folder and is warmed up (this side has compiled by then); then they
take turns on the same cores, and medians over the turns are compared. Parts:

  tokens   batches of 4 x 256 tokens of the text, LoRA of rank 8: tokens/s and peak memory of the process
  text     batches of 16 records: examples/s. Here records of like length share a batch; the peer's batches
           are random and padded to their longest, as the published code does it. Every k-th batch of an epoch, in order
           of padded length, so that a few stand for all
  methods  LoRA and DoRA of rank 128, batches of 4 x 256, without and with dropout: time of a step

The modules adapted are the paper's five. Run it on a quiet machine; it uses the first ``--cores`` cores.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hardware import Others, in_words, machine

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
Part = Literal["tokens", "text", "methods"]


@dataclasses.dataclass(frozen=True)
class Config:
    data: tuple[str, ...] = ()
    """training files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """model of both sides"""
    parts: tuple[Part, ...] = ("tokens", "text", "methods")
    """parts to run"""
    rounds: int = 5
    """turns of each side"""
    steps: int = 3
    """steps a turn (tokens, methods)"""
    batches: int = 10
    """batches of an epoch that a turn works (text)"""
    cores: int = 2
    """cores that both sides run on"""
    out: Path | None = None
    """JSON file for the figures"""


class Worker:
    """A side's process: it sets itself up, then takes steps when told to."""

    def __init__(self, side: str, spec: dict[str, Any]) -> None:
        script = HERE / ("finetune.py" if side == "ours" else "finetune_peer.py")
        command = [sys.executable, str(script), "--work", json.dumps(spec)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.setup = self._answer()

    def steps(self, count: int) -> list[float]:
        """Take ``count`` steps, each on the next batch; the seconds of each."""
        return self._ask({"steps": count})["seconds"]

    def finish(self) -> dict[str, Any]:
        """End the process; its report."""
        report = self._ask({"steps": 0, "end": True})
        self._process.wait()
        return report

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self._process.wait()}; its messages are above")
        return json.loads(line)


def take_turns(workers: dict[str, Worker], rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Seconds of every step of every turn, the sides in an order that turns too; standard error says how far it is."""
    found: dict[str, list[list[float]]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(workers[name].steps(steps))
            print(f"turn {turn + 1} of {rounds}: {name} {sum(found[name][-1]):.0f} s", file=sys.stderr, flush=True)
    return found


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, mid, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": mid, "lower_quartile": low, "upper_quartile": high, "count": len(values)}


def run_tokens(config: Config, folder: Path) -> dict[str, Any]:
    spec = {"model": str(folder / "model"), "cores": config.cores, "method": "lora", "rank": 8, "dropout": 0.0}
    workers = {side: Worker(side, spec | {"batches": str(folder / f"tokens_{side}.npz")}) for side in ("ours", "peer")}
    seconds = take_turns(workers, config.rounds, config.steps)
    reports = {side: worker.finish() for side, worker in workers.items()}
    figures: dict[str, Any] = {}
    for side in workers:
        step = middle([one for turn in seconds[side] for one in turn])
        figures[side] = {
            "seconds_a_step": step,
            "tokens_per_second": 1024 / step["median"],
            "peak_memory_gb": reports[side]["peak_memory_gb"],
            "first_step_seconds": workers[side].setup["first_step_seconds"],
            "loss": reports[side]["loss"],
        }
    figures["speed_ratio"] = figures["ours"]["tokens_per_second"] / figures["peer"]["tokens_per_second"]
    figures["memory_ratio"] = figures["ours"]["peak_memory_gb"] / figures["peer"]["peak_memory_gb"]
    return figures


def run_text(config: Config, folder: Path) -> dict[str, Any]:
    spec = {"model": str(folder / "model"), "cores": config.cores, "method": "lora", "rank": 8, "dropout": 0.0}
    workers = {side: Worker(side, spec | {"batches": str(folder / f"text_{side}.npz")}) for side in ("ours", "peer")}
    seconds = take_turns(workers, config.rounds, config.batches)
    figures: dict[str, Any] = json.loads((folder / "text.json").read_text())
    for side, worker in workers.items():
        rates = middle([16 * config.batches / sum(turn) for turn in seconds[side]])
        figures[side] |= {"examples_per_second": rates, "peak_memory_gb": worker.finish()["peak_memory_gb"]}
    ours, peer = (figures[side]["examples_per_second"]["median"] for side in ("ours", "peer"))
    return figures | {"speed_ratio": ours / peer}


def run_methods(config: Config, folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for dropout in (0.0, 0.05):
        for side in ("ours", "peer"):
            spec = {"model": str(folder / "model"), "cores": config.cores, "rank": 128, "dropout": dropout}
            spec |= {"batches": str(folder / f"tokens_{side}.npz")}
            workers = {method: Worker(side, spec | {"method": method}) for method in ("lora", "dora")}
            seconds = take_turns(workers, config.rounds, config.steps)
            found: dict[str, Any] = {}
            for method, worker in workers.items():
                worker.finish()
                found[method] = middle([one for turn in seconds[method] for one in turn])
            ratio = found["dora"]["median"] / found["lora"]["median"]
            figures[f"{side}, dropout {dropout:g}"] = found | {"dora_over_lora": ratio}
    return figures


def prepare(config: Config, folder: Path) -> None:
    """Write the model's folder and both sides' batches of ``tokens`` and ``text``."""
    from rora_theory.finetune import Batches, choose_widths, read_records, tokenize
    from rora_theory.llama import load
    from rora_theory.llama.saving import save_model

    model = load(config.model)
    save_model(folder / "model", model)
    examples = tokenize(read_records(config.data), model.tokenizer)
    windows = examples.tokens[: 3 * 4 * 257].reshape(3, 4, 257)
    ours = [(w[:, :-1], w[:, 1:], np.ones((4, 256), np.float32)) for w in windows]
    save(folder / "tokens_ours.npz", ours)
    ids = [w[:, :-1] for w in windows]
    save(folder / "tokens_peer.npz", [(w, np.ones_like(w), w) for w in ids])

    widths = choose_widths(examples.input_lengths, 6)
    batches = Batches(examples, widths, batch_size=16, seed=42)
    whole = [batches[step] for step in range(len(batches)) if batches[step].weights.any(axis=1).all()]
    whole.sort(key=lambda batch: batch.inputs.shape[1])
    save(folder / "text_ours.npz", [batch[:3] for batch in spread(whole, config.batches)])

    order = np.random.default_rng(42).permutation(len(examples))
    random = [pad([examples[i] for i in rows.tolist()]) for rows in order[: len(order) // 16 * 16].reshape(-1, 16)]
    random.sort(key=lambda batch: batch[0].shape[1])
    save(folder / "text_peer.npz", spread(random, config.batches))
    padding = {
        "ours": {"records": len(examples), "widths": widths, "padding": batches.padding_share},
        "peer": {"padding": 1 - sum(b[1].sum() for b in random) / sum(b[1].size for b in random)},
    }
    (folder / "text.json").write_text(json.dumps(padding))


def spread(items: list[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly over the list, from the middle of each stretch."""
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and labels of a random batch, as the published code pads: on the left, to a multiple of 8."""
    width = -(-max(map(len, rows)) // 8) * 8
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return tokens, mask, np.where(mask == 1, tokens, -100)


def save(path: Path, batches: Sequence[Sequence[np.ndarray]]) -> None:
    """Write batches as ``BATCH_ARRAY`` entries."""
    np.savez(path, **{f"{i}_{j}": array for i, batch in enumerate(batches) for j, array in enumerate(batch)})


def read(path: str) -> list[list[np.ndarray]]:
    """Batches of `save`."""
    with np.load(path) as file:
        count = 1 + max(int(name.split("_")[0]) for name in file.files)
        return [[file[f"{i}_{j}"] for j in range(3)] for i in range(count)]


def serve(setup: dict[str, Any], step: Any, report: Any) -> None:
    """A worker's end of `Worker`: ``step(i)`` works batch i to the end, ``report()`` is the last word."""
    print(json.dumps(setup), flush=True)
    at = 0
    for line in sys.stdin:
        message = json.loads(line)
        seconds = []
        for _ in range(message["steps"]):
            begin = time.perf_counter()
            step(at)
            seconds.append(time.perf_counter() - begin)
            at += 1
        end = message.get("end", False)
        print(json.dumps({"seconds": seconds} | (report() if end else {})), flush=True)
        if end:
            return


def peak_memory_gb() -> float:
    """The most memory this process has had."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) / 1e6


def work(spec: dict[str, Any]) -> None:
    """This package's side."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from rora_theory import adapters, llama
    from rora_theory.finetune import Batch, FinetuneConfig
    from rora_theory.finetune import step as steps

    remat = {"False": False, "mlp": "mlp", "True": True}[spec.get("remat", "False")]
    config = FinetuneConfig(**own_settings(spec["method"], spec["rank"]), dropout=spec["dropout"], remat=remat)
    setup: dict[str, Any] = {}
    model = llama.load(spec["model"])
    params, model_config = model.params, model.config
    batches = [Batch(*arrays, None) for arrays in read(spec["batches"])]
    adapter = adapters.init(jax.random.key(0), config.adapter(), model_config, params)
    setup["trainable_parameters"], setup["trainable_share"] = adapters.count(adapter), adapters.share(adapter, params)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, 1000), jax.random.key(1))
    function = steps.train_step(adapter, model_config, config, 1000)
    loss = None

    def step(index: int) -> None:
        nonlocal state, loss
        state, metrics = function(state, params, batches[index % len(batches)])
        loss = jax.block_until_ready(metrics.loss)

    begin = time.perf_counter()
    step(0)
    setup["first_step_seconds"] = time.perf_counter() - begin
    for index in range(len(batches)):  # every shape is compiled before the first turn
        step(index)

    def report() -> dict[str, Any]:
        return setup | {"peak_memory_gb": peak_memory_gb(), "loss": float(loss)}

    serve(setup, step, report)


def own_settings(method: str, size: int) -> dict[str, Any]:
    """Settings of a method at a size: the rank, a bottleneck's width, or the number of a prefix's tokens."""
    low_rank = {"rank": size, "alpha": 16}
    return {
        "lora": {"method": "lora", "rule": "lora", **low_rank},
        "rora": {"method": "lora", "rule": "rora", **low_rank},
        "dora": {"method": "dora", "rule": "lora", **low_rank},
        "prefix": {"method": "prefix", "virtual_tokens": size},
        "series": {"method": "series", "bottleneck": size},
        "parallel": {"method": "parallel", "bottleneck": size},
    }[method]


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    if "tokens" in figures:
        found = figures["tokens"]
        for side in ("ours", "peer"):
            one = found[side]
            yield f"tokens: {side} {one['tokens_per_second']:.0f} tokens/s, peak {one['peak_memory_gb']:.2f} GB"
        yield f"tokens: speed {found['speed_ratio']:.2f} of the peer's, memory {found['memory_ratio']:.2f}"
    if "text" in figures:
        found = figures["text"]
        for side in ("ours", "peer"):
            one = found[side]
            rate = one["examples_per_second"]["median"]
            yield f"text: {side} {rate:.2f} examples/s, padding {one['padding']:.1%}"
        yield f"text: speed {found['speed_ratio']:.2f} of the peer's"
    for name, one in figures.get("methods", {}).items():
        yield (
            f"methods: {name}: LoRA {one['lora']['median']:.3f} s, DoRA {one['dora']['median']:.3f} s a step, "
            f"ratio {one['dora_over_lora']:.2f}"
        )


def main() -> None:
    from rora_theory.errors import InputError
    from rora_theory.io.files import write_whole
    from sims.common import cli

    config = cli.parse(Config, description=(__doc__ or "").split("\n", 1)[0])
    if not config.data:
        raise InputError("--data is missing; accepted are training files in the LLM-Adapters schema")
    figures: dict[str, Any] = {"machine": machine(config.cores)}
    others = Others()
    print(in_words(figures["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(config, Path(folder))
        runs = {"tokens": run_tokens, "text": run_text, "methods": run_methods}
        for part in config.parts:
            figures[part] = runs[part](config, Path(folder))
            for line in lines({part: figures[part]}):
                print(line, flush=True)
            figures["others"] = others.share()
            if config.out is not None:
                write_whole(config.out, json.dumps(figures, indent=2) + "\n")
    print(others.in_words())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        from sims.common import cli

        cli.run(main)
