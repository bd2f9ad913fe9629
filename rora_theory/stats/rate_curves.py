"""Curves of loss against learning rate: best rates, their slopes in the rank, and comparisons of scaling rules.

A rule transfers if its best rate does not depend on the rank. Two rules are compared at their respective best rates: a
remaining difference is more than a shift of the rate.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy
from jaxtyping import Bool, Float

from rora_theory.optimizers import FAMILY, scaling_power
from rora_theory.runs import frames
from rora_theory.stats import slopes
from rora_theory.stats.estimate import ROUNDING, Estimate, over_seeds
from rora_theory.stats.rate_optimum import Best, fit_minima, grid_gaps, predicted_slopes, rate_gaps
from rora_theory.stats.slopes import SlopeFit
from rora_theory.stats.verdicts import judge_equivalence

if TYPE_CHECKING:
    import pandas as pd

BEST_COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "rank", "best_rate", "log2_error", "log2_half_width", "best_loss",
    "best_loss_error", "seeds", "error_over", "edge",
)  # fmt: skip
"""Columns of the table of `tabulate_best_rates`."""

RATE_SLOPE_COLUMNS = (
    "optimizer", "trained", "rule", "kappa", "ranks", "slope", "standard_error", "half_width", "verdict", "signal",
    "cross-talk", "A moves", "nearest",
)  # fmt: skip
"""Columns of the table of `rate_slopes`."""

UNITS = {
    "loss": "teacher and student: squared error / 2, summed over outputs, averaged over inputs, after the last step; "
    "language models: nats per token on held-out records",
    "trained": "both factors, or B alone with A frozen",
    "log2_error": "standard error of log2 of the best rate; empty at an edge, where the best rate is a bound",
    "log2_half_width": "half of its 95% interval by Student's t, plus the bound next to a run that diverged",
    "half_width": "half of the 95% interval by Student's t; in comparison.json plus the bound from the grid's spacing",
    "edge": "end of the grid at which the best rate lies: the true one may lie beyond; excluded from slopes",
    "signal, cross-talk, A moves": "predicted slopes, rora_theory.stats.rate_optimum",
}

EQUIVALENCE_MARGIN = 0.01
"""Relative difference within which two losses count as equal if it contains the whole interval."""

EDGE_SHARE = 0.025
"""Minimum share of resampled curves with the best rate at an end of the grid for the curve to be at that edge."""

RECORDS = "held-out records"
"""Kind of samples of an error over records, see `Estimate.over`."""

REPEATS = "repeated runs"
"""Kind of samples of an error from the noise of repeated runs."""


@dataclass(frozen=True)
class Curve:
    """Loss against learning rate at one rank.

    Attributes:
      optimizer: Optimizer of the runs.
      trained: Trained factors.
      rule: Scaling rule.
      kappa: Exponent of the scaling rule gamma = alpha / r^kappa.
      rank: Rank of the adapter.
      scaling: Scaling factor gamma.
      rates: Learning rates, ascending.
      losses: Losses of the seeds that ran at every rate.
      resampled: Losses of the same seeds over resampled records, with the same records for every curve; None if there
        are no losses per record.
      seeds: Seeds of the rows of ``losses``; empty numbers them from 0.
      records: Number of samples that ``resampled`` is drawn from.
      resampled_over: Kind of these samples, see `Estimate.over`: held-out records, or `REPEATS` if ``resampled`` adds
        to the losses the noise that repeated runs have.
      reach: Distance in log rate from the lowest loss up to which rates belong to the fit of a minimum, see
        `rate_optimum.fit_minima`.
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
    records: int = 0
    resampled_over: str = RECORDS
    reach: float = 0.0

    @property
    def line(self) -> tuple[str, str, str, float]:
        """Optimizer, trained factors, rule and kappa, which the curves of one line over ranks share."""
        return (self.optimizer, self.trained, self.rule, self.kappa)

    @property
    def gain(self) -> float:
        """G = gamma r, on which the laws of the best rate depend, without the rounding of gamma."""
        return round(self.scaling * self.rank, 9)

    @property
    def by_seed(self) -> dict[int, int]:
        """Row of every seed in ``losses``."""
        return {seed: row for row, seed in enumerate(self.seeds or range(len(self.losses)))}

    def select_seeds(self, seeds: Sequence[int]) -> "Curve":
        """Return the curve of a subset of its seeds."""
        rows = [self.by_seed[seed] for seed in seeds]
        resampled = None if self.resampled is None else self.resampled[:, rows]
        return replace(self, losses=self.losses[rows], resampled=resampled, seeds=tuple(seeds))

    @cached_property
    def over_resamples(self) -> "Curve | None":
        """Mean over seeds for every resample of the records, in place of seeds; None without resamples."""
        if self.resampled is None:
            return None
        return replace(self, losses=self.resampled.mean(axis=1), resampled=None, seeds=())

    @property
    def replicates(self) -> "Curve":
        """Curve with replicates as its rows: the seeds, or `over_resamples` of a single seed with losses per record."""
        return (self.over_resamples if len(self.losses) == 1 else None) or self

    @cached_property
    def optima(self) -> list[Best]:
        """Minimum fitted to each seed's curve."""
        return fit_minima(self.rates, self.losses, self.reach)

    @cached_property
    def edge(self) -> str:
        """End of the grid at which the best rate lies; empty otherwise.

        The best rate is at an edge if that of any seed is, or if it is for more resamples of the records than a 95%
        interval excludes.
        """
        over_resamples = self.over_resamples
        # A single seed counts through its resampled records, if it has any.
        is_resampled_seed = over_resamples is not None and len(self.losses) == 1
        ends = [] if is_resampled_seed else [best.edge for best in self.optima if best.edge]
        if over_resamples is not None:
            resampled_ends = [best.edge for best in over_resamples.optima if best.edge]
            if len(resampled_ends) >= EDGE_SHARE * len(over_resamples.losses):
                ends += resampled_ends
        # The more frequent of the two ends.
        return max(ends, key=ends.count) if ends else ""

    @cached_property
    def log2_optimum(self) -> Estimate:
        """log2 of the best rate, see `weighted_log2_rates`."""
        return weighted_log2_rates((1.0,), self)

    @property
    def lowest(self) -> int:
        """Index of the measured rate with the lowest mean loss over seeds; the lower one of two."""
        return int(np.argmin(np.mean(np.where(np.isfinite(self.losses), self.losses, np.inf), axis=0)))

    @property
    def best_rate(self) -> float:
        """Best rate: the geometric mean over seeds, or over the resamples of a single seed."""
        return float(2**self.log2_optimum.value)

    def losses_at(
        self, learning_rates: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, "seeds n"], Bool[np.ndarray, " n"]]:
        """Interpolate the losses at learning rates above 0.

        Monotone cubic interpolation (PCHIP) of the log loss in the log rate has no minimum between two measured rates
        that is below both, so that a regret cannot be negative.

        Returns:
          The loss of every seed at each learning rate, and whether it is a lower bound. It is one if the rate lies
          outside the measured rates or next to a rate that diverged; the loss at the nearest rate that did not diverge
          is then returned.
        """
        x, log_rates = np.log(self.rates), np.log(learning_rates)
        usable, interpolant = self._interpolant
        # Tolerance for the rounding of logarithms at the ends of the grid.
        slack = 1e-9 * max(1.0, float(np.max(np.abs(x))))
        # Indices of the rates on both sides, the same one at an end of the grid.
        right = np.searchsorted(x, log_rates)
        left, right = np.maximum(right - 1, 0), np.minimum(right, len(x) - 1)
        is_inside = (x[0] - slack <= log_rates) & (log_rates <= x[-1] + slack) & usable[left] & usable[right]
        # Outside of the grid or next to a run that diverged: the loss at the nearest rate that did not diverge.
        nearest = np.flatnonzero(usable)[np.argmin(np.abs(x[usable] - log_rates[:, None]), axis=1)]
        losses, is_lower_bound = self.losses[:, nearest], ~(np.abs(x[nearest] - log_rates) <= slack)
        if interpolant is not None and is_inside.any():
            # Rounding may put an end of the grid slightly outside.
            clipped = np.clip(log_rates[is_inside], x[usable][0], x[usable][-1])
            losses[:, is_inside], is_lower_bound[is_inside] = np.exp(interpolant(clipped)), False
        return losses, is_lower_bound

    @cached_property
    def _interpolant(self) -> tuple[Bool[np.ndarray, " rates"], "scipy.interpolate.PchipInterpolator | None"]:
        """Rates at which every seed has a finite loss, and the log loss in the log rate over them if there are two."""
        usable = np.isfinite(self.losses).all(axis=0)
        if usable.sum() < 2:
            return usable, None
        x, y = np.log(self.rates[usable]), np.log(self.losses[:, usable])
        return usable, scipy.interpolate.PchipInterpolator(x, y, axis=1)

    def lowest_losses(self) -> np.ndarray:
        """Return the lowest measured loss of each seed. The vertex of a parabola would be biased low."""
        return np.min(np.where(np.isfinite(self.losses), self.losses, np.inf), axis=1)

    @cached_property
    def grid_error(self) -> float:
        """Mean of `rate_optimum.grid_gaps` over seeds, or over the resamples of a single seed."""
        return float(np.mean(grid_gaps(self.rates, self.replicates.losses)))

    @cached_property
    def rate_error(self) -> float:
        """Mean of `rate_optimum.rate_gaps` over seeds, or over the resamples of a single seed."""
        return float(np.mean(rate_gaps(self.rates, self.replicates.losses)))


