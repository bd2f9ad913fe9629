"""The learning rate that trains best, against the rank, for each scaling rule.

    python -m sims.lr_transfer
    python -m sims.lr_transfer --matrix FOLDER

The first is a teacher and student over a full grid of rates, ranks, rules and optimizers, the second the same of a real
model's runs, from sims.rank_sweep. A rule transfers where the best rate does not move with the rank. At the largest
rank the best losses of two rules are compared, each at its own best rate: a difference that is left is more than a
shift of the rate.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.rules import alpha_at, check_list, check_ranks
from rora_theory.scaling import check_positive, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.rate_curves import (
    Comparison,
    Curve,
    best_rates,
    compare,
    comparison,
    paired_losses,
    pairs,
    rate_slopes,
)
from rora_theory.sweep import trained_runs
from rora_theory.toy import dynamics, ensemble
from rora_theory.toy.dynamics import ProblemConfig
from sims.common import cli, devices, scalings, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME = "lr_transfer"
COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "rank", "scaling", "learning_rate", "seed", "loss_train", "loss_held_out",
)  # fmt: skip
BEST_COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "rank", "best_rate", "log2_error", "best_loss", "best_loss_error", "seeds",
    "error_over", "edge",
)  # fmt: skip
SLOPE_COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "ranks", "slope", "standard_error", "half_width", "verdict", "signal",
    "cross-talk", "A moves", "nearest",
)  # fmt: skip
UNITS = {
    "loss": "teacher and student: squared error / 2, summed over outputs, averaged over inputs, after the last step; "
    "a real model's: nats a token on held-out records",
    "trained": "both factors, or B alone with A frozen",
    "log2_error": "standard error of log2 of the best rate",
    "half_width": "half of the 95% interval, by Student's t; in comparison.json with what the grid may hide",
    "edge": "the best rate is the grid's lowest or highest: the true one may lie beyond; left out of slopes",
    "signal, cross-talk, A moves": "predicted slopes, rora_theory.stats.rate_optimum",
}


@dataclass(frozen=True)
class Config:
    """What to train. Lists are separated by spaces."""

    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """ranks of the adapter"""
    rules: tuple[str, ...] = ("lora", "rora", "0.25")
    """scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[dynamics.Optimizer, ...] = ("sgd", "adam")
    """sgd, momentum, adam or adamw"""
    freeze_control: bool = True
    """train B alone too, with A frozen"""
    adam_rates: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-26, 7))
    """learning rates of adam and adamw, three or more"""
    sgd_rates: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-14, 22))
    """learning rates of sgd, and ten times those of momentum; the default grid has every rule's best step at ranks
    that are powers of two times the reference rank"""
    steps: int = 100
    """updates, each on all training inputs"""
    seeds: int = 12
    """number of problems and adapters, 2 or more"""
    gamma: float = 1.0
    """scaling of every rule at the reference rank"""
    reference_rank: int = 4
    """rank at which the rules meet"""
    judge: Literal["held_out", "train"] = "held_out"
    """which loss decides"""
    model: dynamics.Model = "linear"
    """linear or mlp"""
    init: Init = "kaiming_uniform"
    """law of A"""
    p_in: int = 128
    """inputs of the model"""
    hidden: int = 64
    """hidden units of the mlp"""
    p_out: int = 16
    """outputs of the model"""
    samples: int = 256
    """training inputs"""
    held_out: int = 256
    """held-out inputs"""
    overlap: float = 0.3
    """overlap of any two inputs, from 0 to 1"""
    teacher_rank: int = 4
    """rank of the change to learn: at most the least rank, or capacity decides"""
    noise: float = 0.1
    """standard deviation of the noise on the targets"""
    matrix: Path | None = None
    """a folder of sims.rank_sweep: analyse its runs and train nothing"""
    matrix_model: str | None = None
    """which of its models, where it has several"""
    matrix_loss: trained_runs.Loss = "validation"
    """its held-out loss on all tokens (validation), or on the answers alone (answer)"""
    seed: int = 0
    """seed of all draws"""
    out: Path | None = None
    """run folder; none is results/lr_transfer/ID"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run."""
    cli.run(lambda: run(cli.parse(Config, argv, description=__doc__ or "")))


