"""Compare laws of the best rate in G on models that gave none of their constants.

    python benchmarks/gain_policies.py --out results/published/gain_policies --external EXTERNAL

Each law has one constant: the power p of G^-p, or K of the displacement law (c = 1). A model's own constant is the one
with the lowest mean regret on its runs. For each model in turn the laws have the mean of the other models' constants
(of K the geometric mean), and the regret is that on the model left out. Beside them are laws without a constant. All
laws have the advice's exponent in the rank.

A pair is two settings of one seed, schedule and number of steps that differ in G, in both directions, with both best
rates inside their grids. The tuned rate is that of the first setting.

Which law the advice has was fixed before the runs of SmolLM2 and Gemma in ``gain_seeds``: the displacement law if, with
constants of other models, its mean regret is the lower one over all models and in at least half of them; otherwise the
power of G, which is simpler. The constant is the mean over the models of our runs until then: with that of the public
model, as the rule first said, that model would no longer be a test. The second small model came later: a test too.

- ``policies.csv`` has a row for each model and law: mean, median and largest regret in nats per token, the number of
  pairs, and the constant. ``all models`` is the mean over the models.
- ``tests.csv`` has the same for runs that came after the constants: those of SmolLM2 and Gemma under cosine decay, of
  Gemma's seeds after the first, and of the small model at other ranks and after 4,096 steps. They are in none of the
  other tables.
- ``constants.csv`` has each model's own constants, and whether the runs are ours.
- ``scan.csv`` has the mean regret of each model by law and constant.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gain_laws
import numpy as np
import pandas as pd
from gain_grid import DESIGNS, SCHEDULES
from sweep_folders import read_curves

from rora_theory.advice.constants import CONSTANTS
from rora_theory.evidence.policies import RateFactor, displacement_law, power_of_gain, with_rank
from rora_theory.evidence.sweeps import load_sweeps
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regrets_at

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
BATCH_SIZE = 4
"""Number of records per step."""

SMALLEST_CHANGE = 1.2
"""Smallest ratio of the two G of a pair."""

POWERS = np.arange(0.4, 1.01, 0.025)
CONSTANTS_K = np.geomspace(5, 500, 41)
"""Powers and displacement constants among which the best is chosen."""

WITHOUT_CONSTANT = {"keep the rate": 0.0, "square root": 0.5, "G^-0.75": 0.75, "first step": 1.0}
"""Powers that were not fitted, by name."""

FITTED_SEEDS: Mapping[str, tuple[int, ...]] = {"smollm2": (0, 1, 2), "gemma": (0,)}
"""Seeds in ``gain_seeds`` that existed when the constants were fitted; later ones are tests."""

OUR_MODELS = ("small model", "SmolLM2-135M", "Gemma 3 270M")
"""Models of our runs, from which the K of the advice comes."""

RANK_EXPONENT = CONSTANTS["rank_exponent"].value


@dataclass(frozen=True)
class Pair:
    """Two settings of one seed.

    Attributes:
      tuned_rate: Best rate of the first setting.
      old_rank: Rank of the first setting.
      old_gain: G of the first setting.
      curve: Curve of the second setting.
    """

    tuned_rate: float
    old_rank: int
    old_gain: float
    curve: Curve

    def regret(self, law: RateFactor) -> float:
        """Return the regret of a law at the second setting, in nats per token."""
        rate = self.tuned_rate * law(self.old_rank, self.old_gain, self.curve.rank, self.curve.gain)
        return float(regrets_at(self.curve, np.array([rate]))[0][0])


def pairs_of(curves: Iterable[Curve]) -> list[Pair]:
    """Return all ordered pairs of settings that differ in G."""
    inside = [curve for curve in curves if not curve.edge and curve.gain > 0]  # full fine-tuning has no G
    return [
        Pair(old.best_rate, old.rank, old.gain, new)
        for old, new in itertools.permutations(inside, 2)
        if abs(math.log(new.gain / old.gain)) > math.log(SMALLEST_CHANGE)
    ]


def published_pairs(folder: str, steps: Iterable[int]) -> list[Pair]:
    """Return the pairs of a published run folder after each number of steps."""
    return [pair for step in steps for pair in pairs_of(read_curves(PUBLISHED / folder, step))]


@functools.cache
def seed_curves(design: str, *folders: str) -> dict[int, gain_laws.Curves]:
    """Return the curves of every seed of a grid of `gain_grid` from its published folders."""
    return dict(gain_laws.read_seeds([PUBLISHED / folder for folder in folders], DESIGNS[design]))


def seeded_pairs(design: str, schedule: str, *folders: str, is_later: bool = False) -> list[Pair]:
    """Return the pairs of the seeds that count, or of the later ones, at the last number of steps.

    Both settings of a pair have batches of one size.
    """
    counted = FITTED_SEEDS.get(design, DESIGNS[design].seeds)
    last = DESIGNS[design].steps(schedule)
    return [
        pair
        for seed, curves in seed_curves(design, *folders).items()
        if (seed in counted) != is_later
        for pair in pairs_of(
            curve
            for key, curve in curves.items()
            if (key.schedule, key.steps, key.batch_size) == (schedule, last, BATCH_SIZE)
        )
    ]


def all_pairs(external: Path | None) -> dict[str, dict[str, list[Pair]]]:
    """Return the pairs by model and, within it, by set of runs."""
    pairs: dict[str, dict[str, list[Pair]]] = {
        "SmolLM2-135M": {
            "constant": published_pairs("horizon", (64, 256)),
            "cosine, use_rslora": [
                pair
                for seed in sorted((PUBLISHED / "use_rslora").glob("seed_*"))
                for pair in pairs_of(read_curves(seed, 256))
            ],
        },
        "Gemma 3 270M": {"constant": published_pairs("horizon_gemma", (64,))},
        "small model": {schedule: seeded_pairs("small", schedule, "small_models") for schedule in SCHEDULES},
        "second small model": {schedule: seeded_pairs("medium", schedule, "medium_model") for schedule in SCHEDULES},
    }
    for model, name in (("SmolLM2-135M", "smollm2"), ("Gemma 3 270M", "gemma")):
        pairs[model]["constant, new data"] = seeded_pairs(name, "constant", f"gain_seeds/{name}")
    if external is not None:
        (sweep,) = load_sweeps("qwen2.5-7b", external)
        pairs["Qwen2.5-7B"] = {"alpha = r": pairs_of(fit.curve for fit in sweep.fits if fit.is_inside)}
    return {
        model: chosen
        for model, sets in pairs.items()
        if (chosen := {name: rows for name, rows in sets.items() if rows})
    }


def later_pairs() -> dict[str, dict[str, list[Pair]]]:
    """Return the pairs of the runs that came after the constants, by model and set of runs."""
    return {
        "SmolLM2-135M": {"cosine": seeded_pairs("smollm2", "cosine", "gain_seeds/smollm2")},
        "Gemma 3 270M": {
            "constant, later seeds": seeded_pairs("gemma", "constant", "gain_seeds/gemma", is_later=True),
            "cosine": seeded_pairs("gemma", "cosine", "gain_seeds/gemma"),
        },
        "small model": {
            "other ranks, constant": seeded_pairs("small_more", "constant", "small_more"),
            "other ranks, cosine": seeded_pairs("small_more", "cosine", "small_more"),
            "4,096 steps": seeded_pairs("long_gains", "constant", "small_long", "long_gains"),
        },
    }


def power(exponent: float) -> RateFactor:
    """Return the law G^-exponent, with the advice's exponent in the rank."""
    return with_rank(power_of_gain(-exponent), RANK_EXPONENT)


