"""Compare training speed and memory with transformers + peft on torch: same model, data, precision and batch.

    python benchmarks/finetune.py --data DATA/ARC-Easy/train.json DATA/openbookqa/train.json --out finetune.json

Each side runs in a process of its own, loads the same folder and is warmed up, so that this side has compiled. Then the
sides take turns on the same cores, and medians over the turns are compared. Parts:

  tokens   batches of 4 x 256 tokens of the text, LoRA of rank 8: tokens/s and peak memory of the process
  text     batches of 16 records: examples/s. Here records of similar length share a batch; the peer's batches are
           random and padded to their longest record, as in the published code. A few batches stand for the epoch: every
           k-th one in the order of padded length
  methods  LoRA and DoRA of rank 128, batches of 4 x 256, without and with dropout: time of a step

The adapted modules are the paper's five. Run it on a quiet machine; it uses the first ``--cores`` cores.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hardware import OtherLoad, describe_machine, format_machine, silence_transformers

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
Part = Literal["tokens", "text", "methods"]


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    data: tuple[str, ...] = ()
    """Training files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """Model of both sides"""
    parts: tuple[Part, ...] = ("tokens", "text", "methods")
    """Parts to run"""
    rounds: int = 5
    """Number of turns of each side"""
    steps: int = 3
    """Number of steps in a turn (tokens, methods)"""
    batches: int = 10
    """Number of batches of the epoch in a turn (text)"""
    cores: int = 2
    """Number of cores that both sides run on"""
    out: Path | None = None
    """JSON file for the results"""


class Worker:
    """Process of one side, which loads its model and then runs steps on request.

    Args:
      side: ``"ours"`` or ``"peer"``.
      spec: Settings of the side, a JSON object, see `work`.

    Attributes:
      setup: Report that the process sends once it is ready.
    """

    def __init__(self, side: str, spec: dict[str, Any]) -> None:
        script = HERE / ("finetune.py" if side == "ours" else "finetune_peer.py")
        command = [sys.executable, str(script), "--work", json.dumps(spec)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.setup = self._receive()

    def steps(self, count: int) -> list[float]:
        """Run ``count`` steps, each on the next batch, and return the seconds of each."""
        return self._request({"steps": count})["seconds"]

    def finish(self) -> dict[str, Any]:
        """End the process and return its report."""
        report = self._request({"steps": 0, "end": True})
        self._process.wait()
        return report

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self._process.wait()}; its messages are above")
        return json.loads(line)


