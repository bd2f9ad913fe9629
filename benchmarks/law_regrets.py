"""What it costs to carry tuned rates between settings by laws of one constant, judged on models that gave none of it.

A model has sets of runs, and each set has pairs of settings. A model's regret is the mean over its sets of the mean
over their pairs, so that every set has the same weight, and so has every model.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gain_laws
import numpy as np
import pandas as pd
from gain_grid import DESIGNS
from sweep_folders import regret_at

from rora_theory.advice.best_rate import Run
from rora_theory.lab.sweep.curves import ESTIMATORS, THREE_POINTS
from rora_theory.stats.rate_curves import Curve

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

Law = Callable[[Run, Run], float]
"""Factor of the best rate from an old setting to a new one."""


@dataclass(frozen=True)
class Pair:
    """Two settings, of which the old one was tuned.

    Attributes:
      old: Old setting.
      new: New setting.
      tuned_rate: Best rate of the old setting.
      best_rate: Best rate of the new setting.
      curve: Curve of the new setting.
    """

    old: Run
    new: Run
    tuned_rate: float
    best_rate: float
    curve: Curve

    def regret(self, law: Law) -> tuple[float, bool]:
        """Return the regret of a law in nats per token, and whether it is a lower bound."""
        return regret_at(self.curve, self.tuned_rate * law(self.old, self.new))


Pairs = Mapping[str, Mapping[str, Sequence[Pair]]]
"""Pairs by model and, within it, by set of runs."""


def pairs_of(
    curves: Iterable[tuple[Run, Curve]], is_pair: Callable[[Run, Run], bool], estimator: str = THREE_POINTS
) -> list[Pair]:
    """Return the ordered pairs of settings that count as one, of those with a best rate inside their grids.

    Args:
      curves: Curves with their settings; full fine-tuning, which has no G, is left out.
      is_pair: Whether an old and a new setting are a pair.
      estimator: Estimator of a best rate, a name from `ESTIMATORS`.
    """
    inside = [
        (run, curve, 2 ** ESTIMATORS[estimator]((1.0,), curve).value)
        for run, curve in curves
        if curve.gain > 0 and not curve.edge
    ]
    return [
        Pair(old, new, tuned_rate, best_rate, curve)
        for (old, _, tuned_rate), (new, curve, best_rate) in itertools.permutations(inside, 2)
        if is_pair(old, new)
    ]


@functools.cache
def seed_curves(design: str, *folders: str) -> Mapping[int, Mapping[Run, Curve]]:
    """Return the curves of every seed of a grid of `gain_grid` from its published folders."""
    seeds = gain_laws.read_seeds([PUBLISHED / folder for folder in folders], DESIGNS[design])
    return {
        seed: {
            Run(key.rank, curve.gain, key.steps, key.schedule, key.batch_size): curve for key, curve in curves.items()
        }
        for seed, curves in seeds.items()
    }


@dataclass(frozen=True)
class Family:
    """Laws with one constant.

    Attributes:
      law: Law of a constant.
      constants: Constants among which the best is chosen.
    """

    law: Callable[[float], Law]
    constants: np.ndarray


def mean_regret(sets: Mapping[str, Sequence[Pair]], law: Law) -> float:
    """Return a model's mean regret of a law."""
    return float(np.mean([np.mean([pair.regret(law)[0] for pair in pairs]) for pairs in sets.values()]))


def scan(pairs: Pairs, families: Mapping[str, Family]) -> pd.DataFrame:
    """Return the mean regret of every model by law and constant."""
    return pd.DataFrame(
        {"model": model, "law": law, "constant": constant, "regret": mean_regret(sets, family.law(constant))}
        for (model, sets), (law, family) in itertools.product(pairs.items(), families.items())
        for constant in family.constants.tolist()
    )


def own_constants(scanned: pd.DataFrame) -> pd.DataFrame:
    """Return the row of `scan` with the lowest regret of each model and law."""
    return scanned.loc[scanned.groupby(["law", "model"], sort=False)["regret"].idxmin()].reset_index(drop=True)


def judge(pairs: Pairs, laws_of: Callable[[str], Mapping[str, tuple[Law, float]]]) -> pd.DataFrame:
    """Return the regret of every law on every set of runs.

    Args:
      pairs: Pairs of all models.
      laws_of: Laws with their constants by which a model is judged, by name.

    Returns:
      A row for each set of runs and law: ``model``, ``runs``, ``law``, ``constant``, the number of ``pairs``, ``mean``,
      ``median`` and ``largest`` regret in nats per token, and how many regrets are ``lower_bounds``.
    """
    rows: list[dict[str, Any]] = []
    for model, sets in pairs.items():
        laws = laws_of(model)
        for (runs, chosen), (name, (law, constant)) in itertools.product(sets.items(), laws.items()):
            costs, bounds = zip(*(pair.regret(law) for pair in chosen), strict=True)
            row = {"model": model, "runs": runs, "law": name, "constant": constant, "pairs": len(costs)}
            row |= {"mean": np.mean(costs), "median": np.median(costs), "largest": max(costs)}
            rows.append(row | {"lower_bounds": sum(bounds)})
    return pd.DataFrame(rows)


def with_totals(judged: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `judge`, with those over the sets of each model and over ``all models``."""

    def total(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
        parts = {"pairs": "sum", "mean": "mean", "largest": "max", "lower_bounds": "sum"}
        return table.groupby(by, sort=False).agg(parts).reset_index()

    by_model = total(judged, ["model", "law"]).assign(runs="all")
    over_models = total(by_model, ["law"]).assign(model="all models", runs="all")
    return pd.concat([judged, by_model, over_models], ignore_index=True)