def displacement(constant: float) -> RateFactor:
    """Return the displacement law with a constant K, with the advice's exponent in the rank."""
    return with_rank(displacement_law(constant), RANK_EXPONENT)


@dataclass(frozen=True)
class Family:
    """Law with one constant.

    Attributes:
      law: Law of a constant.
      constants: Constants among which the best is chosen.
      mean: Mean of the constants of several models.
    """

    law: Callable[[float], RateFactor]
    constants: np.ndarray
    mean: Callable[[pd.Series], float]


FAMILIES = {
    "power of G": Family(power, POWERS, lambda values: float(values.mean())),
    "displacement law": Family(displacement, CONSTANTS_K, lambda values: float(np.exp(np.log(values).mean()))),
}


def mean_regret(sets: Mapping[str, list[Pair]], law: RateFactor) -> float:
    """Return a model's mean regret of a law; its sets of runs have the same weight."""
    return float(np.mean([np.mean([pair.regret(law) for pair in pairs]) for pairs in sets.values()]))


def scan(pairs: Mapping[str, Mapping[str, list[Pair]]]) -> pd.DataFrame:
    """Return the mean regret of every model by law and constant."""
    return pd.DataFrame(
        {
            "model": model,
            "law": law,
            "constant": constant,
            "regret": mean_regret(sets, family.law(constant)),
        }
        for (model, sets), (law, family) in itertools.product(pairs.items(), FAMILIES.items())
        for constant in family.constants.tolist()
    )


