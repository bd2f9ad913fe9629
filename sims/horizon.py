"""How the best learning rate under Adam moves with gamma r, and how that depends on the number of steps.

    python -m sims.horizon --data DATA/*/train.json --ranks 8 128 --strengths 64 724 --lrs 3e-4 1e-3 3e-3

A real model is fine-tuned at every rank, strength gamma r and rate, at a constant rate after a short warm-up, and the
held-out records are read after each of ``--read-at`` steps of the same run. ``--full-lrs`` trains the same modules in
full beside them. A cell that is done is not done again: further strengths, ranks, rates and seeds extend the folder.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory import frames, llama
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.formats import TrainTemplate
from rora_theory.data.records import DataConfig
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Scoring
from rora_theory.finetune import FinetuneConfig
from rora_theory.finetune.config import LossOn
from rora_theory.rules import check_list, check_ranks, check_seeds, check_steps
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import finished
from rora_theory.scaling import check_positive
from rora_theory.stats.paired import mean_per_token
from rora_theory.sweep import horizons, readings
from rora_theory.sweep.records import draw_records
from rora_theory.sweep.workbench import Workbench
from sims.common import cli, devices, prompts, tables
from sims.common.cells import run_cells

NAME = "horizon"
OVER = {"strength": "gamma r at r =", "rank": "r at gamma r ="}
UNITS = {
    "strength": "gamma times the rank: alpha under alpha / r, alpha sqrt(r) under alpha / sqrt(r)",
    "validation_loss, answer_loss": "nats a token of the held-out records; errors are over records",
}


@dataclass(frozen=True)
class Cell:
    """One run: its rank, gamma r, rate and seed, and the steps it is read at; full fine-tuning has no rank."""

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read_at: tuple[int, ...]

    def __str__(self) -> str:
        size = "full" if self.rank is None else f"r={self.rank} gamma*r={self.strength:g}"
        return f"{size} lr={self.rate:g} seed={self.seed}"


@dataclass(frozen=True)
class Config:
    """Which runs, and where they are read."""

    data: tuple[str, ...] = ()
    """.json, .jsonl, .parquet or .txt files, of the hub as hf://datasets/OWNER/NAME[@REVISION]/FILE; or a split, as
    FOLDER:train or hf://datasets/OWNER/NAME:train"""
    reading: DataConfig = field(default_factory=DataConfig)
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    ranks: tuple[int, ...] = (8, 128)
    """ranks of the adapter"""
    strengths: tuple[float, ...] = (64.0, 724.0)
    """gamma r of the adapter: gamma is the strength over the rank"""
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """learning rates after the warm-up"""
    full_lrs: tuple[float, ...] = ()
    """learning rates of full fine-tuning of the same modules; none is no such run"""
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
    """training prompt: train (published, to the byte), clean, chat (the model's chat template) or plain"""
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
    regime: Path | None = None
    """run folder of sims.regime: its takeover distances give the law's exponents"""
    out: Path | None = None
    """run folder; by default results/horizon/ID"""

    def __post_init__(self) -> None:
        """Raise `InputError` where a value is out of range."""
        check_ranks(self.ranks, fewest=1)
        for option, values in (("--strengths", self.strengths), ("--lrs", self.lrs), ("--full-lrs", self.full_lrs)):
            if values or option != "--full-lrs":
                check_list(option, values)
            for value in values:
                check_positive(option, value)
        check_seeds(self.seeds)
        try:
            check_steps(self.read_at)
        except InputError as error:
            raise InputError(f"--read-at: {error}") from None

    def training(self, cell: Cell) -> FinetuneConfig:
        """The fine-tuning run of a cell."""
        own: dict[str, Any] = {"method": "full"}
        if cell.rank is not None:
            own = {"rule": "lora", "rank": cell.rank, "alpha": cell.strength}
        return FinetuneConfig(
            **own,
            lr=cell.rate,
            seed=cell.seed,
            schedule="constant",
            dropout=0.0,
            held_out=0,
            widths=3,
            batch_size=self.batch_size,
            warmup=self.warmup,
            targets=self.targets,
            template=self.template,
            loss_on=self.loss_on,
            cutoff=self.cutoff,
        )

    def cells(self) -> Iterator[Cell]:
        """Every run, a seed after the other."""
        for seed, strength, rank, rate in product(self.seeds, self.strengths, self.ranks, self.lrs):
            yield Cell(rank, strength, rate, seed, self.read_at)
        for seed, rate in product(self.seeds, self.full_lrs):
            yield Cell(None, None, rate, seed, self.read_at)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    cli.run(lambda: run(cli.parse(Config, argv, description=(__doc__ or "").split("\n", 1)[0])))