def run(config: Config) -> None:
    """Train or read, find the best rates, compare, print."""
    check(config)
    started = time.monotonic()
    if config.matrix is not None:
        cells = trained_runs.read(config.matrix, model=config.matrix_model, loss=config.matrix_loss)
        curves = matrix_curves(cells)
        identity = {"matrix": trained_runs.digest(cells), "loss": config.matrix_loss, "model": config.matrix_model}
        folder = RunFolder.open(NAME, identity, out=config.out, extra={"units": UNITS, "source": config.matrix.name})
        folder.write_rows(COLUMNS, matrix_rows(cells))
        compared = compare_matrix(curves, cells)
    else:
        folder, rows = train(config)
        curves = curves_of(config, rows)
        compared = compare(curves)
    found, slopes = best_rates(curves), rate_slopes(curves)
    folder.write_rows(BEST_COLUMNS, found, "best.csv")
    folder.write_rows(SLOPE_COLUMNS, slopes, "slopes.csv")
    folder.write("comparison.json", json.dumps([one._asdict() for one in compared], indent=2) + "\n")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(found, slopes, compared)
    tables.print_text(f"{len(curves)} curves in {time.monotonic() - started:.1f} s, written to {folder.path}")


def check(config: Config) -> None:
    """Refuse wrong arguments, naming the option.

    Raises:
      InputError: see the options' ranges.
    """
    check_ranks(config.ranks)
    for rule in scalings.parse_rules(config.rules).values():
        alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    check_list("--optimizers", config.optimizers)
    for name, values, accepted in (
        ("optimizers", config.optimizers, dynamics.OPTIMIZERS),
        ("init", (config.init,), INITS),
    ):
        for value in values:
            if value not in accepted:
                raise InputError(f"--{name} has {value!r}; accepted are {', '.join(accepted)}")
    for name in ("adam_rates", "sgd_rates"):
        option = name.replace("_", "-")
        check_list(f"--{option}", getattr(config, name), fewest=3)
        for value in getattr(config, name):
            check_positive(f"--{option}", value)
    cli.check_integers(config, seeds=2, steps=1)
    check_seed(config.seed, "--seed")
    problem(config)


def problem(config: Config) -> ProblemConfig:
    """The problem's configuration."""
    names = ("model", "p_in", "hidden", "p_out", "samples", "held_out", "overlap", "teacher_rank", "noise")
    return ProblemConfig(**{name: getattr(config, name) for name in names})


class Cell(NamedTuple):
    """One compiled call: all seeds and rates."""

    optimizer: dynamics.Optimizer
    trained: str
    rank: int
    rule: str


def grid(config: Config) -> Iterator[Cell]:
    """All cells."""
    for optimizer in config.optimizers:
        for trained in ("both", "B") if config.freeze_control else ("both",):
            for rank in sorted(config.ranks):
                for rule in config.rules:
                    yield Cell(optimizer, trained, rank, rule)


def rates_of(config: Config, optimizer: str) -> np.ndarray:
    """The grid of an optimizer, ascending."""
    if optimizer in ("adam", "adamw"):
        return np.sort(config.adam_rates)
    return np.sort(config.sgd_rates) / (10 if optimizer == "momentum" else 1)


def train(config: Config) -> tuple[RunFolder, list[dict[str, Any]]]:
    """The run folder, and the losses of every cell, trained or read from an earlier part of the run."""
    places = devices.pick(1)
    left_out = ("out", "matrix", "matrix_model", "matrix_loss", "judge")
    identity = {name: value for name, value in asdict(config).items() if name not in left_out}
    extra = {"units": UNITS, "device": devices.describe(places), "judge": config.judge}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra)
    kept, rows = Cells(folder), []
    todo, written = list(grid(config)), time.monotonic()
    with progress_bar("rates", len(todo), fields="{cell}") as bar:
        for cell in todo:
            label = f"{cell.optimizer}, {cell.rule}, r = {cell.rank}"
            bar.advance(0, cell=label)
            rows += kept.do(" ".join(map(str, cell)), partial(cell_rows, config, cell))
            if time.monotonic() - written > 5:
                folder.write_rows(COLUMNS, rows)
                written = time.monotonic()
            bar.advance(1, cell=label)
    folder.write_rows(COLUMNS, rows)
    return folder, rows