def at_shared_seeds(*curves: Curve) -> tuple[Curve, ...]:
    """Return the curves restricted to the seeds that all of them share, in one order; empty if they share none."""
    shared = [seed for seed in curves[0].by_seed if all(seed in curve.by_seed for curve in curves)]
    return tuple(curve.select_seeds(shared) for curve in curves) if shared else ()


def estimate(statistic: Callable[..., Sequence[float] | np.ndarray], *curves: Curve) -> Estimate:
    r"""Estimate a statistic of curves with its error over seeds and over held-out records, see `combine_errors`.

    The error over n records is the spread over bootstrap samples times :math:`\sqrt{n / (n - 1)}`, with n - 1 degrees
    of freedom: for a mean, its standard error. It assumes that the records are independent and that the statistic is to
    first order a mean over them, which is approximately normal.

    For a single seed the value is the mean over bootstrap samples, and the error is that over records. Without losses
    per record, or with a single record, there is only the error over seeds. Where the samples add noise to the measured
    losses (`REPEATS`), the value is that of the measured losses.

    Args:
      statistic: Function that computes one value per seed from the curves.
      *curves: Curves of the same seeds, see `at_shared_seeds`.

    Returns:
      The statistic with its error.
    """
    by_seeds = over_seeds(np.asarray(statistic(*curves), np.float64))
    resampled_curves = [curve.over_resamples for curve in curves]
    records = min(curve.records for curve in curves)
    if records < 2 or any(curve is None for curve in resampled_curves):
        return by_seeds
    values = np.asarray(statistic(*resampled_curves), np.float64)
    # The spread of bootstrap samples is the standard error with n in place of n - 1; their number does not divide it.
    error = float(np.std(values, ddof=1)) * math.sqrt(records / (records - 1))
    over = curves[0].resampled_over
    value = by_seeds.value if over == REPEATS else float(np.mean(values))
    by_records = Estimate(value, error, records, over)
    return combine_errors(by_seeds, by_records) if by_seeds.has_error else by_records