def take_turns(workers: dict[str, Worker], rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Time the steps of all workers in turns, with progress on standard error.

    Args:
      workers: Workers by name.
      rounds: Number of turns of each worker.
      steps: Number of steps in a turn.

    Returns:
      Seconds of every step of every turn, by worker.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(rounds):
        # Each round starts with another worker, so that a drift of the machine's speed does not favour one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(workers[name].steps(steps))
            print(f"turn {turn + 1} of {rounds}: {name} {sum(seconds[name][-1]):.0f} s", file=sys.stderr, flush=True)
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles and the number of values."""
    low, mid, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": mid, "lower_quartile": low, "upper_quartile": high, "count": len(values)}


def step_quartiles(turns: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the `quartiles` of the seconds of all steps of all turns."""
    return quartiles([seconds for turn in turns for seconds in turn])


def run_tokens(config: FinetuneOptions, folder: Path) -> dict[str, Any]:
    """Run the part ``tokens`` on the batches in ``folder``."""
    spec = {"model": str(folder / "model"), "cores": config.cores, "method": "lora", "rank": 8, "dropout": 0.0}
    workers = {side: Worker(side, spec | {"batches": str(folder / f"tokens_{side}.npz")}) for side in ("ours", "peer")}
    seconds = take_turns(workers, config.rounds, config.steps)
    reports = {side: worker.finish() for side, worker in workers.items()}
    results: dict[str, Any] = {}
    for side in workers:
        step = step_quartiles(seconds[side])
        results[side] = {
            "seconds_a_step": step,
            "tokens_per_second": 1024 / step["median"],  # batches of 4 x 256 tokens
            "peak_memory_gb": reports[side]["peak_memory_gb"],
            "first_step_seconds": workers[side].setup["first_step_seconds"],
            "loss": reports[side]["loss"],
        }
    results["speed_ratio"] = results["ours"]["tokens_per_second"] / results["peer"]["tokens_per_second"]
    results["memory_ratio"] = results["ours"]["peak_memory_gb"] / results["peer"]["peak_memory_gb"]
    return results


def run_text(config: FinetuneOptions, folder: Path) -> dict[str, Any]:
    """Run the part ``text`` on the batches in ``folder``."""
    spec = {"model": str(folder / "model"), "cores": config.cores, "method": "lora", "rank": 8, "dropout": 0.0}
    workers = {side: Worker(side, spec | {"batches": str(folder / f"text_{side}.npz")}) for side in ("ours", "peer")}
    seconds = take_turns(workers, config.rounds, config.batches)
    results: dict[str, Any] = json.loads((folder / "text.json").read_text())
    for side, worker in workers.items():
        rates = quartiles([16 * config.batches / sum(turn) for turn in seconds[side]])
        results[side] |= {"examples_per_second": rates, "peak_memory_gb": worker.finish()["peak_memory_gb"]}
    ours, peer = (results[side]["examples_per_second"]["median"] for side in ("ours", "peer"))
    return results | {"speed_ratio": ours / peer}


def run_methods(config: FinetuneOptions, folder: Path) -> dict[str, Any]:
    """Run the part ``methods`` on the batches in ``folder``."""
    results: dict[str, Any] = {}
    for dropout in (0.0, 0.05):
        for side in ("ours", "peer"):
            spec = {"model": str(folder / "model"), "cores": config.cores, "rank": 128, "dropout": dropout}
            spec |= {"batches": str(folder / f"tokens_{side}.npz")}
            # LoRA and DoRA of one side take turns, since their ratio is the result.
            workers = {method: Worker(side, spec | {"method": method}) for method in ("lora", "dora")}
            seconds = take_turns(workers, config.rounds, config.steps)
            by_method: dict[str, Any] = {}
            for method, worker in workers.items():
                worker.finish()
                by_method[method] = step_quartiles(seconds[method])
            ratio = by_method["dora"]["median"] / by_method["lora"]["median"]
            results[f"{side}, dropout {dropout:g}"] = by_method | {"dora_over_lora": ratio}
    return results


def prepare(config: FinetuneOptions, folder: Path) -> None:
    """Write the model's folder, and the batches of both sides for ``tokens`` and ``text``."""
    from rora_theory.lab.finetune import Batches, choose_widths, read_records, tokenize
    from rora_theory.lab.llama import load
    from rora_theory.lab.llama.saving import save_model

    model = load(config.model)
    save_model(folder / "model", model)
    examples = tokenize(read_records(config.data), model.tokenizer)
    # Part tokens: three batches of 4 x 257 consecutive tokens. Here inputs and targets are shifted by one position;
    # transformers shifts its labels itself.
    windows = examples.tokens[: 3 * 4 * 257].reshape(3, 4, 257)
    ours = [(window[:, :-1], window[:, 1:], np.ones((4, 256), np.float32)) for window in windows]
    save(folder / "tokens_ours.npz", ours)
    ids = [window[:, :-1] for window in windows]
    save(folder / "tokens_peer.npz", [(tokens, np.ones_like(tokens), tokens) for tokens in ids])

    # Part text, this side: full batches of records of similar length.
    widths = choose_widths(examples.input_lengths, 6)
    batches = Batches(examples, widths, batch_size=16, seed=42)
    full = [batches[step] for step in range(len(batches)) if batches[step].weights.any(axis=1).all()]
    full.sort(key=lambda batch: batch.inputs.shape[1])
    save(folder / "text_ours.npz", [batch[:3] for batch in spread(full, config.batches)])

    # Part text, the peer: random batches, each padded to its longest record.
    order = np.random.default_rng(42).permutation(len(examples))
    random = [pad([examples[i] for i in rows.tolist()]) for rows in order[: len(order) // 16 * 16].reshape(-1, 16)]
    random.sort(key=lambda batch: batch[0].shape[1])
    save(folder / "text_peer.npz", spread(random, config.batches))
    # Share of padding over the whole epoch.
    padding = {
        "ours": {"records": len(examples), "widths": widths, "padding": batches.padding_share},
        "peer": {"padding": 1 - sum(mask.sum() for _, mask, _ in random) / sum(mask.size for _, mask, _ in random)},
    }
    (folder / "text.json").write_text(json.dumps(padding))


def spread(items: list[Any], count: int) -> list[Any]:
    """Return ``count`` items, spread evenly over a list: the middle one of each of ``count`` equal stretches."""
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, mask and labels of a batch, padded on the left to a multiple of 8 as in the published code."""
    width = -(-max(map(len, rows)) // 8) * 8
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return tokens, mask, np.where(mask == 1, tokens, -100)


def save(path: Path, batches: Sequence[Sequence[np.ndarray]]) -> None:
    """Write batches to an .npz file with entries ``BATCH_ARRAY``, such as ``0_2``."""
    np.savez(path, **{f"{i}_{j}": array for i, batch in enumerate(batches) for j, array in enumerate(batch)})


def read(path: str) -> list[list[np.ndarray]]:
    """Read the batches that `save` has written."""
    with np.load(path) as file:
        count = 1 + max(int(name.split("_")[0]) for name in file.files)
        return [[file[f"{i}_{j}"] for j in range(3)] for i in range(count)]


def serve(setup: dict[str, Any], step: Callable[[int], None], report: Callable[[], dict[str, Any]]) -> None:
    """Answer the requests of a `Worker` on standard input until it ends the process.

    Args:
      setup: Report that is sent at once.
      step: Function that runs the step of a given index and returns when it is done.
      report: Function that returns the report sent at the end.
    """
    print(json.dumps(setup), flush=True)
    index = 0
    for line in sys.stdin:
        message = json.loads(line)
        seconds = []
        for _ in range(message["steps"]):
            begin = time.perf_counter()
            step(index)
            seconds.append(time.perf_counter() - begin)
            index += 1
        is_end = message.get("end", False)
        print(json.dumps({"seconds": seconds} | (report() if is_end else {})), flush=True)
        if is_end:
            return


def peak_memory_gb() -> float:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match.group(1)) / 1e6


def work(spec: dict[str, Any]) -> None:
    """Run this package's side in a worker process.

    Args:
      spec: Settings ``model`` and ``batches`` (paths), ``method``, ``rank``, ``dropout``, ``cores``, and optionally
        ``remat``.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from rora_theory.lab import adapters, llama
    from rora_theory.lab.finetune import Batch, FinetuneConfig
    from rora_theory.lab.finetune import step as steps

    # Model, adapter, state and compiled step.
    remat = {"False": False, "mlp": "mlp", "True": True}[spec.get("remat", "False")]
    config = FinetuneConfig(**method_settings(spec["method"], spec["rank"]), dropout=spec["dropout"], remat=remat)
    setup: dict[str, Any] = {}
    model = llama.load(spec["model"])
    params, model_config = model.params, model.config
    batches = [Batch(*arrays, None) for arrays in read(spec["batches"])]
    adapter = config.adapter().build(jax.random.key(0), model_config, params)
    setup["trainable_parameters"], setup["trainable_share"] = adapter.count(), adapters.share(adapter, params)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, 1000), jax.random.key(1))
    function = steps.train_step(adapter, model_config, config, 1000)
    loss = None

    def step(index: int) -> None:
        nonlocal state, loss
        state, metrics = function(state, params, batches[index % len(batches)])
        loss = jax.block_until_ready(metrics.loss)

    # Warm-up: time the first step, then compile for every shape before the first turn.
    begin = time.perf_counter()
    step(0)
    setup["first_step_seconds"] = time.perf_counter() - begin
    for index in range(len(batches)):
        step(index)

    def report() -> dict[str, Any]:
        return setup | {"peak_memory_gb": peak_memory_gb(), "loss": float(loss)}

    serve(setup, step, report)


def method_settings(method: str, size: int) -> dict[str, Any]:
    """Return a method's settings.

    Args:
      method: Name of the method.
      size: Rank, width of the bottleneck, or number of a prefix's virtual tokens.
    """
    low_rank = {"rank": size, "alpha": 16}
    return {
        "lora": {"method": "lora", "rule": "lora", **low_rank},
        "rora": {"method": "lora", "rule": "rora", **low_rank},
        "dora": {"method": "dora", "rule": "lora", **low_rank},
        "prefix": {"method": "prefix", "virtual_tokens": size},
        "series": {"method": "series", "bottleneck": size},
        "parallel": {"method": "parallel", "bottleneck": size},
    }[method]


def describe(results: dict[str, Any]) -> Iterator[str]:
    """Yield lines of text with the results of the parts that were run."""
    if "tokens" in results:
        tokens = results["tokens"]
        for side in ("ours", "peer"):
            rate, memory = tokens[side]["tokens_per_second"], tokens[side]["peak_memory_gb"]
            yield f"tokens: {side} {rate:.0f} tokens/s, peak {memory:.2f} GB"
        yield f"tokens: speed {tokens['speed_ratio']:.2f} of the peer's, memory {tokens['memory_ratio']:.2f}"
    if "text" in results:
        text = results["text"]
        for side in ("ours", "peer"):
            rate, padding = text[side]["examples_per_second"]["median"], text[side]["padding"]
            yield f"text: {side} {rate:.2f} examples/s, padding {padding:.1%}"
        yield f"text: speed {text['speed_ratio']:.2f} of the peer's"
    for name, times in results.get("methods", {}).items():
        yield (
            f"methods: {name}: LoRA {times['lora']['median']:.3f} s, DoRA {times['dora']['median']:.3f} s a step, "
            f"ratio {times['dora_over_lora']:.2f}"
        )


def main() -> None:
    """Run the parts, print their results, and write them after each part."""
    from rora_theory.errors import InputError
    from rora_theory.runs.files import write_whole
    from sims.common import cli

    silence_transformers()
    config = cli.parse(FinetuneOptions, description=(__doc__ or "").split("\n", 1)[0])
    if not config.data:
        raise InputError("--data must be one or more training files in the LLM-Adapters schema, got none")
    results: dict[str, Any] = {"machine": describe_machine(config.cores)}
    other_load = OtherLoad()
    print(format_machine(results["machine"]), flush=True)
    # Both sides read the same model and batches from files.
    with tempfile.TemporaryDirectory() as folder:
        prepare(config, Path(folder))
        runs = {"tokens": run_tokens, "text": run_text, "methods": run_methods}
        for part in config.parts:
            results[part] = runs[part](config, Path(folder))
            for line in describe({part: results[part]}):
                print(line, flush=True)
            results["others"] = other_load.share()
            if config.out is not None:
                write_whole(config.out, json.dumps(results, indent=2) + "\n")
    print(other_load.describe())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        from sims.common import cli

        cli.run_command(main)
