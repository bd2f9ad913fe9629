"""Exponents of the best learning rate in gamma r, rank and steps: predicted by the law, and measured in runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory import laws
from rora_theory.errors import InputError
from rora_theory.lab.sweep.change_parts import QUANTILES
from rora_theory.lab.sweep.curves import setting_labels
from rora_theory.laws import constant_gradient, displacement
from rora_theory.measure.regimes.saved_run import read_regime_run
from rora_theory.measure.regimes.tables import CROSSING_DISTANCE_COLUMNS, CROSSING_DISTANCES
from rora_theory.optimizers import Schedule, schedule_factor
from rora_theory.runs import frames
from rora_theory.stats.curve_optima import whole_curve_log2_rates
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.rate_curves import Curve, at_shared_seeds, weighted_log2_rates
from rora_theory.stats.verdicts import judge_range

RIVALS = {"gain": (-1.0, 0.0), "rank": (-0.125, 0.125, 0.5), "step": (-0.5,)}
"""Exponents that rival explanations predict for the best rate, by the setting that changes.

In the gain G: -1 (the law of the first step) and 0 (the rate does not depend on G). In the rank at fixed G: 1/2
(cross-talk dominates), and -1/8 and 1/8, the smallest exponents that a user would notice: from rank 8 to 128 they
change the rate by a factor of 1.4, which costs a few thousandths of a nat. In the number of steps: -1/2 (a random
walk).
"""


EXPONENT_COLUMNS = (
    "step", "over", "at", "first", "second", "exponent", "standard_error", "half_width", "error_over", "law_low", "law",
    "law_high", "seeds", "verdict", "edge", "displacement_low", "displacement_high", "displacement_verdict",
)  # fmt: skip
"""Columns of `SettingExponents.by_setting`."""

STEP_COLUMNS = (
    "rank", "gain", "first", "second", "exponent", "standard_error", "half_width", "error_over", "seeds", "law_low",
    "law", "law_high", "verdict", "edge",
)  # fmt: skip
"""Columns of `step_exponents`."""


@dataclass(frozen=True)
class RateLaw:
    """What determines the best rates under Adam at a constant gradient.

    Attributes:
      crossing_distances: Crossing distances of the model's modules; empty if they are not known.
      linear_terms: Linear terms c of the modules' first step; if empty, the signal term dominates.
      warmup: Number of steps of linear warm-up from 0.
      schedule: Schedule of the learning rate after the warm-up.
    """

    crossing_distances: tuple[float, ...] = ()
    linear_terms: tuple[float, ...] = ()
    warmup: int = 0
    schedule: Schedule = "constant"

    def factors(self, steps: int) -> Float[np.ndarray, " steps"]:
        """Return the learning rate of every step of a run, relative to its peak."""
        return schedule_factor(self.schedule, np.arange(steps), steps=steps, warmup=self.warmup)

    def gain_exponents(self, gains: tuple[float, float], *, steps: int, rate: float) -> list[float]:
        """Predict how the best rate changes between two values of gamma r, where the signal term dominates.

        Args:
          gains: The two values.
          steps: Number of steps.
          rate: Best peak learning rate at the first value.

        Returns:
          The exponents d log rate / d log gamma r at the `QUANTILES` of the crossing distances.
        """
        exponents = []
        for crossing_distance in np.quantile(self.crossing_distances, QUANTILES).tolist():
            # Ratio of the A part to the B part at the end of the run, which decides how much the rate changes.
            distances = constant_gradient.distances(rate * self.factors(steps), crossing_distance=crossing_distance)
            factor = constant_gradient.rate_factor(gains[1] / gains[0], distances.A / crossing_distance)
            exponents.append(math.log(factor) / math.log(gains[1] / gains[0]))
        return exponents


def read_regime(folder: Path) -> RateLaw:
    """Read the crossing distances and the linear terms under Adam of all modules, with PEFT's default initialisation.

    Raises:
      InputError: If `read_regime_run` refuses the folder, or if it has no such crossing distance.
    """
    run = read_regime_run(folder, optimizer="adam", init="kaiming_uniform", split="heldout")
    rows = frames.read_csv(folder / CROSSING_DISTANCES, CROSSING_DISTANCE_COLUMNS)
    held_out = rows[(rows["init"] == "kaiming_uniform") & (rows["split"] == "heldout")]
    if held_out.empty:
        raise InputError(
            f"{folder / CROSSING_DISTANCES} has no held-out row for kaiming_uniform. "
            "Pass a run of sims.regime whose inits contain kaiming_uniform."
        )
    crossing_distances = held_out["crossing_distance"].astype(float).tolist()
    return RateLaw(tuple(crossing_distances), tuple(run.linear_terms.values()))


class SettingExponents(NamedTuple):
    """Exponents of the best rate between two values of the gain or of the rank.

    Attributes:
      by_setting: A row for each value and value of the other setting, with the columns `EXPONENT_COLUMNS`.
      pooled: A row for each pair of values and each value of the other setting, and one for all of these together.
    """

    by_setting: pd.DataFrame
    pooled: pd.DataFrame


def setting_exponents(
    curves: Sequence[Curve],
    step: int,
    law: RateLaw,
    *,
    constants: Mapping[int, tuple[float, float]] | None = None,
) -> SettingExponents:
    """Measure the exponents of the best rate in gamma r and in the rank, and compare them with the laws.

    At every rank the exponent in gamma r is measured, by the lowest losses, from each gain to the largest; at every
    gain the exponent in the rank is measured from each rank to the largest. By whole curves, all pairs of gains and of
    ranks are measured, at each value of the other setting and pooled over these values. The pooled verdicts have more
    power than those on single exponents: see ``power.csv`` of `benchmarks.verdict_rules`.

    Args:
      curves: `curves.curves_at` the step.
      step: Number of steps.
      law: Law of a constant gradient; without crossing distances there are exponents by whole curves alone, and no
        verdicts.
      constants: Smallest and largest measured displacement constant K by number of steps, see
        `change_parts.constants_by_steps`; without them the displacement law is left out over the gain.

    Returns:
      Two tables with the columns

      - ``step``, ``over`` (``gain`` or ``rank``, the setting that changes), ``at`` (value of the other setting; in
        ``pooled`` all that are pooled, separated by spaces), ``first`` and ``second`` (values of the setting that
        changes);
      - ``exponent`` with ``standard_error``, 95% ``half_width`` and ``error_over``, from the ``seeds`` that all curves
        have, and ``edge`` as in `step_exponents`; in ``pooled``, whether there is any;
      - ``law_low``, ``law`` and ``law_high``, the exponent by the law of a constant gradient, and ``verdict`` on it,
        see `stats.verdicts.judge_range`. Over the gain the range is that of the modules' crossing distances, at the
        measured best rate. Over the rank it extends from 0, where the signal or A dominates, to the exponents that
        preserve the first step of the median module and of the module at the 95% quantile, see
        `laws.equal_change_rank_exponent`;
      - ``displacement_low`` and ``displacement_high``, the exponents of the displacement law, and
        ``displacement_verdict``: over the gain those over the measured constants and every coherence, over the rank
        0. Each law is a rival of the other.

      A row of ``pooled`` over the values with the most seeds has the common range of their predictions, and the
      verdicts; the others have neither.
    """
    curve_of_setting = {(curve.rank, curve.gain): curve for curve in curves if curve.rank}
    rows, pooled_rows = [], []
    # Settings are pairs of rank (index 0) and gain (index 1). One of them changes, the other is the same.
    for over, index in (("gain", 1), ("rank", 0)):
        # Largest value that changes, by that of the other setting.
        largest: dict[float, float] = {}
        for key in sorted(curve_of_setting, key=lambda key: (key[1 - index], key[index])):
            largest[key[1 - index]] = key[index]
        for first, second in combinations(sorted({key[index] for key in curve_of_setting}), 2):
            # Pairs of curves with shared seeds, by the value of the other setting.
            pairs: dict[float, tuple[Curve, ...]] = {}
            for at in largest:
                settings: list[Any] = [(at, end) if over == "gain" else (end, at) for end in (first, second)]
                if all(setting in curve_of_setting for setting in settings):
                    shared = at_shared_seeds(*(curve_of_setting[setting] for setting in settings))
                    pairs |= {at: shared} if shared else {}
            octaves = math.log2(second / first)
            labels = {"step": step, "over": over, "first": first, "second": second}
            # By the lowest losses, at each value of the other setting.
            predicted = {}
            for at, ends in pairs.items() if law.crossing_distances else ():
                if second != largest[at]:
                    continue
                exponents = _predict_exponents(law, over, (first, second), steps=step, rate=ends[0].best_rate)
                # By the displacement law the rank has no effect but through gamma r.
                displaced: tuple[float, float] | None = (0.0, 0.0)
                if over == "gain":
                    displaced = _displacement_exponents((constants or {}).get(step), first, second)
                law_range = min(exponents), max(exponents)
                predicted[at] = law_range, displaced
                slope = weighted_log2_rates((-1.0, 1.0), *ends).times(1 / octaves)
                edge = _edge_of_pair(*ends)
                judged = _judge(slope, law_range, displaced, over, is_bound=bool(edge), seeds=len(ends[0].losses))
                rows.append(labels | judged | {"at": at, "law": exponents[1], "edge": edge})
            # By whole curves, also over the values with the most seeds; one with fewer would leave out seeds of the
            # others.
            seeds_at = {at: len(pairs[at][0].losses) for at in predicted or pairs}
            pooled = tuple(at for at, seeds in seeds_at.items() if seeds == max(seeds_at.values()))
            for group in dict.fromkeys([*((at,) for at in pairs), pooled]):
                ends = at_shared_seeds(*(curve for at in group for curve in pairs[at])) if group else ()
                if not ends:
                    continue
                weight = 1 / (len(group) * octaves)
                slope = whole_curve_log2_rates([sign * weight for _ in group for sign in (-1.0, 1.0)], *ends)
                if math.isnan(slope.value):
                    continue
                # The laws' predictions for the pooled values, to their common range.
                members = [predicted[at] for at in group] if group == pooled and predicted else []
                common, displaced = (_common_range([ranges[place] for ranges in members]) for place in (0, 1))
                is_edge = any(curve.edge for curve in ends)
                judged = _judge(slope, common, displaced, over, is_bound=is_edge, seeds=len(ends[0].losses))
                at_all = " ".join(f"{at:g}" for at in group)
                row = {"at": at_all, "first": float(first), "second": float(second), "edge": is_edge}
                pooled_rows.append(labels | judged | row)
    rows.sort(key=lambda row: (row["over"], row["at"], row["first"]))
    columns = [name for name in EXPONENT_COLUMNS if name != "law"]
    return SettingExponents(
        frames.from_rows(rows, EXPONENT_COLUMNS) if rows else pd.DataFrame(),
        frames.from_rows(pooled_rows, columns) if pooled_rows else pd.DataFrame(),
    )


def _predict_exponents(
    law: RateLaw, over: str, ends: tuple[float, float], *, steps: int, rate: float
) -> tuple[float, ...]:
    """Return the lowest, the median and the highest exponent by the law of a constant gradient, not in order."""
    if over == "gain":
        return tuple(law.gain_exponents(ends, steps=steps, rate=rate))
    if not law.linear_terms:
        return (0.0, 0.0, 0.0)
    # Rates that preserve each module's first step.
    exponents = laws.equal_change_rank_exponent(int(ends[0]), int(ends[1]), np.array(law.linear_terms))
    return (0.0, *np.quantile(exponents, QUANTILES[1:]).tolist())


def _common_range(ranges: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Return the smallest range that contains all; None if there is none or one is not known."""
    known = [ends for ends in ranges if ends is not None]
    if not known or len(known) < len(ranges):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _judge(
    slope: Estimate,
    law: tuple[float, float] | None,
    displaced: tuple[float, float] | None,
    over: str,
    *,
    is_bound: bool,
    seeds: int,
) -> dict[str, Any]:
    """Return the columns of a measured exponent, with the range and the verdict of each law that predicts it.

    The laws are rivals of each other.
    """
    row: dict[str, Any] = {
        "exponent": slope.value,
        "standard_error": slope.known_error,
        "half_width": slope.half_width(),
    }
    row |= {"error_over": slope.over, "seeds": seeds}
    ranges = {"": law, "displacement_": displaced}
    for prefix, prediction in ranges.items():
        if prediction is not None:
            others = [end for name, ends in ranges.items() if name != prefix for end in ends or ()]
            verdict = judge_range(slope, prediction, (*RIVALS[over], *others), is_bound=is_bound, seeds=seeds)
            low, high = ("law_low", "law_high") if not prefix else ("displacement_low", "displacement_high")
            row |= {low: prediction[0], high: prediction[1], f"{prefix}verdict": verdict}
    return row