def own_constants(table: pd.DataFrame) -> pd.DataFrame:
    """Return the constant of each model and law with the lowest regret, from `scan`."""
    best = table.loc[table.groupby(["law", "model"], sort=False)["regret"].idxmin()].reset_index(drop=True)
    return best.assign(is_ours=best["model"].isin(OUR_MODELS))


def judged_sets(pairs: Mapping[str, Mapping[str, list[Pair]]], own: pd.DataFrame) -> pd.DataFrame:
    """Return the regret of every law on every set of runs, with the mean constant of the other models."""
    rows = []
    for model, sets in pairs.items():
        laws = {name: (power(exponent), exponent) for name, exponent in WITHOUT_CONSTANT.items()}
        for law, family in FAMILIES.items():
            constant = family.mean(own[(own["law"] == law) & (own["model"] != model)]["constant"])
            laws[law] = family.law(constant), constant
        for (runs, chosen), (law, (factor, constant)) in itertools.product(sets.items(), laws.items()):
            costs = np.array([pair.regret(factor) for pair in chosen])
            row = {"model": model, "runs": runs, "law": law, "constant": constant, "pairs": len(costs)}
            rows.append(row | {"mean": costs.mean(), "median": np.median(costs), "largest": costs.max()})
    return pd.DataFrame(rows)


def judged(pairs: Mapping[str, Mapping[str, list[Pair]]], own: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `judged_sets`, with the means over the sets of each model and over the models."""
    frame = judged_sets(pairs, own)
    by_model = frame.groupby(["model", "law"], sort=False).agg(
        pairs=("pairs", "sum"), mean=("mean", "mean"), largest=("largest", "max")
    )
    totals = by_model.reset_index().assign(runs="all")
    over = by_model.groupby("law", sort=False).agg(
        pairs=("pairs", "sum"), mean=("mean", "mean"), largest=("largest", "max")
    )
    over = over.reset_index().assign(model="all models", runs="all")
    return pd.concat([frame, totals, over], ignore_index=True)


def main() -> None:
    """Write the tables of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "gain_policies")
    parser.add_argument("--external", type=Path, help="folder of the public runs; without it Qwen2.5 7B is left out")
    args = parser.parse_args()
    pairs = all_pairs(args.external)
    scanned = scan(pairs)
    own = own_constants(scanned)
    tables = {"scan": scanned, "constants": own, "policies": judged(pairs, own)}
    tables["tests"] = judged_sets(later_pairs(), own)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        (args.out / f"{name}.csv").write_text(frames.to_csv(frame))
    for name in ("constants", "policies", "tests"):
        print(f"{name}.csv\n{tables[name].to_string(index=False)}\n")


if __name__ == "__main__":
    main()