def cell_rows(config: Config, cell: Cell) -> list[dict[str, Any]]:
    """Losses of a cell, a row a seed and rate; not finite where the run diverged."""
    rule = scalings.parse_rules(config.rules)[cell.rule]
    alpha = alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    scaling = scaling_factor(rule, alpha=alpha, rank=cell.rank)
    adapters, problems = ensemble.draw(
        problem(config), rank=cell.rank, seeds=config.seeds, seed=config.seed, init=config.init
    )
    rates = rates_of(config, cell.optimizer)
    loss_train, held_out = ensemble.losses_at_rates(
        adapters,
        problems,
        scaling=scaling,
        rates=rates,
        optimizer=cell.optimizer,
        steps=config.steps,
        frozen="A" if cell.trained == "B" else None,
    )
    frame = {"optimizer": cell.optimizer, "trained": cell.trained, "rule": cell.rule, "kappa": exponent(rule)}
    frame |= {"rank": cell.rank, "scaling": float(f"{scaling:.6g}")}
    return [
        frame
        | {"learning_rate": float(rate), "seed": seed}
        | {
            "loss_train": float(f"{loss_train[seed, index]:.5g}"),
            "loss_held_out": float(f"{held_out[seed, index]:.5g}"),
        }
        for seed in range(config.seeds)
        for index, rate in enumerate(rates)
    ]


