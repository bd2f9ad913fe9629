"""Regret of policies in the measured runs: what it costs to keep, divide or scale a tuned learning rate."""

from collections.abc import Mapping, Sequence

import pandas as pd

from rora_theory.advice.best_rate import Run
from rora_theory.evidence.policies import RatePolicy
from rora_theory.evidence.regrets import regrets_between, statistics_of
from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve

REGRET_COLUMNS = (
    "old_rank", "old_gain", "old_steps", "rank", "gain", "steps", "changed", "policy", "tuned_rate", "learning_rate",
    "regret", "standard_error", "half_width", "error_over", "low", "high", "per_cent", "lowest_loss", "seeds",
    "is_lower_bound", "is_edge",
)  # fmt: skip
"""Columns of `regret_table`."""

SUMMARY_COLUMNS = (
    "changed", "policy", "pairs", "median", "mean", "largest", "largest_error", "largest_over_interval",
    "lower_bounds", "constants",
)  # fmt: skip
"""Columns of `regret_by_policy`."""


def regret_table(
    runs: Sequence[SweepRun],
    tokens: Sequence[int],
    curves: Mapping[int, Sequence[Curve]],
    by_name: Mapping[str, RatePolicy],
    *,
    draws: int,
) -> pd.DataFrame:
    """Compute the regret of every policy between all pairs of measured conditions.

    The new condition has the same or a higher rank and number of steps, the usual direction of a transfer; its G may be
    higher or lower. Where the policy's rate lies outside the rates that all seeds ran, the seeds that ran rates on both
    sides of it are used. A policy that gives the same rate as an earlier one has no row; all laws do at an unchanged G.

    Args:
      runs: Runs of one grid, see `runs.read_runs`.
      tokens: Number of tokens of every held-out record.
      curves: `curves.curves_at` of the runs by step.
      by_name: Policies by name, see `policies.measured_policies`.
      draws: Number of bootstrap samples of the held-out records, for curves of a subset of the seeds.

    Returns:
      A row for each pair and policy with the columns `REGRET_COLUMNS`: the settings, which of them ``changed``, the
      ``policy``, ``tuned_rate``, the columns of `Regret.row`, the number of ``seeds``, and ``is_edge`` (a best rate of
      either curve lies at the end of its grid).
    """
    measured = _MeasuredCurves(runs, tokens, curves, draws)
    rows = []
    for pair in regrets_between(measured.curves, by_name, target_at=measured.curve_at, is_pair=_is_measured_pair):
        # Policies that agree by construction, such as all laws at an unchanged G, have one row: the first's.
        if pair.is_repeated:
            continue
        old, new, tuned, target = pair.old, pair.new, measured.curves[pair.old], pair.target
        changed = [name for name in ("rank", "gain", "steps") if getattr(old, name) != getattr(new, name)]
        rows.append(
            {"old_rank": old.rank, "old_gain": old.gain, "old_steps": old.steps}
            | {"rank": new.rank, "gain": new.gain, "steps": new.steps}
            | {"changed": " ".join(changed), "policy": pair.policy, "tuned_rate": tuned.best_rate}
            | pair.cost.row()
            | {"seeds": len(target.losses), "is_edge": bool(tuned.edge or target.edge)}
        )
    return frames.from_rows(rows, REGRET_COLUMNS) if rows else pd.DataFrame()


def _is_measured_pair(old: Run, new: Run) -> bool:
    """Return whether neither the rank nor the number of steps falls; the gain may change in both directions."""
    return new.rank >= old.rank and (new.steps or 0) >= (old.steps or 0)


class _MeasuredCurves:
    """Curves of loss against learning rate by condition, over all seeds or over those with rates around a given one."""

    def __init__(
        self, runs: Sequence[SweepRun], tokens: Sequence[int], curves: Mapping[int, Sequence[Curve]], draws: int
    ) -> None:
        self._tokens, self._draws = tokens, draws
        # Runs of each condition that has a curve, in the order of the runs.
        measured = {
            Run(curve.rank, curve.gain, step): curve
            for step, step_curves in curves.items()
            for curve in step_curves
            if curve.rank
        }
        self._runs: dict[Run, list[SweepRun]] = {}
        for run in runs:
            for step in (step for step in sorted(curves) if run.rank and run.gain and run.reaches(step)):
                condition = Run(run.rank or 0, round(run.gain or 0.0, 9), step)
                if condition in measured:
                    self._runs.setdefault(condition, []).append(run)
        self.curves = {condition: measured[condition] for condition in self._runs}
        # Curves of subsets of the seeds are fitted on demand, and start with the curves of all seeds.
        self._covering: dict[tuple[Run, frozenset[int]], Curve | None] = {
            (condition, frozenset(curve.by_seed)): curve for condition, curve in self.curves.items()
        }

    def curve_at(self, condition: Run, learning_rate: float) -> Curve:
        """Return the curve of the seeds whose rates lie on both sides of a learning rate, or of all seeds."""
        # A rate at the end of a grid counts as covered in spite of rounding.
        runs, slack = self._runs[condition], 1 + 1e-9
        by_seed: dict[int, list[float]] = {}
        for run in runs:
            by_seed.setdefault(run.seed, []).append(run.rate)
        seeds = frozenset(
            seed
            for seed, rates in by_seed.items()
            if min(rates) <= learning_rate * slack and learning_rate <= max(rates) * slack
        )
        # Fit the curve of these seeds once; None if they have no complete grid.
        if (condition, seeds) not in self._covering:
            covering_runs = [run for run in runs if run.seed in seeds]
            curves = curves_at(covering_runs, self._tokens, condition.steps or 0, draws=self._draws)
            self._covering[condition, seeds] = curves[0] if curves else None
        # Without such seeds, the regret is a lower bound.
        return self._covering[condition, seeds] or self.curves[condition]


def regret_by_policy(costs: pd.DataFrame) -> pd.DataFrame:
    """Summarise the regret of every policy over the pairs of conditions that differ in the same settings.

    Returns:
      A row for each ``changed`` and ``policy`` with the statistics of `rora_theory.evidence.regrets.statistics_of`.
      Pairs with a best rate at the end of a grid are left out.
    """
    # At the end of a grid the lowest loss is unknown, and with it the regret.
    inside = costs[~costs["is_edge"].astype(bool)] if len(costs) else costs
    rows = [
        {"changed": changed, "policy": policy} | statistics_of(pairs, policy)
        for (changed, policy), pairs in (inside.groupby(["changed", "policy"], sort=False) if len(inside) else ())
    ]
    return frames.from_rows(rows, SUMMARY_COLUMNS)
