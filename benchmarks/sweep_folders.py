"""Curves of loss against learning rate of published run folders, for the scripts that compare them."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from rora_theory.advice.best_rate import Run
from rora_theory.lab.sweep.curves import ESTIMATORS, curves_at
from rora_theory.lab.sweep.runs import read_runs, read_tokens
from rora_theory.optimizers import Schedule
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regrets_at

DRAWS = 400
"""Number of bootstrap samples of the held-out records."""


def read_curves(folder: Path, step: int, draws: int = DRAWS) -> list[Curve]:
    """Return the curves of a run folder after a number of steps, in ascending order of rank and scaling."""
    tokens = next(iter(read_tokens(folder).values()))[0]
    return curves_at(read_runs(folder), tokens, step, draws=draws)


def curves_after(
    folder: Path, steps: Iterable[int], schedule: Schedule = "constant", draws: int = DRAWS
) -> dict[Run, Curve]:
    """Return the curves of a run folder after each number of steps, by their settings."""
    return {
        Run(curve.rank, curve.gain, step, schedule): curve
        for step in steps
        for curve in read_curves(folder, step, draws)
    }


def regret_at(curve: Curve, learning_rate: float) -> tuple[float, bool]:
    """Return the regret of a learning rate in nats per token, and whether it is a lower bound."""
    (cost,), (is_lower_bound,) = regrets_at(curve, np.array([learning_rate]))
    return float(cost), bool(is_lower_bound)


def log2_ratios(first: Curve, second: Curve) -> dict[str, Estimate]:
    """Return log2 of the best rate of the second curve over that of the first, of the same seeds, by estimator."""
    return {name: compute((-1.0, 1.0), first, second) for name, compute in ESTIMATORS.items()}


def distinct_factors(by_name: Mapping[str, Callable[[Run, Run, float], float]], old: Run, new: Run) -> dict[str, float]:
    """Return the factor of the rate by every policy, without policies that give the same rate as an earlier one.

    All laws in G agree at one G, for example.
    """
    factors: dict[str, float] = {}
    for policy, rate_of in by_name.items():
        factor = rate_of(old, new, 1.0)
        if not any(math.isclose(factor, other) for other in factors.values()):
            factors[policy] = factor
    return factors


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