def curves_of(config: Config, rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """Curves of the controlled problem."""
    table = {(r["optimizer"], r["trained"], r["rank"], r["rule"], r["seed"], r["learning_rate"]): r for r in rows}
    curves = []
    for cell in grid(config):
        rates = rates_of(config, cell.optimizer)
        kappa = exponent(scalings.parse_rules(config.rules)[cell.rule])
        group = [[table[(*cell, seed, float(rate))] for rate in rates] for seed in range(config.seeds)]
        losses = np.array([[row[f"loss_{config.judge}"] for row in line] for line in group])
        scaling = group[0][0]["scaling"]
        curves.append(Curve(cell.optimizer, cell.trained, cell.rule, kappa, cell.rank, scaling, rates, losses))
    return curves


def matrix_curves(cells: Sequence[trained_runs.Run]) -> list[Curve]:
    """Curves of a real model's runs: the seeds that ran at every rate that any of them ran at."""
    curves = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        kappa = trained_runs.kappa_of(own)
        for rank in sorted({cell.rank for cell in own}):
            by_seed: dict[int, dict[float, trained_runs.Run]] = {}
            for cell in own:
                if cell.rank == rank:
                    by_seed.setdefault(cell.seed, {})[cell.rate] = cell
            rates = sorted({rate for runs in by_seed.values() for rate in runs})
            whole = [runs for runs in by_seed.values() if len(runs) == len(rates)]
            if len(rates) < 3 or not whole:
                continue
            losses = np.array([[runs[rate].loss for rate in rates] for runs in whole])
            resampled = trained_runs.bootstrap({rate: [runs[rate] for runs in whole] for rate in rates})
            gamma = whole[0][rates[0]].gamma
            curves.append(Curve("adamw", "both", method, kappa, rank, gamma, np.array(rates), losses, resampled))
    if not curves:
        raise InputError("no method and rank has a seed that ran at three or more rates; accepted is such a matrix")
    return curves


def matrix_rows(cells: Sequence[trained_runs.Run]) -> list[dict[str, Any]]:
    """The runs that were read, in this experiment's columns."""
    kappas = {
        method: trained_runs.kappa_of([cell for cell in cells if cell.method == method])
        for method in dict.fromkeys(cell.method for cell in cells)
    }
    return [
        {"optimizer": "adamw", "trained": "both", "rule": cell.method, "kappa": kappas[cell.method]}
        | {"rank": cell.rank, "scaling": cell.gamma, "learning_rate": cell.rate, "seed": cell.seed}
        | {"loss_train": None, "loss_held_out": cell.loss}
        for cell in cells
    ]


def compare_matrix(curves: Sequence[Curve], cells: Sequence[trained_runs.Run]) -> list[Comparison]:
    """Rules against each other at the largest rank, at the grid's rate of least mean loss, record by record.

    Seeds that ran at both rates are averaged; with two or more of them the error is over seeds or over records,
    whichever is larger.
    """
    found = []
    for first, second in pairs(curves):
        rates = [curve.rates[int(np.argmin(np.mean(curve.losses, axis=0)))] for curve in (first, second)]
        groups = [
            {c.seed: c for c in cells if (c.method, c.rank, c.rate) == (curve.rule, curve.rank, rate)}
            for curve, rate in zip((first, second), rates, strict=True)
        ]
        seeds = sorted(set(groups[0]) & set(groups[1]))
        if not seeds:
            continue
        a, b = ([group[seed] for seed in seeds] for group in groups)
        (left, tokens), (right, _) = trained_runs.stacked(a), trained_runs.stacked(b)
        losses = paired_losses(
            np.array([cell.loss for cell in a]),
            np.array([cell.loss for cell in b]),
            None if left is None or right is None else (left, right),
            tokens,
        )
        found.append(comparison(first, second, losses))
    return found


def report(found: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]], compared: Sequence[Comparison]) -> None:
    """Print best rates, slopes and comparisons."""
    ranks = sorted({row["rank"] for row in found})
    table = {(row["optimizer"], row["trained"], row["rule"], row["rank"]): row for row in found}
    lines = list(dict.fromkeys(key[:3] for key in table))
    tables.print_table(
        "Best learning rate (parabola through the least three), × / ÷ half of the 95% interval; < > at the grid's edge",
        ["optimizer", "trained", "rule", *[f"r = {rank}" for rank in ranks]],
        [[*line, *[_rate(table.get((*line, rank))) for rank in ranks]] for line in lines],
        left=3,
    )
    tables.print_table(
        "Slope in the rank of those best rates, ± half of the 95% interval, beside what would keep the step's size",
        ["optimizer", "trained", "rule", "slope", "verdict", "signal", "cross-talk", "A moves", "nearest"],
        [
            [
                row["optimizer"],
                row["trained"],
                row["rule"],
                f"{row['slope']:+.3f} ± {row['half_width'] or math.nan:.2g}",
                {"flat": "transfers"}.get(row["verdict"], row["verdict"]),
                *[f"{row[name]:+.2f}" if name in row else "" for name in ("signal", "cross-talk", "A moves")],
                row["nearest"],
            ]
            for row in slopes
        ],
        left=3,
    )
    tables.print_table(
        "The largest rank, each rule at its own best rate; ± half of the 95% interval and what the grid may hide",
        ["rules", "trained", "verdict", "rank", "rates' ratio", "losses"],
        [
            [
                f"{one.first}, {one.second}",
                f"{one.optimizer}, {one.trained}",
                one.verdict,
                one.rank,
                f"{one.ratio:.3g}",
                f"{one.first_loss:.4g}, {one.second_loss:.4g}",
            ]
            for one in compared
        ],
        left=3,
    )


def _rate(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    mark = {"low": "<", "high": ">"}.get(row["edge"], "")
    error = ""
    if row["log2_error"] is not None:
        seeds = row["seeds"] if row["error_over"] == "seeds" else trained_runs.BOOTSTRAPS
        error = f" ({2 ** Estimate(0.0, row['log2_error'], seeds, row['error_over']).half_width():.2f})"
    return f"{mark}{row['best_rate']:.3g}{error}"


if __name__ == "__main__":
    main(sys.argv[1:])
