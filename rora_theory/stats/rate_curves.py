"""Curves of loss against learning rate: the best rate of each, its slope in the rank, and rules against each other.

A rule transfers where its best rate does not move with the rank. Two rules are compared each at its own best rate: a
difference that is left is more than a shift of the rate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory import frames
from rora_theory.optimizers import FAMILY
from rora_theory.stats import slopes
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.paired import mean_per_token
from rora_theory.stats.rate_optimum import Best, best_rate, grid_gap, predicted_slopes
from rora_theory.stats.slopes import SeedFit
from rora_theory.theory.laws import scaling_power

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "rank", "scaling", "learning_rate", "seed", "loss_train", "loss_held_out",
)  # fmt: skip
"""Of a table of losses, which curves are made from."""
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

EQUAL = 0.01
"""Relative difference of two losses that does not count: they are equal where the whole interval lies within it."""

EDGE_SHARE = 0.025
"""Share of resampled curves with their best rate at the grid's end from which the end counts as reached."""

RECORDS = "held-out records"


@dataclass(frozen=True)
class Curve:
    """Loss against rate of one rank.

    Attributes:
      optimizer, trained, rule, kappa, rank, scaling: whose.
      rates: ascending.
      losses: of the seeds that ran at every rate.
      resampled: curves over resampled records, where a single seed gives no spread; None without.
    """

    optimizer: str
    trained: str
    rule: str
    kappa: float
    rank: int
    scaling: float
    rates: Float[np.ndarray, " rates"]
    losses: Float[np.ndarray, "seeds rates"]
    resampled: Float[np.ndarray, "draws rates"] | None = None

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

    def grid_error(self) -> float:
        """Mean over seeds or draws of what the grid may hide below `least`, see `rate_optimum.grid_gap`."""
        return float(np.mean([grid_gap(self.rates, losses) for losses in self._spreading]))

    def estimate(self, values: Sequence[float] | np.ndarray) -> Estimate:
        """Mean over seeds of a figure of `bests`; of one seed the mean over its draws, with the error over records."""
        values = np.asarray(values, np.float64)
        if not self._by_draws:
            return over_seeds(values)
        # The spread of bootstrap draws is the standard error itself.
        return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)), len(values), RECORDS)


def best_rates(curves: Sequence[Curve]) -> "pd.DataFrame":
    """The best rate and loss of every curve, a row each: `BEST_COLUMNS`, in units of `UNITS`."""
    rows = []
    for curve in curves:
        bests = curve.bests()
        logs, losses = curve.estimate(np.log2([b.rate for b in bests])), curve.estimate(curve.least())
        rows.append(
            {"optimizer": curve.optimizer, "trained": curve.trained, "rule": curve.rule, "kappa": curve.kappa}
            | {"rank": curve.rank, "best_rate": float(f"{2**logs.value:.5g}")}
            | {"log2_error": float(f"{logs.error:.2g}") if logs.has_error else None}
            | {"best_loss": float(f"{losses.value:.6g}")}
            | {"best_loss_error": float(f"{losses.error:.2g}") if losses.has_error else None}
            | {"seeds": len(curve.losses), "edge": curve.edge}
            | {"error_over": logs.over}
        )
    return frames.of(rows, BEST_COLUMNS)


def rate_slopes(curves: Sequence[Curve]) -> "pd.DataFrame":
    """Slope of the best rate against the rank of every line, beside the predictions: `SLOPE_COLUMNS`."""
    rows = []
    for line in dict.fromkeys(curve.line for curve in curves):
        kept = [c for c in curves if c.line == line and not c.edge]
        if len(kept) < 2 or len({len(curve.bests()) for curve in kept}) > 1:
            continue
        x = np.log([curve.rank for curve in kept])
        lever = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
        logs = np.log([[best.rate for best in curve.bests()] for curve in kept])
        slope = kept[0].estimate(lever @ logs)
        optimizer, kappa = line[0], line[3]
        predicted = predicted_slopes(optimizer, kappa)  # type: ignore[arg-type]
        nearest = min(predicted, key=lambda name: abs(predicted[name] - slope.value))
        if not slope.has_error or abs(predicted[nearest] - slope.value) > slope.half_width() + slopes.BAND:
            nearest = ""
        row = dict(zip(("optimizer", "trained", "rule", "kappa"), line, strict=True))
        row |= {"ranks": " ".join(str(curve.rank) for curve in kept), "slope": float(f"{slope.value:.4f}")}
        row |= {"standard_error": float(f"{slope.error:.2g}") if slope.has_error else None}
        row |= {"half_width": float(f"{slope.half_width():.2g}") if slope.has_error else None}
        row |= {"verdict": slopes.trend(SeedFit.of(slope)), **predicted, "nearest": nearest}
        rows.append(row)
    return frames.of(rows, SLOPE_COLUMNS)