def _displacement_exponents(
    constants: tuple[float, float] | None, low: float, high: float
) -> tuple[float, float] | None:
    """Return the smallest and largest exponent of the displacement law between two values of G, or None."""
    if constants is None:
        return None
    exponents = [
        displacement.best_rate_exponent(low, high, displacement_constant=constant, coherence=coherence)
        for constant in constants
        for coherence in displacement.COHERENCE_RANGE
    ]
    return min(exponents), max(exponents)


def step_exponents(curves: Mapping[int, Sequence[Curve]], law: RateLaw) -> pd.DataFrame:
    """Measure the exponent of the best rate in the number of steps, and compare it with that of a constant gradient.

    At every rank and gain the exponent is measured between all pairs of numbers of steps. Steps within a warm-up
    at rate 0 have no best rate and are left out.

    If signs are constant, both factors move by the sum of the rates. The rate that preserves the change is then
    inversely proportional to that sum, whichever part dominates, see
    `rora_theory.laws.constant_gradient.rate_for_equal_change`. Entries in a random walk move by the root of the sum,
    which gives -1/2.

    Args:
      curves: `curves.curves_at` by step.
      law: Law of a constant gradient, with crossing distances.

    Returns:
      A row for each rank, gain and pair of numbers of steps, ``first`` below ``second``: ``rank``, ``gain``,
      ``first`` and ``second``; ``exponent`` with ``standard_error``, 95% ``half_width``, ``error_over`` and the number
      of common ``seeds``; the exponents ``law_low``, ``law`` and ``law_high`` of a constant gradient over the modules'
      crossing distances at the first best rate; ``verdict``, see `stats.verdicts.judge_range`; and ``edge``, which of
      the two best rates lies at an end of its grid: ``first``, ``second`` or ``both``; empty if neither does. The
      exponent of a pair with an edge is not reliable, and its verdict is ``undecided``.
    """
    rows = []
    # Curves of each setting by step, without steps at which the warm-up has not raised the rate from 0.
    curves_of_setting: dict[tuple[int, float], dict[int, Curve]] = {}
    for step in sorted(curves):
        for curve in curves[step] if step > 1 or not law.warmup else ():
            curves_of_setting.setdefault((curve.rank, curve.scaling), {})[step] = curve
    for by_step in curves_of_setting.values():
        # Steps ascend, so that the first number of every pair is the smaller one.
        for first, second in combinations(by_step, 2):
            curve = by_step[first]
            ends = at_shared_seeds(curve, by_step[second])
            if not ends:
                continue
            # Measured exponent: change of the log of the best rate per doubling of the steps.
            octaves = math.log2(second / first)
            slope = weighted_log2_rates((-1.0, 1.0), *ends).times(1 / octaves)
            rate = ends[0].best_rate
            # Full fine-tuning has no A that could take over.
            distances = np.quantile(law.crossing_distances, QUANTILES).tolist() if curve.rank else [math.inf]
            # Exponents of the law, at quantiles of the modules' crossing distances.
            factors = law.factors(first), law.factors(second)
            preserving_rates = [
                constant_gradient.rate_for_equal_change(rate, *factors, crossing_distance=distance)
                for distance in distances
            ]
            predicted = sorted(math.log2(preserving / rate) / octaves for preserving in preserving_rates)
            edge, seeds = _edge_of_pair(*ends), len(ends[0].losses)
            judged = _judge(slope, (predicted[0], predicted[-1]), None, "step", is_bound=bool(edge), seeds=seeds)
            labels = setting_labels(curve) | {"first": first, "second": second}
            rows.append(labels | judged | {"law": predicted[len(predicted) // 2], "edge": edge})
    return frames.from_rows(rows, STEP_COLUMNS) if rows else pd.DataFrame()


def _edge_of_pair(first: Curve, second: Curve) -> str:
    """Return which of two best rates lies at an end of its grid: ``first``, ``second``, ``both`` or an empty string."""
    if first.edge and second.edge:
        return "both"
    return "first" if first.edge else "second" if second.edge else ""
