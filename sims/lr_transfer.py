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

import jax
import jax.numpy as jnp
import numpy as np

from rora_theory.advice.setting import FAMILY
from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.scaling import check_positive, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats import slopes
from rora_theory.stats.rate_optimum import Best, best_rate, predicted_slopes
from rora_theory.stats.slopes import SeedFit
from rora_theory.sweep import trained_runs
from rora_theory.theory.laws import scaling_power
from rora_theory.toy import dynamics
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
    "edge": "the best rate is the grid's lowest or highest: the true one may lie beyond; left out of slopes",
    "signal, cross-talk, A moves": "predicted slopes, rora_theory.stats.rate_optimum",
}
EQUAL = 0.01
"""Relative difference of two losses that does not count: they are equal where the whole interval lies within it."""

EDGE_SHARE = 0.025
"""Share of resampled curves with their best rate at the grid's end from which the end counts as reached."""

OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}


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


@dataclass(frozen=True)
class Curve:
    """Loss against rate of one rank.

    Attributes:
      optimizer, trained, rule, kappa, rank, scaling: whose.
      rates: ascending.
      losses: [seeds, rates] of the seeds that ran at every rate.
      resampled: [draws, rates], where a single seed gives no spread; None without.
    """

    optimizer: str
    trained: str
    rule: str
    kappa: float
    rank: int
    scaling: float
    rates: np.ndarray
    losses: np.ndarray
    resampled: np.ndarray | None = None

    @property
    def line(self) -> tuple[str, str, str, float]:
        """The curves of one line over ranks share this."""
        return (self.optimizer, self.trained, self.rule, self.kappa)

    @property
    def by_seeds(self) -> bool:
        """Whether errors are over seeds."""
        return len(self.losses) > 1

    @property
    def _by_draws(self) -> bool:
        """Whether errors are over resampled curves."""
        return not self.by_seeds and self.resampled is not None

    @property
    def _spreading(self) -> np.ndarray:
        """[draws or seeds, rates]: the curves whose spread gives the errors."""
        return self.resampled if self._by_draws else self.losses  # type: ignore[return-value]

    def bests(self) -> list[Best]:
        """Of each seed, or of each draw where there is one seed; of that seed where there are no draws."""
        return [best_rate(self.rates, losses) for losses in self._spreading]

    @property
    def edge(self) -> str:
        """Where the best rate is at the grid's end: at any seed, or in more draws than a 95% interval leaves out."""
        bests = self.bests()
        ends = [best.edge for best in bests if best.edge]
        least = EDGE_SHARE * len(bests) if self._by_draws else 1
        return max(ends, key=ends.count) if ends and len(ends) >= least else ""

    def least(self) -> np.ndarray:
        """The least measured loss of each seed or draw: a parabola's vertex undershoots."""
        losses = self._spreading
        return np.min(np.where(np.isfinite(losses), losses, np.inf), axis=1)

    def spread(self, values: Sequence[float] | np.ndarray) -> SeedFit:
        """Mean and standard error of a figure of `bests`."""
        values = np.asarray(values, np.float64)
        if not self._by_draws:
            return slopes.over_seeds(values)
        # The spread of bootstrap draws is the standard error itself.
        return SeedFit(float(np.mean(values)), float(np.std(values, ddof=1)), len(values))


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
    found, slopes = best_rows(curves), slope_rows(curves)
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
    scalings.check_ranks(config.ranks)
    for rule in scalings.parse_rules(config.rules).values():
        scalings.alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    scalings.check_list("optimizers", config.optimizers)
    for name, values, accepted in (
        ("optimizers", config.optimizers, dynamics.OPTIMIZERS),
        ("init", (config.init,), INITS),
    ):
        for value in values:
            if value not in accepted:
                raise InputError(f"--{name} has {value!r}; accepted are {', '.join(accepted)}")
    for name in ("adam_rates", "sgd_rates"):
        option = name.replace("_", "-")
        scalings.check_list(option, getattr(config, name), fewest=3)
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
    alpha = scalings.alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    scaling, setting = scaling_factor(rule, alpha=alpha, rank=cell.rank), problem(config)
    keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(jax.random.key(config.seed), s)))(
        np.arange(config.seeds)
    )
    drawn = jax.vmap(lambda key: dynamics.draw_problem(key, setting))(keys[:, 0])
    adapters = jax.vmap(lambda key: dynamics.draw_adapters(key, setting, rank=cell.rank, init=config.init))(keys[:, 1])
    rates = rates_of(config, cell.optimizer)
    losses = dynamics.final_losses(
        adapters,
        drawn,
        scaling,
        jnp.asarray(rates, jnp.float32),
        optimizer=cell.optimizer,
        steps=config.steps,
        frozen="A" if cell.trained == "B" else None,
    )
    loss_train, held_out = (np.asarray(part, np.float64) for part in losses)
    # A loss that is finite and far above its start is no point of a curve either.
    start = np.asarray(jax.vmap(dynamics.start_loss)(drawn), np.float64)[:, None]
    gone = ~(loss_train <= dynamics.DIVERGED * start)
    loss_train, held_out = (np.where(gone, np.inf, part) for part in (loss_train, held_out))
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