def combine_errors(by_seeds: Estimate, by_records: Estimate) -> Estimate:
    r"""Combine the error a over n seeds with the error b over m records.

    All seeds are scored on the same records, so that their spread does not contain the variation between records. The
    combined error is :math:`\sqrt{a^2 + b^2}`. Its degrees of freedom are Welch and Satterthwaite's,
    :math:`(a^2 + b^2)^2 / (a^4 / (n - 1) + b^4 / (m - 1))`, rounded down. With very few samples the combined interval
    can be narrower than one of the two; the widest of the three is then returned.

    Args:
      by_seeds: Mean over seeds with its error over seeds.
      by_records: Estimate with its error over records.

    Returns:
      The mean over seeds with the combined error.
    """
    by_records = replace(by_records, value=by_seeds.value)
    if not by_seeds.has_error:
        return by_records
    if not by_records.has_error:  # a single record
        return by_seeds
    # The spread of equal values is about 1e-16 by rounding, which is not a second source of error.
    if min(by_seeds.error, by_records.error) <= ROUNDING * max(by_seeds.error, by_records.error):
        return by_seeds if by_seeds.error > by_records.error else by_records
    a, b = by_seeds.error**2, by_records.error**2
    degrees = (a + b) ** 2 / (a**2 / (by_seeds.n - 1) + b**2 / (by_records.n - 1))
    freedom = math.floor(degrees * (1 + ROUNDING))  # 30 degrees may be computed as 29.999...
    combined = Estimate(by_seeds.value, math.sqrt(a + b), freedom + 1, f"{by_seeds.over} and {by_records.over}")
    return max((combined, by_seeds, by_records), key=Estimate.half_width)


