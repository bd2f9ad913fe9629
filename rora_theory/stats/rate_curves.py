"""Curves of loss against learning rate: the best rate of each, its slope in the rank, and rules against each other.

A rule transfers where its best rate does not move with the rank. Two rules are compared each at its own best rate: a
difference that is left is more than a shift of the rate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.io import frames
from rora_theory.optimizers import FAMILY
from rora_theory.stats import slopes
from rora_theory.stats.estimate import ROUNDING, Estimate, over_seeds
from rora_theory.stats.paired import mean_per_token
from rora_theory.stats.rate_optimum import Best, grid_gap, minima, predicted_slopes, rate_gap
from rora_theory.stats.slopes import SeedFit
from rora_theory.theory.laws import scaling_power

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "rank", "scaling", "learning_rate", "seed", "loss_train", "loss_held_out",
)  # fmt: skip
"""Of a table of losses, which curves are made from."""
BEST_COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "rank", "best_rate", "log2_error", "log2_half_width", "best_loss",
    "best_loss_error", "seeds", "error_over", "edge",
)  # fmt: skip
RATE_SLOPE_COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "ranks", "slope", "standard_error", "half_width", "verdict", "signal",
    "cross-talk", "A moves", "nearest",
)  # fmt: skip
UNITS = {
    "loss": "teacher and student: squared error / 2, summed over outputs, averaged over inputs, after the last step; "
    "a real model's: nats a token on held-out records",
    "trained": "both factors, or B alone with A frozen",
    "log2_error": "standard error of log2 of the best rate; none at an edge, which is a bound",
    "log2_half_width": "half of its 95% interval, by Student's t, and what the grid may hide beside a diverged run",
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
      resampled: of the same seeds over resampled records, the same records for every curve; None without.
      seeds: which; empty numbers them from 0.
    """

    optimizer: str
    trained: str
    rule: str
    kappa: float
    rank: int
    scaling: float
    rates: Float[np.ndarray, " rates"]
    losses: Float[np.ndarray, "seeds rates"]
    resampled: Float[np.ndarray, "draws seeds rates"] | None = None
    seeds: tuple[int, ...] = ()

    @property
    def line(self) -> tuple[str, str, str, float]:
        """The curves of one line over ranks share this."""
        return (self.optimizer, self.trained, self.rule, self.kappa)

    @property
    def by_seed(self) -> dict[int, int]:
        """The place of every seed in ``losses``."""
        return {seed: place for place, seed in enumerate(self.seeds or range(len(self.losses)))}

    def of_seeds(self, seeds: Sequence[int]) -> "Curve":
        """The curve of some of its seeds."""
        places = [self.by_seed[seed] for seed in seeds]
        resampled = None if self.resampled is None else self.resampled[:, places]
        return replace(self, losses=self.losses[places], resampled=resampled, seeds=tuple(seeds))

    def drawn(self) -> "Curve | None":
        """The seeds' mean over resampled records, a draw in place of a seed; None without."""
        if self.resampled is None:
            return None
        return replace(self, losses=self.resampled.mean(axis=1), resampled=None, seeds=())

    @property
    def spread(self) -> "Curve":
        """The curve itself, or where a single seed gives no spread and records do, `drawn`."""
        return (self.drawn() if len(self.losses) == 1 else None) or self

    def bests(self) -> list[Best]:
        """Of each seed."""
        return minima(self.rates, self.losses)

    @property
    def edge(self) -> str:
        """Where the best rate is at the grid's end: at any of several seeds, or in more draws of the records than a 95%
        interval leaves out."""
        drawn = self.drawn()
        ends = [] if drawn is not None and len(self.losses) == 1 else [best.edge for best in self.bests() if best.edge]
        if drawn is not None:
            ends_drawn = [best.edge for best in drawn.bests() if best.edge]
            ends += ends_drawn if len(ends_drawn) >= EDGE_SHARE * len(drawn.losses) else []
        return max(ends, key=ends.count) if ends else ""

    def least(self) -> np.ndarray:
        """The least measured loss of each seed: a parabola's vertex undershoots."""
        return np.min(np.where(np.isfinite(self.losses), self.losses, np.inf), axis=1)

    def grid_error(self) -> float:
        """Mean over seeds, or over the draws of one, of what the grid may hide below `least`, see
        `rate_optimum.grid_gap`."""
        return float(np.mean([grid_gap(self.rates, losses) for losses in self.spread.losses]))

    def rate_error(self) -> float:
        """Mean over seeds, or over the draws of one, of `rate_optimum.rate_gap`: in log2 of the rate."""
        return float(np.mean([rate_gap(self.rates, losses) for losses in self.spread.losses]))