def best_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The best rate and loss of every curve."""
    rows = []
    for curve in curves:
        bests = curve.bests()
        logs, losses = curve.spread(np.log2([b.rate for b in bests])), curve.spread(curve.least())
        known = curve.by_seeds or curve.resampled is not None
        rows.append(
            {"optimizer": curve.optimizer, "trained": curve.trained, "rule": curve.rule, "kappa": curve.kappa}
            | {"rank": curve.rank, "best_rate": float(f"{2**logs.slope:.5g}")}
            | {"log2_error": float(f"{logs.standard_error:.2g}") if known else None}
            | {"best_loss": float(f"{losses.slope:.6g}")}
            | {"best_loss_error": float(f"{losses.standard_error:.2g}") if known else None}
            | {"seeds": len(curve.losses), "edge": curve.edge}
            | {"error_over": "seeds" if curve.by_seeds else "held-out records" if known else ""}
        )
    return rows


def slope_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Slope of the best rate against the rank of every line, beside the predictions."""
    rows = []
    for line in dict.fromkeys(curve.line for curve in curves):
        kept = [c for c in curves if c.line == line and not c.edge]
        if len(kept) < 2 or len({len(curve.bests()) for curve in kept}) > 1:
            continue
        x = np.log([curve.rank for curve in kept])
        lever = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
        logs = np.log([[best.rate for best in curve.bests()] for curve in kept])
        fit = kept[0].spread(lever @ logs)
        known = kept[0].by_seeds or kept[0].resampled is not None
        optimizer, kappa = line[0], line[3]
        predicted = predicted_slopes(optimizer, kappa)  # type: ignore[arg-type]
        nearest = min(predicted, key=lambda name: abs(predicted[name] - fit.slope))
        if not known or abs(predicted[nearest] - fit.slope) > fit.half_width() + slopes.BAND:
            nearest = ""
        row = dict(zip(("optimizer", "trained", "rule", "kappa"), line, strict=True))
        row |= {"ranks": " ".join(str(curve.rank) for curve in kept), "slope": float(f"{fit.slope:.4f}")}
        row |= {"standard_error": float(f"{fit.standard_error:.2g}") if known else None}
        row |= {"half_width": float(f"{fit.half_width():.2g}") if known else None}
        row |= {"verdict": slopes.judge(fit) if known else "undecided", **predicted, "nearest": nearest}
        rows.append(row)
    return rows


class Comparison(NamedTuple):
    """Two rules at one rank, each at its own best rate.

    Attributes:
      optimizer, trained, rank: where.
      first, second: the rules.
      ratio, ratio_log2_error: best rate of the first over the second's.
      scaling_ratio: gamma^p of the second over the first's, p = 2 under SGD and 1 under Adam: what the ratio would be
        if the first step alone counted.
      first_loss, second_loss: least measured ones.
      difference, standard_error, half_width: of the losses, first less second, paired; half of the 95% interval.
      error_over: what the error is over.
      verdict: in words.
    """

    optimizer: str
    trained: str
    rank: int
    first: str
    second: str
    ratio: float
    ratio_log2_error: float | None
    scaling_ratio: float
    first_loss: float
    second_loss: float
    difference: float
    standard_error: float | None
    half_width: float | None
    error_over: str
    verdict: str


def compare(curves: Sequence[Curve]) -> list[Comparison]:
    """Rules against each other at the largest rank, seed by seed."""
    found = []
    for first, second in pairs(curves):
        losses = first.spread(first.least() - second.least())
        found.append(_comparison(first, second, losses, "seeds"))
    return found


