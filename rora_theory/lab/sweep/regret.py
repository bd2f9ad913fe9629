"""Regret of policies in the measured runs: what it costs to keep, divide or scale a tuned learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from rora_theory.advice.best_rate import Run, carry_rate
from rora_theory.evidence.policies import displacement_law, power_of_gain
from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.laws import constant_gradient
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regret

REGRET_COLUMNS = (
    "old_rank", "old_gain", "old_steps", "rank", "gain", "steps", "changed", "policy", "tuned_rate", "learning_rate",
    "regret", "standard_error", "half_width", "error_over", "low", "high", "per_cent", "lowest_loss", "seeds",
    "is_lower_bound", "is_edge",
)  # fmt: skip
"""Columns of `regret_table`."""

RatePolicy = Callable[[Run, Run, float], float]
"""Learning rate for the new condition, from the old condition, the new one and the rate tuned in the old one.

Of a condition, the rank, the gain and the number of steps are given.
"""

ORIGINS: Mapping[str, str] = {
    "keep the rate": "none",
    "first step": "none",
    "square root": "none",
    "G^-0.75": "the power was chosen after the runs of SmolLM2-135M",
    "displacement": "K of the runs that are judged",
    "displacement and steps": "K of the runs that are judged; the power -1/2 of the steps is that of a random walk",
    "advice": "K of three of our models and the steps' power of four; the rank's power of 14 public models",
    "constant gradient": "crossing distance of the model's first step",
}
"""Where the constants of each policy come from."""


def _steps(run: Run) -> int:
    assert run.steps is not None, "a measured condition has a number of steps"
    return run.steps


def policies(constants: Mapping[int, float], *, crossing_distance: float | None = None) -> dict[str, RatePolicy]:
    """Return the policies that are compared, by name.

    Args:
      constants: Displacement constant K by number of steps; the nearest number in log is used. If empty, the policies
        of the displacement law with a measured constant are left out.
      crossing_distance: Median crossing distance of the model's modules; None leaves the constant-gradient law out.

    Returns:
      Policies that leave the rate alone when the number of steps changes (``keep the rate``, ``first step``,
      ``square root``, ``G^-0.75``, ``displacement``, ``constant gradient``), ``displacement and steps``, and
      ``advice``: the rate of `rora_theory.transfer`, whose constants are the default ones and not those of the runs.
    """

    def by_power(power: float) -> RatePolicy:
        factor = power_of_gain(power)
        return lambda old, new, rate: rate * factor(old.rank, old.gain, new.rank, new.gain)

    # The displacement law, with the constant measured at about this number of steps.
    def displacement_rate(old: Run, new: Run, rate: float) -> float:
        # A number of steps without a constant uses that of the nearest one.
        steps = min(constants, key=lambda steps: abs(math.log(steps / _steps(old))))
        return rate * displacement_law(constants[steps])(old.rank, old.gain, new.rank, new.gain)

    # The law of a constant gradient: the change at the horizon stays the same. rate * steps / crossing_distance is the
    # ratio of the A part to the B part at the old horizon.
    def constant_gradient_rate(old: Run, new: Run, rate: float) -> float:
        assert crossing_distance is not None
        return rate * constant_gradient.rate_factor(new.gain / old.gain, rate * _steps(old) / crossing_distance)

    # The displacement law, with the random walk's exponent in the steps.
    def displacement_and_steps_rate(old: Run, new: Run, rate: float) -> float:
        return displacement_rate(old, new, rate) * (_steps(new) / _steps(old)) ** -0.5

    by_name: dict[str, RatePolicy] = {
        "keep the rate": by_power(0.0),
        "first step": by_power(-1.0),
        "square root": by_power(-0.5),
        "G^-0.75": by_power(-0.75),
    }
    if constants:
        by_name |= {"displacement": displacement_rate, "displacement and steps": displacement_and_steps_rate}
    # The rate that `rora_theory.transfer` returns does not depend on a schedule that both runs share.
    by_name["advice"] = lambda old, new, rate: carry_rate(rate, old, new).best
    return by_name if crossing_distance is None else by_name | {"constant gradient": constant_gradient_rate}


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
      by_name: Policies by name, see `policies`.
      draws: Number of bootstrap samples of the held-out records, for curves of a subset of the seeds.

    Returns:
      A row for each pair and policy with the columns `REGRET_COLUMNS`: the settings, which of them ``changed``, the
      ``policy``, ``tuned_rate``, the columns of `Regret.row`, the number of ``seeds``, and ``is_edge`` (a best rate of
      either curve lies at the end of its grid).
    """
    # Every measured condition is an old one, with its tuned rate, and a new one for the others.
    measured = _MeasuredCurves(runs, tokens, curves, draws)
    rows: list[dict[str, Any]] = []
    for old, tuned in measured.curves.items():
        tuned_rate = tuned.best_rate
        # Skip lower ranks and shorter runs; the gain may change in both directions.
        for new, all_seeds in measured.curves.items():
            if new == old or new.rank < old.rank or _steps(new) < _steps(old):
                continue
            changed = [name for name in ("rank", "gain", "steps") if getattr(old, name) != getattr(new, name)]
            rates: list[float] = []
            for name, policy in by_name.items():
                rate = policy(old, new, tuned_rate)
                # Policies that agree by construction, such as all laws at an unchanged G, have one row: the first's.
                if any(math.isclose(rate, other_rate, rel_tol=1e-9) for other_rate in rates):
                    continue
                rates.append(rate)
                # Seeds with rates on both sides of the policy's rate, if there are any: otherwise the regret is a lower
                # bound.
                target = measured.covering(new, rate) or all_seeds
                rows.append(
                    {"old_rank": old.rank, "old_gain": old.gain, "old_steps": old.steps}
                    | {"rank": new.rank, "gain": new.gain, "steps": new.steps}
                    | {"changed": " ".join(changed), "policy": name, "tuned_rate": tuned_rate}
                    | regret(tuned, target, partial(policy, old, new)).row()
                    | {"seeds": len(target.losses), "is_edge": bool(tuned.edge or target.edge)}
                )
    return frames.from_rows(rows, REGRET_COLUMNS) if rows else pd.DataFrame()


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

    def covering(self, condition: Run, learning_rate: float) -> Curve | None:
        """Return the curve of the seeds whose rates lie on both sides of a learning rate, or None."""
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
            curves = curves_at(covering_runs, self._tokens, _steps(condition), draws=self._draws)
            self._covering[condition, seeds] = curves[0] if curves else None
        return self._covering[condition, seeds]