def at_shared_seeds(*curves: Curve) -> tuple[Curve, ...]:
    """The curves at the seeds that all of them have, in one order; none where they share no seed."""
    shared = [seed for seed in curves[0].by_seed if all(seed in curve.by_seed for curve in curves)]
    return tuple(curve.of_seeds(shared) for curve in curves) if shared else ()


def estimate(figure: Callable[..., Sequence[float] | np.ndarray], *curves: Curve) -> Estimate:
    """A figure of curves of the same seeds, with its error over seeds and over held-out records, see `joint`.

    Of one seed it is the mean over the draws of the records, with their spread; where there are none there is no error.

    Args:
      figure: of the curves; gives a value a seed.
      curves: see `at_shared_seeds`.
    """
    by_seeds, drawn = over_seeds(np.asarray(figure(*curves), np.float64)), [curve.drawn() for curve in curves]
    if any(curve is None for curve in drawn):
        return by_seeds
    values = np.asarray(figure(*drawn), np.float64)
    # The spread of bootstrap draws is the standard error itself.
    by_records = Estimate(float(np.mean(values)), float(np.std(values, ddof=1)), len(values), RECORDS)
    return joint(by_seeds, by_records) if by_seeds.has_error else by_records


def joint(by_seeds: Estimate, by_records: Estimate) -> Estimate:
    r"""The mean over seeds with both errors, a over n seeds and b over records.

    All seeds are scored on the same records, so that their spread leaves out what other records would change, and
    :math:`\sqrt{a^2 + b^2}` is the error of both. Its degrees of freedom are Welch and Satterthwaite's,
    :math:`(a^2 + b^2)^2 / (a^4 / (n - 1) + b^4 / (m - 1))`, rounded down. Where its interval is narrower than either
    error's alone, which so few cases can bring about, that one is taken.
    """
    by_records = replace(by_records, value=by_seeds.value)
    if not by_seeds.has_error:
        return by_records
    if not by_records.has_error:  # a single record
        return by_seeds
    # Equal figures have a spread of some 1e-16, which is no second source of error.
    if min(by_seeds.error, by_records.error) <= ROUNDING * max(by_seeds.error, by_records.error):
        return by_seeds if by_seeds.error > by_records.error else by_records
    a, b = by_seeds.error**2, by_records.error**2
    freedom = (a + b) ** 2 / (a**2 / (by_seeds.n - 1) + b**2 / (by_records.n - 1))
    freedom = math.floor(freedom * (1 + ROUNDING))  # 30 degrees may be computed as 29.999...
    both = Estimate(by_seeds.value, math.sqrt(a + b), max(freedom, 1) + 1, f"{by_seeds.over} and {by_records.over}")
    return max((both, by_seeds, by_records), key=Estimate.half_width)


def less(first: Curve, second: Curve) -> Estimate:
    """The least loss of the first less that of the second, of curves of the same seeds."""
    return estimate(lambda a, b: a.least() - b.least(), first, second)


def log2_rates(curve: Curve) -> np.ndarray:
    """log2 of the best rate of each seed."""
    return np.log2([best.rate for best in curve.bests()])


def of_log2_rates(weights: Sequence[float] | Float[np.ndarray, " n"], *curves: Curve) -> Estimate:
    """A weighted sum of the curves' log2 best rates, of the same seeds; its bound is what the grids may hide of it."""
    found = estimate(lambda *own: np.asarray(weights) @ [log2_rates(one) for one in own], *curves)
    hidden = sum(abs(weight) * curve.rate_error() for weight, curve in zip(weights, curves, strict=True))
    return replace(found, bound=float(hidden))


def rate_errors(logs: Estimate, *, edge: str) -> tuple[float | None, float | None]:
    """Standard error and half width of a figure of log2 best rates; none where one is at an edge."""
    if edge or not logs.has_error:
        return None, None
    return logs.error, logs.half_width()


def best_rates(curves: Sequence[Curve]) -> "pd.DataFrame":
    """The best rate and loss of every curve, a row each: `BEST_COLUMNS`, in units of `UNITS`."""
    rows = []
    for curve in curves:
        logs, losses = of_log2_rates((1.0,), curve), estimate(Curve.least, curve)
        error, half_width = rate_errors(logs, edge=curve.edge)
        rows.append(
            {"optimizer": curve.optimizer, "trained": curve.trained, "rule": curve.rule, "kappa": curve.kappa}
            | {"rank": curve.rank, "best_rate": 2**logs.value}
            | {"log2_error": error, "log2_half_width": half_width}
            | {"best_loss": losses.value}
            | {"best_loss_error": losses.error if losses.has_error else None}
            | {"seeds": len(curve.losses), "edge": curve.edge}
            | {"error_over": logs.over}
        )
    return frames.of(rows, BEST_COLUMNS)