def pairs(curves: Sequence[Curve]) -> Iterator[tuple[Curve, Curve]]:
    """At the largest rank that both have, every rule with those after it."""
    for key in dict.fromkeys((curve.optimizer, curve.trained) for curve in curves):
        own = [curve for curve in curves if (curve.optimizer, curve.trained) == key]
        rules = list(dict.fromkeys(curve.rule for curve in own))
        for index, first in enumerate(rules):
            for second in rules[index + 1 :]:
                both = {c.rank for c in own if c.rule == first} & {c.rank for c in own if c.rule == second}
                if both:
                    at = {c.rule: c for c in own if c.rank == max(both)}
                    yield at[first], at[second]


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
        over = slopes.over_seeds(np.array([p.loss - q.loss for p, q in zip(a, b, strict=True)]))
        (left, tokens), (right, _) = trained_runs.stacked(a), trained_runs.stacked(b)
        fit, source = over, "seeds" if len(seeds) > 1 else ""
        if left is not None and right is not None and tokens is not None:
            rest = (left - right) - over.slope * tokens  # a ratio of sums, to first order
            by_record = float(np.sqrt(len(rest) / (len(rest) - 1) * np.sum(rest**2)) / np.sum(tokens))
            by_records = SeedFit(over.slope, by_record, len(rest))
            if not source or by_records.half_width() > fit.half_width():
                fit, source = by_records, "held-out records"
        found.append(_comparison(first, second, fit, source))
    return found


def _comparison(first: Curve, second: Curve, losses: SeedFit, source: str) -> Comparison:
    a, b = first.bests(), second.bests()
    logs = [np.log2([best.rate for best in part]) for part in (a, b)]
    paired = len(a) == len(b) > 1
    ratio = first.spread(logs[0] - logs[1]) if paired else SeedFit(float(logs[0].mean() - logs[1].mean()), math.inf, 1)
    known = math.isfinite(losses.standard_error)
    loss_a, loss_b = (float(np.mean(curve.least())) for curve in (first, second))
    relative, half = losses.slope / loss_b, losses.half_width() / loss_b
    if not known:
        verdict = "not settled: one seed, no losses a record"
    elif abs(relative) > half:
        better = first.rule if losses.slope < 0 else second.rule
        verdict = f"{better} is better by {abs(relative):.2%} ± {half:.2%}: more than a shift of the rate"
    elif abs(relative) + half <= EQUAL:
        verdict = f"equal to {EQUAL:.0%} ({relative:+.2%} ± {half:.2%}): a shift of the rate"
    else:
        verdict = f"undecided ({relative:+.2%} ± {half:.2%})"
    if first.edge or second.edge:
        verdict += "; a best rate at the grid's edge, so not settled"
    return Comparison(
        first.optimizer,
        first.trained,
        first.rank,
        first.rule,
        second.rule,
        float(f"{2**ratio.slope:.4g}"),
        float(f"{ratio.standard_error:.2g}") if math.isfinite(ratio.standard_error) else None,
        float(f"{(second.scaling / first.scaling) ** scaling_power(FAMILY[first.optimizer]):.6g}"),  # type: ignore[index]
        loss_a,
        loss_b,
        losses.slope,
        losses.standard_error if known else None,
        losses.half_width() if known else None,
        source,
        verdict,
    )


def report(found: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]], compared: Sequence[Comparison]) -> None:
    """Print best rates, slopes and comparisons."""
    ranks = sorted({row["rank"] for row in found})
    table = {(row["optimizer"], row["trained"], row["rule"], row["rank"]): row for row in found}
    lines = list(dict.fromkeys(key[:3] for key in table))
    tables.print_table(
        "Best learning rate, × / ÷ one s.e.; < > at the grid's edge",
        ["optimizer", "trained", "rule", *[f"r = {rank}" for rank in ranks]],
        [[*line, *[_rate(table.get((*line, rank))) for rank in ranks]] for line in lines],
        left=3,
    )
    tables.print_table(
        "Slope of the best rate in the rank, ± s.e., beside what would keep the step's size",
        ["optimizer", "trained", "rule", "slope", "verdict", "signal", "cross-talk", "A moves", "nearest"],
        [
            [
                row["optimizer"],
                row["trained"],
                row["rule"],
                f"{row['slope']:+.3f} ± {row['standard_error'] or math.nan:.2g}",
                {"flat": "transfers"}.get(row["verdict"], row["verdict"]),
                *[f"{row[name]:+.2f}" if name in row else "" for name in ("signal", "cross-talk", "A moves")],
                row["nearest"],
            ]
            for row in slopes
        ],
        left=3,
    )
    tables.print_table(
        "The largest rank, each rule at its own best rate; ± half of the 95% interval",
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
    error = "" if row["log2_error"] is None else f" ({2 ** row['log2_error']:.2f})"
    return f"{mark}{row['best_rate']:.3g}{error}"


if __name__ == "__main__":
    main(sys.argv[1:])