def run(config: Config) -> None:
    """Do every run that the folder lacks, then judge all that it has."""
    takeovers = horizons.read_takeovers(config.regime) if config.regime else []
    cells = list(config.cells())
    trainings = {cell: config.training(cell) for cell in cells}
    split = draw_records(
        config.data,
        held_out=config.held_out,
        train_records=config.train_records,
        seed=config.data_seed,
        config=config.reading,
    )
    located = {config.model: llama.locate(config.model)}
    grows = ("ranks", "strengths", "lrs", "full_lrs", "seeds", "read_at", "data", "reading", "regime", "out")
    identity = {name: value for name, value in asdict(config).items() if name not in grows}
    identity |= {"records": split.summary, "model_sha256": located[config.model].sha256}
    extra = {"units": UNITS, "device": devices.describe(devices.pick(1))}
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=located.values())
    bench = Workbench(trainings[cells[0]], split, {}, located, scoring=Scoring("label", None))
    cli.tell(bench.open(config.model))
    prompts.tell(split.source, split.source.template(config.template))
    prompts.keep(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    tokens, answers = readings.token_counts(bench)
    names = pd.DataFrame([(source, index) for source, index, _ in split.held_out], columns=["source", "index"])
    folder.write_frame(names.assign(tokens=tokens, answer_tokens=answers), "records.csv")

    def work(cell: Cell, _: Path) -> dict[str, Any]:
        return asdict(readings.read_run(bench, trainings[cell], cell.read_at))

    run_cells(cells, work, folder, title="runs", words=lambda value: said(value, tokens))
    runs = [horizons.run_of(one.cell, one.value) for one in finished(folder.path).values()]
    report(folder, runs, tokens, answers, takeovers, config.warmup)
    folder.finish()


def report(
    folder: RunFolder,
    runs: Sequence[horizons.Run],
    tokens: Sequence[int],
    answers: Sequence[int],
    takeovers: Sequence[float],
    warmup: int,
) -> None:
    """Judge the runs, write the tables and print the answer."""
    folder.write_frame(horizons.table(runs, tokens, answers), "results.csv")
    steps = sorted({one.step for run in runs for one in run.read.readings})
    curves = {step: horizons.curves(runs, tokens, step) for step in steps}
    best = pd.concat([pd.DataFrame(), *(horizons.bests(found, step) for step, found in curves.items())])
    if best.empty:
        tables.print_text(f"No rank and strength has three rates yet; {len(runs)} runs are in {folder.path}")
        return
    folder.write_frame(best, "best.csv")
    rows = [
        (row["step"], *size(row), f"{row['best_rate']:.3g}", f"{row['best_loss']:.4f}", row["edge"] or "")
        for row in frames.rows(best)
    ]
    tables.print_table(
        "Best rates (parabola through the least three)",
        ["steps", "rank", "gamma r", "rate", "loss", "edge"],
        rows,
        left=0,
    )
    full = pd.concat([pd.DataFrame(), *(horizons.beside_full(found, step) for step, found in curves.items())])
    if not full.empty:
        folder.write_frame(full, "full.csv")
        heads = ["steps", "rank", "gamma r", "best rate over full's", "verdict"]
        beside = [(row["step"], *size(row), f"{row['ratio']:.3g}", row["verdict"]) for row in frames.rows(full)]
        tables.print_table("Beside full fine-tuning", heads, beside, left=0)
    if not takeovers:
        tables.print_text(f"{len(runs)} runs are in {folder.path}; --regime gives the law beside the exponents")
        return
    found = pd.concat(
        [horizons.exponents(one, step, takeovers=takeovers, warmup=warmup) for step, one in curves.items()]
    )
    if found.empty:
        tables.print_text(f"{len(runs)} runs are in {folder.path}; no two of their best rates can be compared yet")
        return
    folder.write_frame(found, "exponents.csv")
    lines = [
        (
            row["step"],
            f"{OVER[row['over']]} {row['at']:g}",
            f"{row['exponent']:+.2f} ± {row['half_width']:.2f}",
            f"{row['law_low']:+.2f} to {row['law_high']:+.2f}",
            row["verdict"],
        )
        for row in frames.rows(found)
    ]
    heads = ["steps", "best rate against", "exponent, 95%", "the law's", "verdict"]
    tables.print_table("How the best rate moves", heads, lines, left=2)
    count = found["verdict"].value_counts().to_dict()
    words = ", ".join(f"{name} {count[name]} times" for name in ("agrees", "contradicts", "undecided") if name in count)
    tables.print_text(f"The law against {len(runs)} runs: {words}. They are in {folder.path}")


def size(row: Mapping[str, Any]) -> tuple[str, str]:
    """Rank and gamma r in words; full fine-tuning has neither."""
    return ("full", "") if row["rank"] is None else (str(row["rank"]), f"{row['strength']:g}")


def said(found: dict[str, Any], tokens: Sequence[int]) -> str:
    """The losses of a run's readings, in a line."""
    losses = [f"{mean_per_token(one['losses'], tokens).value:.4f} at {one['step']}" for one in found["readings"]]
    if found["diverged_at"] is not None:
        losses.append(f"diverged at {found['diverged_at']}")
    return ", ".join(losses)


if __name__ == "__main__":
    main(sys.argv[1:])
