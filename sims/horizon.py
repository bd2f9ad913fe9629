"""How the best learning rate under Adam moves with gamma r, and how that depends on the number of steps.

    python -m sims.horizon --data DATA/*/train.json --ranks 8 128 --strengths 64 724 --lrs 3e-4 1e-3 3e-3

A real model is fine-tuned at every rank, strength gamma r and rate, at a constant rate after a short warm-up, and the
held-out records are read after each of ``--read-at`` steps of the same run. A cell that is done is not done again:
further strengths, ranks, rates and seeds extend the folder.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rora_theory import llama
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.evaluate.scoring import Scoring
from rora_theory.finetune import FinetuneConfig
from rora_theory.finetune.config import LossOn, TrainTemplate
from rora_theory.rules import check_list
from rora_theory.stats.paired import mean_per_token
from rora_theory.sweep import readings
from rora_theory.sweep.records import draw_records
from rora_theory.sweep.workbench import Workbench
from sims.common import cli, devices, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME = "horizon"
COLUMNS = (
    "rank", "strength", "gamma", "learning_rate", "seed", "step", "status", "validation_loss", "validation_error",
    "answer_loss", "answer_error",
)  # fmt: skip
UNITS = {
    "strength": "gamma times the rank: alpha under alpha / r, alpha sqrt(r) under alpha / sqrt(r)",
    "validation_loss, answer_loss": "nats a token of the held-out records; errors are over records",
}


@dataclass(frozen=True)
class Config:
    """Which runs, and where they are read."""

    data: tuple[str, ...] = ()
    """training files in the LLM-Adapters schema, .json or .jsonl, or hf://datasets/OWNER/NAME[@REVISION]/FILE"""
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    ranks: tuple[int, ...] = (8, 128)
    """ranks of the adapter"""
    strengths: tuple[float, ...] = (64.0, 724.0)
    """gamma r of the adapter: gamma is the strength over the rank"""
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """learning rates after the warm-up"""
    seeds: tuple[int, ...] = (0,)
    """seeds of initialisation and order"""
    read_at: tuple[int, ...] = (16, 64, 256)
    """steps after which the held-out records are read, ascending; the last ends the run"""
    batch_size: int = 4
    """records a step"""
    warmup: int = 4
    """steps of linear warm-up from 0"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    template: TrainTemplate = "clean"
    """training prompt: train (published, to the byte) or clean"""
    loss_on: LossOn = "all"
    """tokens in the training loss"""
    cutoff: int = 96
    """longest training example in tokens"""
    train_records: int = 2048
    """a seeded sample of so many training records"""
    held_out: int = 96
    """records that no run trains on"""
    data_seed: int = 42
    """seed of the two samples"""
    out: Path | None = None
    """run folder; by default results/horizon/ID"""

    def training(self, rank: int, strength: float, rate: float, seed: int) -> FinetuneConfig:
        """One run."""
        return FinetuneConfig(
            rule="lora",
            rank=rank,
            alpha=strength,
            learning_rate=rate,
            seed=seed,
            schedule="constant",
            dropout=0.0,
            validation=0,
            widths=3,
            batch=self.batch_size,
            warmup=self.warmup,
            targets=self.targets,
            template=self.template,
            loss_on=self.loss_on,
            cutoff=self.cutoff,
        )

    def runs(self) -> Iterator[tuple[int, float, float, int]]:
        """Rank, strength, rate and seed of every run, a seed after the other."""
        for seed in self.seeds:
            for strength in self.strengths:
                for rank in self.ranks:
                    for rate in self.lrs:
                        yield rank, strength, rate, seed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.run(lambda: run(cli.parse(Config, argv, description=(__doc__ or "").split("\n", 1)[0])))


def run(config: Config) -> None:
    """Do every run that the folder lacks."""
    for name in ("ranks", "strengths", "lrs", "seeds", "read_at"):
        check_list("--" + name, getattr(config, name))
    runs = list(config.runs())
    for one in runs:
        config.training(*one).check()
    split = draw_records(
        config.data, held_out=config.held_out, train_records=config.train_records, seed=config.data_seed
    )
    located = {config.model: llama.locate(config.model)}
    grows = ("ranks", "strengths", "lrs", "seeds", "read_at", "data", "out")
    identity = {name: value for name, value in asdict(config).items() if name not in grows}
    identity |= {"records": split.summary, "model_sha256": located[config.model].sha256}
    places = devices.pick(1)
    folder = RunFolder.open(NAME, identity, out=config.out, extra={"units": UNITS, "device": devices.describe(places)})
    bench = Workbench(config.training(*runs[0]), split, {}, located, scoring=Scoring("label", None))
    cli.tell(bench.open(config.model))
    tokens, answers = readings.token_counts(bench)
    folder.write_rows(
        ("source", "index", "tokens", "answer_tokens"),
        [
            {"source": source, "index": index, "tokens": whole, "answer_tokens": answer}
            for (source, index, _), whole, answer in zip(split.held_out, tokens, answers, strict=True)
        ],
        "records.csv",
    )
    kept, last = Cells(folder), config.read_at[-1]
    with progress_bar("runs", len(runs), fields="{run}") as bar:
        for number, (rank, strength, rate, seed) in enumerate(runs, start=1):
            name = f"r={rank} strength={strength:g} lr={rate:g} seed={seed} steps={last}"
            fresh, begun = name not in kept, time.monotonic()
            bar.advance(0, run=name)
            training = config.training(rank, strength, rate, seed)
            found = kept.do(name, partial(work, bench, training, config.read_at))
            if fresh:
                print(
                    f"[{number}/{len(runs)}] {name}: {said(found, tokens)}, {time.monotonic() - begun:.0f} s",
                    flush=True,
                )
            bar.advance(1, run=name)
    tables.print_text(f"{len(runs)} runs, written to {folder.path}")
    folder.finish()


def work(bench: Workbench, training: FinetuneConfig, steps: Sequence[int]) -> dict[str, Any]:
    """A run as JSON types."""
    return asdict(readings.read_run(bench, training, steps))


def said(found: dict[str, Any], tokens: Sequence[int]) -> str:
    """The losses of a run's readings, in a line."""
    losses = [f"{mean_per_token(one['losses'], tokens).value:.4f} at {one['step']}" for one in found["readings"]]
    if found["diverged_at"] is not None:
        losses.append(f"diverged at {found['diverged_at']}")
    return ", ".join(losses)


if __name__ == "__main__":
    main(sys.argv[1:])
