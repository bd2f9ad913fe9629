"""Regret of policies: what it costs to carry a best rate from one rank, G and number of steps to another.

The regret is the loss at the policy's rate, interpolated on the measured curve, minus the lowest measured loss. It is
never extrapolated: outside of a grid it is a lower bound, and a rate at which runs diverged is lost.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rora_theory.advice.best_rate import Run
from rora_theory.evidence.policies import ORIGINS, RateFactor, RatePolicy, rate_policy
from rora_theory.evidence.sweeps import Sweep
from rora_theory.runs import frames
from rora_theory.stats.estimate import jackknife
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import Regret, regret

if TYPE_CHECKING:
    import pandas as pd

SWEEP_REGRET_COLUMNS = (
    "source", "model", "steps", "old_rank", "old_gain", "rank", "gain", "policy", "factor", "tuned_rate",
    "learning_rate", "regret", "standard_error", "half_width", "low", "high", "lowest_loss", "is_lower_bound",
    "is_lost", "old_place", "place",
)  # fmt: skip
"""Columns of the table of `regrets_on_sweeps`."""

SUMMARY_COLUMNS = (
    "source", "pairs_of", "policy", "pairs", "models", "mean", "mean_error", "median", "percentile_90", "largest",
    "largest_over_interval", "lower_bounds", "lost", "bound_pairs", "largest_at_bound", "constants",
)  # fmt: skip
"""Columns of the table of `summarise_regrets`."""

Rows = list[dict[str, Any]]

SUBSETS: dict[str, Callable[["pd.DataFrame"], "pd.Series"]] = {
    "all ranks": lambda rows: rows["rank"] > 0,
    "to a higher rank": lambda rows: rows["rank"] > rows["old_rank"],
    "to a higher rank, from r = 4": lambda rows: (rows["rank"] > rows["old_rank"]) & (rows["old_rank"] >= 4),
    "to a higher rank, from r = 16": lambda rows: (rows["rank"] > rows["old_rank"]) & (rows["old_rank"] >= 16),
}
"""Pairs of a tuned and a new setting over which regrets are summarised."""


def lands_on_diverged(curve: Curve, learning_rate: float) -> bool:
    """Return whether the measured rate nearest to a learning rate diverged.

    A rate above all measured ones counts as diverged if the highest measured one did.
    """
    nearest = int(np.argmin(np.abs(np.log(curve.rates) - math.log(learning_rate))))
    return not np.isfinite(curve.losses[:, nearest]).all()


class PolicyRegret(NamedTuple):
    """Regret of a policy between two measured runs.

    Attributes:
      old: Run for which the rate was tuned.
      new: Run in which the policy's rate is used.
      policy: Name of the policy.
      target: Curve of the new run on which the regret is measured.
      cost: Regret of the policy's rate.
      is_repeated: Whether an earlier policy gives the same rate, as all powers of G do at one G.
    """

    old: Run
    new: Run
    policy: str
    target: Curve
    cost: Regret
    is_repeated: bool


def regrets_between(
    curves: Mapping[Run, Curve],
    policies: Mapping[str, RatePolicy],
    *,
    target_at: Callable[[Run, float], Curve] | None = None,
    is_pair: Callable[[Run, Run], bool] = lambda old, new: True,
) -> Iterator[PolicyRegret]:
    """Compute the regret of every policy between all pairs of measured runs.

    Args:
      curves: Loss against learning rate of each run.
      policies: Policies by name.
      target_at: Function that returns the curve of a new run on which a learning rate is judged; by default that of
        ``curves``.
      is_pair: Function that returns whether rates are carried from one run to another.
    """
    for old, new in itertools.permutations(curves, 2):
        if not is_pair(old, new):
            continue
        judged: dict[float, tuple[Curve, Regret]] = {}
        for name, policy in policies.items():
            rate = policy(old, new, curves[old].best_rate)
            is_repeated = any(math.isclose(rate, other, rel_tol=1e-9) for other in judged)
            if rate not in judged:
                target = target_at(new, rate) if target_at else curves[new]
                judged[rate] = target, regret(curves[old], target, partial(policy, old, new))
            yield PolicyRegret(old, new, name, *judged[rate], is_repeated)


def regrets_on_sweeps(sweeps: Sequence[Sweep], policies: Callable[[Sweep], Mapping[str, RateFactor]]) -> "pd.DataFrame":
    """Compute the regret of every policy between all settings of a model.

    Args:
      sweeps: Sweeps of one source or of several.
      policies: Function that returns the policies by name for a sweep, so that fitted constants can leave it out.

    Returns:
      A table with the columns `SWEEP_REGRET_COLUMNS` and a row for each ordered pair of a model's settings and each
      policy. ``gain`` is G = gamma r, ``factor`` the new rate over the tuned one. ``regret``, its ``standard_error``
      and ``half_width`` from the noise of repeated runs, ``low`` and ``high`` over the 95% interval of the tuned rate,
      and ``lowest_loss`` are in nats per token. ``is_lost`` states that the nearest measured rate diverged; the regret
      is then infinite. ``old_place`` and ``place`` state where the two best rates lie in their grids.
    """
    rows: Rows = []
    for sweep in sweeps:
        by_name = {name: rate_policy(factor) for name, factor in policies(sweep).items()}
        fits = {Run(fit.curve.rank, fit.curve.gain, sweep.steps): fit for fit in sweep.fits}
        for pair in regrets_between({run: fit.curve for run, fit in fits.items()}, by_name):
            old, new, cost = pair.old, pair.new, pair.cost
            is_lost = lands_on_diverged(pair.target, cost.learning_rate)
            rows.append(
                {"source": sweep.source, "model": sweep.model, "steps": sweep.steps}
                | {"old_rank": old.rank, "old_gain": old.gain, "rank": new.rank, "gain": new.gain}
                | {"policy": pair.policy, "factor": by_name[pair.policy](old, new, 1.0)}
                | {"tuned_rate": fits[old].best_rate}
                | cost.row()
                | ({"regret": math.inf, "is_lower_bound": False} if is_lost else {})
                | {"is_lost": is_lost, "old_place": fits[old].place, "place": fits[new].place}
            )
    return frames.from_rows(rows, SWEEP_REGRET_COLUMNS)


def statistics_of(pairs: "pd.DataFrame", policy: str) -> dict[str, Any]:
    """Return the statistics of the regret of one policy over pairs whose best rates lie inside their grids.

    Args:
      pairs: Rows of a table of regrets, at least one.
      policy: Name of the policy.

    Returns:
      The number of ``pairs``; ``mean``, ``median`` and ``largest`` regret in nats per token, without the error of the
      tuned rate; ``largest_error``, the standard error of the largest; ``largest_over_interval``, the largest regret
      over the 95% intervals of the tuned rates; ``lower_bounds``, the number of pairs whose rate lies outside the
      measured ones; and ``constants``, where those of the policy come from.
    """
    values = pairs["regret"].to_numpy(float)
    worst = pairs.iloc[int(values.argmax())]
    return {
        "pairs": len(pairs),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "largest": float(worst["regret"]),
        "largest_error": worst["standard_error"],
        "largest_over_interval": float(pairs["high"].max()),
        "lower_bounds": int(pairs["is_lower_bound"].sum()),
        "constants": ORIGINS.get(policy, "not stated"),
    }


def summarise_regrets(costs: "pd.DataFrame") -> "pd.DataFrame":
    """Summarise the regret of every policy over the pairs of each source.

    Args:
      costs: `regrets_on_sweeps`.

    Returns:
      A table with the columns `SUMMARY_COLUMNS`. ``pairs_of`` is a name of `SUBSETS`. Pairs whose best rates both lie
      inside their grids count in ``pairs`` and in the statistics, see `statistics_of`; ``mean_error`` is the
      jackknife's standard error over models. Lost pairs count as infinite. ``bound_pairs`` is the number of the pairs
      with a best rate that is only a bound, and ``largest_at_bound`` their largest regret above the lowest measured
      loss.
    """
    rows: Rows = []
    for (source, policy), of_policy in costs.groupby(["source", "policy"], sort=False) if len(costs) else ():
        for subset, is_member in SUBSETS.items():
            members = of_policy[is_member(of_policy)]
            is_inside = (members["old_place"] == "inside") & (members["place"] == "inside")
            inside, at_bound = members[is_inside], members[~is_inside]
            if inside.empty:
                continue
            by_model = [rows["regret"].to_numpy(float) for _, rows in inside.groupby("model", sort=False)]
            mean = jackknife(partial(_mean_over, by_model), len(by_model), "models")
            values = inside["regret"].to_numpy(float)
            rows.append(
                {"source": source, "pairs_of": subset, "policy": policy, "models": len(by_model)}
                | statistics_of(inside, policy)
                | {"mean": mean.value, "mean_error": mean.known_error}
                # The order statistic above 90% of the pairs: interpolation would mix finite and infinite regrets.
                | {"percentile_90": float(np.quantile(values, 0.9, method="higher"))}
                | {"lost": int(inside["is_lost"].sum()), "bound_pairs": len(at_bound)}
                | {"largest_at_bound": float(at_bound["regret"].max()) if len(at_bound) else None}
            )
    return frames.from_rows(rows, SUMMARY_COLUMNS)


def _mean_over(by_model: Sequence[np.ndarray], members: Sequence[int]) -> float:
    """Return the mean over all pairs of some models."""
    return float(np.concatenate([by_model[index] for index in members]).mean())
