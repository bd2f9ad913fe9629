"""What a method costs: time of a training step and peak memory of all six, in one run.

    python benchmarks/methods.py --out methods.json                 SmolLM2-135M, float32, on this machine's cores

Each method is a process of its own, compiled and warmed up before the first turn; then the methods of a size take
turns, in an order that turns too, and each is compared with LoRA turn by turn. A size is the rank of LoRA, RoRA and
DoRA, the width of a series or parallel adapter, and the number of a prefix's virtual tokens. Modules are the published
ones of each method.

The paper reports 3 h 45 min of training for LoRA and RoRA and 5 h 35 min for DoRA: 1.49 times LoRA's.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from finetune import Worker, middle, save, take_turns
from hardware import Others, in_words, machine

METHODS = ("lora", "rora", "dora", "prefix", "series", "parallel")
PAPER_MINUTES = {"lora": 225, "rora": 225, "dora": 335}
PAPER_RATIO = PAPER_MINUTES["dora"] / PAPER_MINUTES["lora"]
BOUND = 1.15
"""DoRA's time over LoRA's that this package holds itself to."""


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m"
    """model to train"""
    methods: tuple[str, ...] = METHODS
    """any of lora rora dora prefix series parallel"""
    sizes: tuple[int, ...] = (8, 128)
    """ranks, widths and numbers of virtual tokens"""
    rounds: int = 5
    """turns of each method"""
    steps: int = 3
    """steps a turn"""
    rows: int = 4
    """records a step"""
    seq: int = 256
    """tokens a record"""
    dropout: float = 0.0
    """dropout of the adapter's input"""
    cores: int = 2
    """cores that the methods run on"""
    remat: Literal["False", "mlp", "True"] = "False"
    """what is made again in the backward pass"""
    out: Path | None = None
    """JSON file for the figures"""


def check(config: Config) -> None:
    """Raise `InputError` where a setting is out of range."""
    from rora_theory.errors import InputError

    unknown = [method for method in config.methods if method not in METHODS]
    if unknown or not config.methods:
        raise InputError(f"methods are {config.methods}; accepted are any of {', '.join(METHODS)}")
    for name in ("rounds", "steps", "rows", "seq", "cores"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; accepted is an integer of 1 or more")
    if not config.sizes or min(config.sizes) < 1:
        raise InputError(f"sizes are {config.sizes}; accepted are integers of 1 or more")
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout is {config.dropout}; accepted is a number from 0 to below 1")


def run_size(config: Config, size: int, batches: Path) -> dict[str, Any]:
    """Figures of every method at a size."""
    spec = {"model": config.model, "cores": config.cores, "rank": size, "dropout": config.dropout}
    spec |= {"batches": str(batches), "remat": config.remat}
    workers = {method: Worker("ours", spec | {"method": method}) for method in config.methods}
    seconds = take_turns(workers, config.rounds, config.steps)
    reports = {method: worker.finish() for method, worker in workers.items()}
    tokens = config.rows * config.seq
    figures: dict[str, Any] = {}
    for method in config.methods:
        step = middle([one for turn in seconds[method] for one in turn])
        figures[method] = reports[method] | {"seconds_a_step": step, "tokens_per_second": tokens / step["median"]}
        del figures[method]["seconds"]
        if "lora" in config.methods:
            pairs = zip(seconds[method], seconds["lora"], strict=True)
            figures[method]["time_over_lora"] = middle([sum(own) / sum(theirs) for own, theirs in pairs])
            memory = reports[method]["peak_memory_gb"] / reports["lora"]["peak_memory_gb"]
            figures[method]["memory_over_lora"] = memory
    return figures


def lines(figures: dict[str, Any], size: int) -> Iterator[str]:
    """The figures of a size in words."""
    for method, found in figures.items():
        text = f"size {size}: {method}: {found['seconds_a_step']['median']:.3f} s a step"
        if "time_over_lora" in found:
            ratio = found["time_over_lora"]
            text += (
                f", {ratio['median']:.2f} of LoRA's ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"
            )
        text += f"; peak {found['peak_memory_gb']:.2f} GB"
        yield text + f"; {found['trainable_parameters']:,} trainable, {found['trainable_share']:.2%}"


def main() -> None:
    from rora_theory.io.files import write_whole
    from rora_theory.runs.reading import as_json
    from sims.common import cli

    config = cli.parse(Config, description=(__doc__ or "").split("\n", 1)[0])
    check(config)
    figures: dict[str, Any] = {
        "machine": machine(config.cores),
        "config": as_json(asdict(config) | {"out": None}),
        "sizes": {},
    }
    others = Others()
    print(in_words(figures["machine"]), flush=True)
    figures["paper"] = {"minutes": PAPER_MINUTES, "dora_over_lora": PAPER_RATIO}
    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "batches.npz"
        tokens = np.random.default_rng(0).integers(0, 256, (config.rows, config.seq + 1)).astype(np.int32)
        save(batches, [(tokens[:, :-1], tokens[:, 1:], np.ones((config.rows, config.seq), np.float32))])
        for size in config.sizes:
            found = figures["sizes"][str(size)] = run_size(config, size, batches)
            for line in lines(found, size):
                print(line, flush=True)
            if {"lora", "dora"} <= set(found):
                ratio = found["dora"]["time_over_lora"]["median"]
                print(
                    f"size {size}: DoRA over LoRA {ratio:.2f}; at most {BOUND} is asked; the paper's is 1.49",
                    flush=True,
                )
            figures["others"] = others.share()
            if config.out is not None:
                write_whole(config.out, json.dumps(figures, indent=2) + "\n")
    print(others.in_words())


if __name__ == "__main__":
    from sims.common import cli

    cli.run(main)
