"""Regret of policies on public sweeps: what it costs to carry a best rate from one rank and G to another.

The regret is the loss at the policy's rate, interpolated on the measured curve, minus the lowest measured loss. It is
never extrapolated: outside of a grid it is a lower bound, and a rate at which runs diverged is lost.
"""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.evidence.policies import ORIGINS, RateFactor
from rora_theory.evidence.sweeps import BestRateFit, Sweep
from rora_theory.runs import frames
from rora_theory.stats.estimate import jackknife
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import Regret, regret

if TYPE_CHECKING:
    import pandas as pd

REGRET_COLUMNS = (
    "source", "model", "steps", "old_rank", "old_gain", "rank", "gain", "policy", "factor", "tuned_rate",
    "learning_rate", "regret", "standard_error", "half_width", "low", "high", "lowest_loss", "is_lower_bound",
    "is_lost", "old_place", "place",
)  # fmt: skip
"""Columns of the table of `regret_table`."""

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


def regret_table(sweeps: Sequence[Sweep], policies: Callable[[Sweep], Mapping[str, RateFactor]]) -> "pd.DataFrame":
    """Compute the regret of every policy between all settings of a model.

    Args:
      sweeps: Sweeps of one source or of several.
      policies: Function that returns the policies by name for a sweep, so that fitted constants can leave it out.

    Returns:
      A table with the columns `REGRET_COLUMNS` and a row for each ordered pair of a model's settings and each policy.
      ``gain`` is G = gamma r, ``factor`` the new rate over the tuned one. ``regret``, its ``standard_error`` and
      ``half_width`` from the noise of repeated runs, ``low`` and ``high`` over the 95% interval of the tuned rate, and
      ``lowest_loss`` are in nats per token. ``is_lost`` states that the nearest measured rate diverged; the regret is
      then infinite. ``old_place`` and ``place`` state where the two best rates lie in their grids.
    """
    rows: Rows = []
    for sweep in sweeps:
        by_name = policies(sweep)
        for old, new in itertools.permutations(sweep.fits, 2):
            # Policies that agree, such as all powers of G at one G, share a regret.
            by_factor: dict[float, Regret] = {}
            for name, policy in by_name.items():
                factor = policy(old.curve.rank, old.curve.gain, new.curve.rank, new.curve.gain)
                if factor not in by_factor:
                    by_factor[factor] = regret(old.curve, new.curve, partial(operator.mul, factor))
                rows.append(_row(sweep, old, new, name, factor, by_factor[factor]))
    return frames.from_rows(rows, REGRET_COLUMNS)


def _row(sweep: Sweep, old: BestRateFit, new: BestRateFit, policy: str, factor: float, cost: Regret) -> dict[str, Any]:
    is_lost = lands_on_diverged(new.curve, cost.learning_rate)
    return (
        {"source": sweep.source, "model": sweep.model, "steps": sweep.steps}
        | {"old_rank": old.curve.rank, "old_gain": old.curve.gain}
        | {"rank": new.curve.rank, "gain": new.curve.gain}
        | {"policy": policy, "factor": factor, "tuned_rate": old.best_rate}
        | cost.row()
        | ({"regret": math.inf, "is_lower_bound": False} if is_lost else {})
        | {"is_lost": is_lost, "old_place": old.place, "place": new.place}
    )


def summarise_regrets(costs: "pd.DataFrame") -> "pd.DataFrame":
    """Summarise the regret of every policy over the pairs of each source.

    Args:
      costs: `regret_table`.

    Returns:
      A table with the columns `SUMMARY_COLUMNS`. ``pairs_of`` is a name of `SUBSETS`. Pairs whose best rates both lie
      inside their grids count in ``pairs`` and in the statistics, in nats per token; ``mean_error`` is the jackknife's
      standard error over models. They do not include the error of the tuned rate: ``largest_over_interval`` is the
      largest regret over its 95% intervals. Lost pairs count as infinite. ``lower_bounds`` is the number of pairs with
      a rate outside the measured ones, ``bound_pairs`` that of the pairs with a best rate that is only a bound, and
      ``largest_at_bound`` their largest regret above the lowest measured loss. ``constants`` states where those of the
      policy come from.
    """
    rows: Rows = []
    for (source, policy), of_policy in costs.groupby(["source", "policy"], sort=False) if len(costs) else ():
        for subset, is_member in SUBSETS.items():
            members = of_policy[is_member(of_policy)]
            is_inside = (members["old_place"] == "inside") & (members["place"] == "inside")
            inside, at_bound = members[is_inside], members[~is_inside]
            if inside.empty:
                continue
            values = inside["regret"].to_numpy(float)
            by_model = [rows["regret"].to_numpy(float) for _, rows in inside.groupby("model", sort=False)]
            mean = jackknife(partial(_mean_over, by_model), len(by_model), "models")
            rows.append(
                {"source": source, "pairs_of": subset, "policy": policy, "pairs": len(values), "models": len(by_model)}
                | {"mean": mean.value, "mean_error": mean.known_error, "median": float(np.median(values))}
                # The order statistic above 90% of the pairs: interpolation would mix finite and infinite regrets.
                | {"percentile_90": float(np.quantile(values, 0.9, method="higher")), "largest": float(values.max())}
                | {"largest_over_interval": float(inside["high"].max())}
                | {"lower_bounds": int(inside["is_lower_bound"].sum()), "lost": int(inside["is_lost"].sum())}
                | {"bound_pairs": len(at_bound), "constants": ORIGINS.get(policy, "not stated")}
                | {"largest_at_bound": float(at_bound["regret"].max()) if len(at_bound) else None}
            )
    return frames.from_rows(rows, SUMMARY_COLUMNS)


def _mean_over(by_model: Sequence[np.ndarray], kept: Sequence[int]) -> float:
    """Return the mean over all pairs of some models."""
    return float(np.concatenate([by_model[index] for index in kept]).mean())