def rate_slopes(curves: Sequence[Curve]) -> "pd.DataFrame":
    """Slope of the best rate against the rank of every line, beside the predictions: `RATE_SLOPE_COLUMNS`."""
    rows = []
    for line in dict.fromkeys(curve.line for curve in curves):
        inside = [c for c in curves if c.line == line and not c.edge]
        kept = at_shared_seeds(*inside) if inside else ()
        if len(kept) < 2:
            continue
        x = np.log([curve.rank for curve in kept])
        lever = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
        slope = of_log2_rates(math.log(2) * lever, *kept)
        means = np.array([np.mean(log2_rates(one.spread)) for one in kept]) * math.log(2)
        fit = SeedFit.of(slope, slopes.departure(x, means, slope.value))
        optimizer, trained, _, kappa = line
        predicted = predicted_slopes(optimizer, kappa, trained=trained)  # type: ignore[arg-type]
        apart = {name: abs(value - slope.value) for name, value in predicted.items()}
        reach = slope.half_width() + slopes.BAND if slope.has_error else -math.inf
        nearest = " or ".join(name for name, each in apart.items() if each <= reach)  # all that it can't tell apart
        row = dict(zip(("optimizer", "trained", "rule", "kappa"), line, strict=True))
        row |= {"ranks": " ".join(str(curve.rank) for curve in kept), "slope": slope.value}
        row |= {"standard_error": slope.error if slope.has_error else None}
        row |= {"half_width": slope.half_width() if slope.has_error else None}
        # One seed's error is over records: it leaves out how one training run differs from the next.
        row |= {"verdict": slopes.trend(fit) if len(kept[0].losses) > 1 else "undecided"}
        row |= {**predicted, "nearest": nearest}
        rows.append(row)
    return frames.of(rows, RATE_SLOPE_COLUMNS)


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
      ratio, ratio_log2_error: best rate of the first over the second's; no error where either is at an edge.
      scaling_ratio: gamma^p of the second over the first's, p = 2 under SGD and 1 under Adam: what the ratio would be
        if the first step alone counted.
      first_loss, second_loss: least measured ones.
      difference, standard_error, half_width: of the losses, first less second, paired; half of the 95% interval, by
        Student's t, and the grid's part.
      error_over: what the error is over.
      verdict: in words.
      grid_error: the grid's part of the half width: the larger bound of what either curve may hide between its rates;
        None where there is none.
      ratio_log2_half_width: half of the 95% interval of log2 of the ratio, with what the grids may hide of it.
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
    ratio_log2_half_width: float | None = None


def compare_rules(curves: Sequence[Curve]) -> list[Comparison]:
    """Rules against each other at the largest rank, seed by seed."""
    shared = [at_shared_seeds(*pair) for pair in pairs(curves)]
    return [comparison(pair[0], pair[1], less(pair[0], pair[1])) for pair in shared if pair]


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
    """Loss of the first less the second, with the error over seeds and over held-out records, see `joint`.

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
    return joint(by_seeds, replace(over_records, over=RECORDS))


def comparison(first: Curve, second: Curve, losses: Estimate) -> Comparison:
    """Two curves of one rank, with the difference of their least losses.

    Args:
      first, second: of two rules. Without a seed that both have, the ratio of their best rates has no error.
      losses: loss of the first less the second, at the best rates.
    """
    if shared := at_shared_seeds(first, second):
        ratio = of_log2_rates((1.0, -1.0), *shared)
    else:
        ratio = over_seeds(np.array([np.mean(log2_rates(first.spread)) - np.mean(log2_rates(second.spread))]))
    grid = max(first.grid_error(), second.grid_error())
    loss_a, loss_b = (float(np.mean(curve.spread.least())) for curve in (first, second))
    half_width = losses.half_width() + grid
    relative, half = losses.value / loss_b, half_width / loss_b
    ratio_errors = rate_errors(ratio, edge=first.edge or second.edge)
    one_seed = losses.over == RECORDS and min(len(first.losses), len(second.losses)) < 2
    if not losses.has_error:
        verdict = "not settled: one seed, no losses a record"
    elif math.isinf(grid):
        verdict = "undecided: a best rate lies between two that diverged"
    elif one_seed:  # the error leaves out how one training run differs from the next
        verdict = f"undecided: one seed ({relative:+.2%} ± {half:.2%} over held-out records)"
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
        2**ratio.value,
        ratio_errors[0],
        (second.scaling / first.scaling) ** scaling_power(FAMILY[first.optimizer]),  # type: ignore[index]
        loss_a,
        loss_b,
        losses.value,
        losses.error if losses.has_error else None,
        half_width if math.isfinite(half_width) else None,
        losses.over,
        verdict,
        grid if math.isfinite(grid) else None,
        ratio_errors[1],
    )