def slopes_in_words(slopes: "pd.DataFrame") -> str:
    """Of how many lines the best rate keeps still when the rank changes, and of which."""
    flat = [
        f"{row['optimizer']} {row['rule']} ({row['trained']})"
        for row in frames.rows(slopes)
        if row["verdict"] == "flat"
    ]
    if slopes.empty:
        return "No line has two ranks whose best rate is inside the grid: more rates tell more."
    which = f": {', '.join(flat)}" if flat else ""
    return f"The best rate does not move with the rank in {len(flat)} of {len(slopes)} lines{which}."


class Comparison(NamedTuple):
    """Two rules at one rank, each at its own best rate.

    Attributes:
      optimizer, trained, rank: where.
      first, second: the rules.
      ratio, ratio_log2_error: best rate of the first over the second's.
      scaling_ratio: gamma^p of the second over the first's, p = 2 under SGD and 1 under Adam: what the ratio would be
        if the first step alone counted.
      first_loss, second_loss: least measured ones.
      difference, standard_error, half_width: of the losses, first less second, paired; half of the 95% interval, by
        Student's t, and the grid's part.
      error_over: what the error is over.
      verdict: in words.
      grid_error: the grid's part of the half width: the larger bound of what either curve may hide between its rates;
        None where there is none.
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
    grid_error: float | None = None


def compare_rules(curves: Sequence[Curve]) -> list[Comparison]:
    """Rules against each other at the largest rank, seed by seed."""
    found = []
    for first, second in pairs(curves):
        found.append(comparison(first, second, first.estimate(first.least() - second.least())))
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


def paired_losses(
    first: Float[np.ndarray, " seeds"],
    second: Float[np.ndarray, " seeds"],
    records: tuple[Float[np.ndarray, " records"], Float[np.ndarray, " records"]] | None = None,
    tokens: Float[np.ndarray, " records"] | None = None,
) -> Estimate:
    """Loss of the first less the second, with the error over seeds or over held-out records, whichever is larger.

    For one seed and no record there is no error.

    Args:
      first, second: losses a token of the same seeds.
      records: summed loss of every held-out record, averaged over those seeds, of the first and the second; or None.
      tokens: of each record.
    """
    by_seeds = over_seeds(first - second)
    if records is None or tokens is None:
        return by_seeds
    over_records = mean_per_token((records[0] - records[1]).tolist(), tokens.astype(int).tolist())
    by_records = replace(over_records, value=by_seeds.value, over=RECORDS)
    return by_records if not by_seeds.has_error or by_records.half_width() > by_seeds.half_width() else by_seeds


def comparison(first: Curve, second: Curve, losses: Estimate) -> Comparison:
    """Two curves of one rank, with the difference of their least losses.

    Args:
      first, second: of two rules.
      losses: loss of the first less the second, at the best rates.
    """
    a, b = first.bests(), second.bests()
    logs = [np.log2([best.rate for best in part]) for part in (a, b)]
    paired = len(a) == len(b) > 1
    ratio = first.estimate(logs[0] - logs[1]) if paired else over_seeds(logs[0].mean(keepdims=True) - logs[1].mean())
    grid = max(first.grid_error(), second.grid_error())
    loss_a, loss_b = (float(np.mean(curve.least())) for curve in (first, second))
    half_width = losses.half_width() + grid
    relative, half = losses.value / loss_b, half_width / loss_b
    if not losses.has_error:
        verdict = "not settled: one seed, no losses a record"
    elif math.isinf(grid):
        verdict = "undecided: a best rate lies between two that diverged"
    elif abs(relative) > half:
        better = first.rule if losses.value < 0 else second.rule
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
        float(f"{2**ratio.value:.4g}"),
        float(f"{ratio.error:.2g}") if ratio.has_error else None,
        float(f"{(second.scaling / first.scaling) ** scaling_power(FAMILY[first.optimizer]):.6g}"),  # type: ignore[index]
        loss_a,
        loss_b,
        losses.value,
        losses.error if losses.has_error else None,
        half_width if math.isfinite(half_width) else None,
        losses.over,
        verdict,
        grid if math.isfinite(grid) else None,
    )