def estimate_loss_difference(first: Curve, second: Curve) -> Estimate:
    """Estimate the lowest loss of the first curve minus that of the second, for curves of the same seeds."""
    return estimate(lambda a, b: a.lowest_losses() - b.lowest_losses(), first, second)


def log2_rates(curve: Curve) -> np.ndarray:
    """Return log2 of the best rate of each seed."""
    return np.log2([best.rate for best in curve.optima])


def weighted_log2_rates(weights: Sequence[float] | Float[np.ndarray, " n"], *curves: Curve) -> Estimate:
    """Estimate a weighted sum of the log2 best rates of several curves.

    Args:
      weights: One weight per curve.
      *curves: Curves of the same seeds.

    Returns:
      The sum with its error. Its bound is the weighted sum of the curves' rate errors.
    """

    def weighted_sum(*sampled: Curve) -> np.ndarray:
        return np.asarray(weights) @ [log2_rates(curve) for curve in sampled]

    bound = sum(abs(weight) * curve.rate_error for weight, curve in zip(weights, curves, strict=True))
    return replace(estimate(weighted_sum, *curves), bound=float(bound))


def rate_errors(logs: Estimate, *, edge: str) -> tuple[float | None, float | None]:
    """Return the standard error and half width of an estimate of log2 best rates; None if a rate is at an edge."""
    if edge or not logs.has_error:
        return None, None
    return logs.error, logs.half_width()


def tabulate_best_rates(curves: Sequence[Curve]) -> "pd.DataFrame":
    """Return a table of the best rate and loss of every curve, with the columns `BEST_COLUMNS` in units of `UNITS`."""
    rows = []
    for curve in curves:
        # The best rate is fitted, in log2; the best loss is the lowest measured one.
        logs, losses = curve.log2_optimum, estimate(Curve.lowest_losses, curve)
        error, half_width = rate_errors(logs, edge=curve.edge)
        rows.append(
            {"optimizer": curve.optimizer, "trained": curve.trained, "rule": curve.rule, "kappa": curve.kappa}
            | {"rank": curve.rank, "best_rate": curve.best_rate}
            | {"log2_error": error, "log2_half_width": half_width}
            | {"best_loss": losses.value}
            | {"best_loss_error": losses.known_error}
            | {"seeds": len(curve.losses), "edge": curve.edge}
            | {"error_over": logs.over}
        )
    return frames.from_rows(rows, BEST_COLUMNS)