def regret_by_policy(costs: pd.DataFrame) -> pd.DataFrame:
    """Summarise the regret of every policy over the pairs of conditions that differ in the same settings.

    Returns:
      A row for each ``changed`` and ``policy``: ``pairs``, ``median``, ``mean`` and ``largest`` regret in nats per
      token, without the error of the tuned rate; ``largest_error``, the standard error of the largest;
      ``largest_over_interval``, the largest regret over the 95% intervals of the tuned rates; ``lower_bounds``, the
      number of pairs whose rate lies outside the measured ones; and ``constants``, from `ORIGINS`. Pairs with a best
      rate at the end of a grid are left out.
    """
    rows: list[dict[str, Any]] = []
    # At the end of a grid the lowest loss is unknown, and with it the regret.
    inside = costs[~costs["is_edge"].astype(bool)] if len(costs) else costs
    for (changed, policy), pairs in inside.groupby(["changed", "policy"], sort=False) if len(inside) else ():
        worst = pairs.loc[pairs["regret"].idxmax()]
        rows.append(
            {"changed": changed, "policy": policy, "pairs": len(pairs), "median": float(pairs["regret"].median())}
            | {"mean": float(pairs["regret"].mean())}
            | {"largest": float(worst["regret"]), "largest_error": worst["standard_error"]}
            | {"largest_over_interval": float(pairs["high"].max())}
            | {"lower_bounds": int(pairs["is_lower_bound"].sum()), "constants": ORIGINS[policy]}
        )
    columns = ["changed", "policy", "pairs", "median", "mean", "largest", "largest_error", "largest_over_interval"]
    columns += ["lower_bounds", "constants"]
    return frames.from_rows(rows, columns)
