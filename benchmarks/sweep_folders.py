"""Curves of loss against learning rate of published run folders, for the scripts that compare them."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import read_runs, read_tokens
from rora_theory.stats.estimate import over_seeds
from rora_theory.stats.rate_curves import Curve

DRAWS = 400
"""Number of bootstrap samples of the held-out records."""


def read_curves(folder: Path, step: int) -> list[Curve]:
    """Return the curves of a run folder after a number of steps, in ascending order of rank and scaling."""
    tokens = next(iter(read_tokens(folder).values()))[0]
    return curves_at(read_runs(folder), tokens, step, draws=DRAWS)


def best_row(curve: Curve) -> dict[str, object]:
    """Return the columns of a best rate: itself, its error in octaves over held-out records, edge and lowest loss."""
    logs = curve.log2_optimum
    row: dict[str, object] = {"rank": curve.rank, "gain": curve.gain, "best_rate": 2**logs.value}
    return row | {"log2_error": logs.known_error, "edge": curve.edge, "lowest_loss": float(curve.losses.min())}


def mean_best_rates(folder: Path, estimator: str = "three points") -> pd.Series:
    """Return the geometric mean over seeds of the best rates in ``best.csv``, by rank, gain, schedule and steps."""
    best = pd.read_csv(folder / "best.csv")
    best = best[best["estimator"] == estimator]
    logs = np.log(best["best_rate"])
    return np.exp(logs.groupby([best[name] for name in ("rank", "gain", "schedule", "steps")]).mean())


def exponent_in_steps(rates: pd.Series) -> float:
    """Return the exponent of best rates in the number of steps, from the fewest steps to the most."""
    rates = rates.sort_index()
    return math.log(rates.iloc[-1] / rates.iloc[0]) / math.log(rates.index[-1] / rates.index[0])


def mean_regrets(costs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return the mean regret over seeds by some columns, with half a 95% interval over seeds.

    ``low`` and ``high`` are the means of the lowest and highest regrets over the 95% intervals of the tuned rates.
    """
    rows = []
    for key, seeds in costs.groupby(by, sort=False):
        estimate = over_seeds(seeds.groupby("seed")["regret"].mean().to_numpy())
        row = dict(zip(by, key, strict=True)) | {"regret": estimate.value}
        row |= {"half_width": estimate.half_width() if estimate.has_error else None}
        row |= {"low": float(seeds["low"].mean()), "high": float(seeds["high"].mean())}
        row |= {"largest": float(seeds["regret"].max()), "seeds": seeds["seed"].nunique()}
        rows.append(row | {"lower_bounds": int(seeds["is_lower_bound"].sum())})
    return pd.DataFrame(rows)