def rate_slopes(curves: Sequence[Curve]) -> "pd.DataFrame":
    """Return a table of the best rates' slopes in the rank and the predictions, with columns `RATE_SLOPE_COLUMNS`."""
    rows = []
    for line in dict.fromkeys(curve.line for curve in curves):
        # Curves of the line with an inner minimum, at the seeds that all of them share.
        inner = [curve for curve in curves if curve.line == line and not curve.edge]
        fitted_curves = at_shared_seeds(*inner) if inner else ()
        if len(fitted_curves) < 2:
            continue
        # The least-squares slope is a weighted sum of the log best rates.
        log_ranks = np.log([curve.rank for curve in fitted_curves])
        slope = weighted_log2_rates(math.log(2) * slopes.slope_weights(log_ranks), *fitted_curves)
        mean_log_rates = np.array([np.mean(log2_rates(curve.replicates)) for curve in fitted_curves]) * math.log(2)
        fit = SlopeFit(**vars(slope), departure=slopes.departure(log_ranks, mean_log_rates, slope.value))
        # All predictions that the interval cannot exclude.
        optimizer, trained, _, kappa = line
        predicted = predicted_slopes(optimizer, kappa, trained=trained)  # type: ignore[arg-type]
        distances = {name: abs(value - slope.value) for name, value in predicted.items()}
        max_distance = slope.half_width() + slopes.BAND if slope.has_error else -math.inf
        nearest = " or ".join(name for name, distance in distances.items() if distance <= max_distance)
        row = dict(zip(("optimizer", "trained", "rule", "kappa"), line, strict=True))
        row |= {"ranks": " ".join(str(curve.rank) for curve in fitted_curves), "slope": slope.value}
        row |= {"standard_error": slope.known_error}
        row |= {"half_width": slope.half_width() if slope.has_error else None}
        # A single seed's error is over records and does not contain the variation between training runs.
        row |= {"verdict": slopes.trend(fit) if len(fitted_curves[0].losses) > 1 else "undecided"}
        row |= {**predicted, "nearest": nearest}
        rows.append(row)
    return frames.from_rows(rows, RATE_SLOPE_COLUMNS)


def describe_slopes(slopes: "pd.DataFrame") -> str:
    """Return a sentence with the settings whose best rate does not depend on the rank."""
    flat = [
        f"{row['optimizer']} {row['rule']} ({row['trained']})"
        for row in frames.rows(slopes)
        if row["verdict"] == "flat"
    ]
    settings = "optimizer, rule and trained factors"
    if slopes.empty:
        return f"No combination of {settings} has two best rates inside the grid. Add learning rates to the grid."
    names = f": {', '.join(flat)}" if flat else ""
    count = f"{len(flat)} of {len(slopes)}"
    return f"The best rate does not move with the rank for {count} combinations of {settings}{names}."


