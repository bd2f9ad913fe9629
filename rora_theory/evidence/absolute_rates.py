"""Regret of learning rates that are chosen without any tuned run, on the public sweeps at G = 32."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.evidence import starting_rates
from rora_theory.evidence.policies import cookbook_rate
from rora_theory.evidence.regrets import lands_on_diverged
from rora_theory.evidence.sweeps import Sweep
from rora_theory.runs import frames
from rora_theory.stats.rate_optimum import fit_minima
from rora_theory.stats.regret import regrets_at

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "source", "model", "rank", "gain", "policy", "learning_rate", "best_rate", "place", "regret", "is_lower_bound",
    "is_lost",
)  # fmt: skip
"""Columns of the table of `absolute_regrets`."""

SUMMARY_COLUMNS = (
    "source", "policy", "settings", "models", "mean", "median", "percentile_90", "largest", "lower_bounds", "lost",
    "within_factor_2",
)  # fmt: skip
"""Columns of the table of `summarise_absolute_regrets`."""

FORMULA = "tinker-cookbook's formula"
"""Name of the rate of `policies.cookbook_rate`."""


def rates_for(model: str) -> dict[str, float]:
    """Return the rates that could be chosen for a model at rank 16 and alpha 32 without tuning it, by name.

    Args:
      model: Name of a model of the public sweeps.

    Returns:
      The formula's rate, if the formula covers the model; the starting rate that is fitted to all other models; the one
      that is fitted to other families; and one rate for all, the geometric mean of the other models' best rates.
    """
    (row,) = (row for row in frames.rows(starting_rates.model_table()) if row["model"] == model)
    others = [known for known in starting_rates.models() if known.name != model]
    other_families = [known for known in others if known.family != row["family"]]
    family, parameters = row["family"], float(row["parameters"])
    rates = {
        FORMULA: cookbook_rate(model, int(row["hidden_size"])),
        "starting rate, other models": starting_rates.fit(others).predict(family, parameters).rate,
        "starting rate, other families": starting_rates.fit(other_families).predict(None, parameters).rate,
        "one rate for all": math.exp(float(np.mean([known.log_rate for known in others]))),
    }
    return {name: rate for name, rate in rates.items() if rate is not None}


def absolute_regrets(sweeps: Sequence[Sweep]) -> "pd.DataFrame":
    """Compute the regret of rates that were chosen without a tuned run, at every rank with G = 32.

    The rates do not depend on the rank, as those of the formula do not.

    Args:
      sweeps: Sweeps of one source or of several.

    Returns:
      A table with the columns `COLUMNS`; the regret is in nats per token, and infinite where the runs diverged.
    """
    rows: list[dict[str, Any]] = []
    for sweep in sweeps:
        for name, rate in rates_for(sweep.model).items():
            for fit in (fit for fit in sweep.fits if math.isclose(fit.curve.gain, starting_rates.ALPHA)):
                (regret,), (is_lower_bound,) = regrets_at(fit.curve, np.array([rate]))
                is_lost = lands_on_diverged(fit.curve, rate)
                rows.append(
                    {"source": sweep.source, "model": sweep.model, "rank": fit.curve.rank}
                    | {"gain": fit.curve.gain, "policy": name, "learning_rate": rate}
                    | {"best_rate": fit.best_rate, "place": fit.place, "regret": math.inf if is_lost else float(regret)}
                    | {"is_lower_bound": bool(is_lower_bound) and not is_lost, "is_lost": is_lost}
                )
    return frames.from_rows(rows, COLUMNS)


def summarise_absolute_regrets(costs: "pd.DataFrame") -> "pd.DataFrame":
    """Summarise the regrets of `absolute_regrets` over the settings of the models that the formula covers.

    Args:
      costs: `absolute_regrets`.

    Returns:
      A table with the columns `SUMMARY_COLUMNS`. ``within_factor_2`` is the share of the settings with a best rate
      inside its grid whose rate is at most 2 times off.
    """
    rows: list[dict[str, Any]] = []
    covered = set(costs[costs["policy"] == FORMULA]["model"])
    for (source, policy), members in costs[costs["model"].isin(covered)].groupby(["source", "policy"], sort=False):
        values = members["regret"].to_numpy(float)
        inside = members[members["place"] == "inside"]
        ratios = np.abs(np.log2(inside["learning_rate"].to_numpy(float) / inside["best_rate"].to_numpy(float)))
        rows.append(
            {"source": source, "policy": policy, "settings": len(values), "models": members["model"].nunique()}
            | {"mean": float(values.mean()), "median": float(np.median(values))}
            | {"percentile_90": float(np.quantile(values, 0.9, method="higher")), "largest": float(values.max())}
            | {"lower_bounds": int(members["is_lower_bound"].sum()), "lost": int(members["is_lost"].sum())}
            | {"within_factor_2": float(np.mean(ratios <= 1)) if len(inside) else None}
        )
    return frames.from_rows(rows, SUMMARY_COLUMNS)


def full_ratios(full: Mapping[str, "pd.DataFrame"], sweeps: Sequence[Sweep]) -> "pd.DataFrame":
    """Return the best rate of every rank divided by that of full fine-tuning.

    Args:
      full: Runs of full fine-tuning by source, with the columns ``learning_rate`` and ``loss``.
      sweeps: Sweeps of these sources.

    Returns:
      A table with the columns ``source``, ``model``, ``rank``, ``gain``, ``best_rate``, ``full_rate`` and
      ``ratio``, for the ranks and sources whose best rates lie inside their grids.
    """
    rows: list[dict[str, Any]] = []
    for sweep in sweeps:
        table = full.get(sweep.source)
        if table is None or len(table) < 3:
            continue
        rates, losses = (table[column].to_numpy(float) for column in ("learning_rate", "loss"))
        (best,) = fit_minima(rates, losses[None], sweep.curves[0].reach)
        if best.edge:
            continue
        rows += [
            {"source": sweep.source, "model": sweep.model, "rank": fit.curve.rank, "gain": fit.curve.gain}
            | {"best_rate": fit.best_rate, "full_rate": best.rate, "ratio": fit.best_rate / best.rate}
            for fit in sweep.fits
            if fit.is_inside
        ]
    columns = ("source", "model", "rank", "gain", "best_rate", "full_rate", "ratio")
    return frames.from_rows(rows, columns)