@dataclass(frozen=True)
class Comparison:
    """Comparison of two rules at one rank, at their respective best rates.

    Attributes:
      optimizer: Optimizer of the runs.
      trained: Trained factors.
      rank: Rank of the adapters.
      first: First rule.
      second: Second rule.
      ratio: Best rate of the first rule divided by that of the second.
      ratio_log2_error: Standard error of log2 of the ratio; None if a best rate is at an edge.
      scaling_ratio: gamma^p of the second rule divided by that of the first, with p = 2 under SGD and 1 under Adam: the
        ratio of best rates if only the first step mattered.
      first_loss: Lowest measured loss of the first rule.
      second_loss: Lowest measured loss of the second rule.
      difference: First loss minus second loss, paired.
      standard_error: Standard error of the difference.
      half_width: Half of the 95% interval of the difference by Student's t, plus ``grid_error``.
      error_over: Kind of samples behind the standard error.
      verdict: Sentence that states which rule is better.
      grid_error: Larger bound of the two curves on the minimum between their rates; None if it is infinite.
      ratio_log2_half_width: Half of the 95% interval of log2 of the ratio, plus the bound from the grids.
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
    """Compare all pairs of rules at the largest rank that both have, paired by seed."""
    comparisons = []
    for pair in rule_pairs(curves):
        shared = at_shared_seeds(*pair)
        if shared:
            first, second = shared
            comparisons.append(compare_curves(first, second, estimate_loss_difference(first, second)))
    return comparisons


def rule_pairs(curves: Sequence[Curve]) -> Iterator[tuple[Curve, Curve]]:
    """Yield every pair of rules, at the largest rank that both have."""
    for key in dict.fromkeys((curve.optimizer, curve.trained) for curve in curves):
        # Curves of each rule by rank, in the order of the curves.
        by_rule: dict[str, dict[int, Curve]] = {}
        for curve in curves:
            if (curve.optimizer, curve.trained) == key:
                by_rule.setdefault(curve.rule, {})[curve.rank] = curve
        for first, second in itertools.combinations(by_rule.values(), 2):
            shared_ranks = first.keys() & second.keys()
            if shared_ranks:
                yield first[max(shared_ranks)], second[max(shared_ranks)]


def compare_curves(first: Curve, second: Curve, losses: Estimate) -> Comparison:
    """Compare two curves of one rank.

    Args:
      first: Curve of the first rule.
      second: Curve of the second rule. If the two share no seed, the ratio of their best rates has no error.
      losses: Loss of the first minus the second, at the best rates.

    Returns:
      The comparison.
    """
    # Ratio of the best rates, and the power of gamma to which the first step is proportional.
    power = scaling_power(FAMILY[first.optimizer])  # type: ignore[index]
    if shared := at_shared_seeds(first, second):
        ratio = weighted_log2_rates((1.0, -1.0), *shared)
    else:
        ratio = over_seeds(np.array([np.mean(log2_rates(first.replicates)) - np.mean(log2_rates(second.replicates))]))
    # Difference of the lowest losses, with the larger bound of the two grids added to the interval.
    grid_error = max(first.grid_error, second.grid_error)
    first_loss, second_loss = (float(np.mean(curve.replicates.lowest_losses())) for curve in (first, second))
    half_width = losses.half_width() + grid_error
    # Relative to the second curve's loss, as the margin is.
    relative, relative_half_width = losses.value / second_loss, half_width / second_loss
    result = judge_equivalence(relative, relative_half_width, margin=EQUIVALENCE_MARGIN, threshold=0.0)
    interval = f"{relative:+.2%} ± {relative_half_width:.2%}"
    ratio_error, ratio_half_width = rate_errors(ratio, edge=first.edge or second.edge)
    is_one_seed = losses.over == RECORDS and min(len(first.losses), len(second.losses)) < 2
    # The verdict names the first reason for which the comparison is not settled, or the result.
    if not losses.has_error:
        verdict = "not settled: one seed, no losses a record"
    elif math.isinf(grid_error):
        verdict = "undecided: a best rate lies between two that diverged"
    elif is_one_seed:  # the error does not contain the variation between training runs
        verdict = f"undecided: one seed ({interval} over held-out records)"
    elif result == "differs":
        better, gain = first.rule if losses.value < 0 else second.rule, abs(relative)
        verdict = f"{better} is better by {gain:.2%} ± {relative_half_width:.2%}: more than a shift of the rate"
    elif result == "equal":
        verdict = f"equal to {EQUIVALENCE_MARGIN:.0%} ({interval}): a shift of the rate"
    else:
        verdict = f"undecided ({interval})"
    # At an edge, both the loss and the rate may improve beyond the grid, whatever the comparison says.
    if first.edge or second.edge:
        verdict += "; a best rate at the grid's edge, so not settled"
    return Comparison(
        optimizer=first.optimizer,
        trained=first.trained,
        rank=first.rank,
        first=first.rule,
        second=second.rule,
        ratio=2**ratio.value,
        ratio_log2_error=ratio_error,
        scaling_ratio=(second.scaling / first.scaling) ** power,
        first_loss=first_loss,
        second_loss=second_loss,
        difference=losses.value,
        standard_error=losses.known_error,
        half_width=half_width if math.isfinite(half_width) else None,
        error_over=losses.over,
        verdict=verdict,
        grid_error=grid_error if math.isfinite(grid_error) else None,
        ratio_log2_half_width=ratio_half_width,
    )
