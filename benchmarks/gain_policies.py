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
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from gain_grid import DESIGNS, SCHEDULES
from law_regrets import (
    PUBLISHED,
    Family,
    Law,
    Pair,
    Pairs,
    judge,
    own_constants,
    pairs_of,
    scan,
    seed_curves,
    with_totals,
)
from sweep_folders import curves_after

from rora_theory.advice.best_rate import Run
from rora_theory.advice.constants import CONSTANTS
from rora_theory.evidence.policies import POWERS_OF_GAIN, RateFactor, displacement_law, power_of_gain, with_rank
from rora_theory.evidence.sweeps import load_sweeps
from rora_theory.runs import frames

BATCH_SIZE = 4
"""Number of records per step."""

SMALLEST_CHANGE = 1.2
"""Smallest ratio of the two G of a pair."""

POWERS = np.arange(0.4, 1.01, 0.025)
CONSTANTS_K = np.geomspace(5, 500, 41)
"""Powers and displacement constants among which the best is chosen."""

FITTED_SEEDS: Mapping[str, tuple[int, ...]] = {"smollm2": (0, 1, 2), "gemma": (0,)}
"""Seeds in ``gain_seeds`` that existed when the constants were fitted; later ones are tests."""

OUR_MODELS = ("small model", "SmolLM2-135M", "Gemma 3 270M")
"""Models of our runs, from which the K of the advice comes."""

RANK_EXPONENT = CONSTANTS["rank_exponent"].value


def is_pair(old: Run, new: Run) -> bool:
    """Return whether two settings differ in G and at most in the rank beside it."""
    is_change = abs(math.log(new.gain / old.gain)) > math.log(SMALLEST_CHANGE)
    return is_change and replace(old, rank=new.rank, gain=new.gain) == new


def published_pairs(folder: str, steps: Iterable[int]) -> list[Pair]:
    """Return the pairs of a published run folder after each number of steps."""
    return pairs_of(curves_after(PUBLISHED / folder, steps).items(), is_pair)


def seeded_pairs(design: str, schedule: str, *folders: str, is_later: bool = False) -> list[Pair]:
    """Return the pairs of the seeds that count, or of the later ones, at the last number of steps."""
    counted = FITTED_SEEDS.get(design, DESIGNS[design].seeds)
    shared = (schedule, DESIGNS[design].steps(schedule), BATCH_SIZE)
    return [
        pair
        for seed, curves in seed_curves(design, *folders).items()
        if (seed in counted) != is_later
        for pair in pairs_of(
            (item for item in curves.items() if (item[0].schedule, item[0].steps, item[0].batch_size) == shared),
            is_pair,
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
                for pair in published_pairs(f"use_rslora/{seed.name}", (256,))
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
        pairs["Qwen2.5-7B"] = {
            "alpha = r": pairs_of(
                ((Run(fit.curve.rank, fit.curve.gain), fit.curve) for fit in sweep.fits if fit.is_inside), is_pair
            )
        }
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
            # No run under cosine decay gave a constant: all seeds are tests.
            "cosine": seeded_pairs("gemma", "cosine", "gain_seeds/gemma")
            + seeded_pairs("gemma", "cosine", "gain_seeds/gemma", is_later=True),
        },
        "small model": {
            "other ranks, constant": seeded_pairs("small_more", "constant", "small_more"),
            "other ranks, cosine": seeded_pairs("small_more", "cosine", "small_more"),
            "4,096 steps": seeded_pairs("long_gains", "constant", "small_long", "long_gains"),
        },
    }


def law_of(factor: RateFactor) -> Law:
    """Return a law in G, with the advice's exponent in the rank."""
    with_exponent = with_rank(factor, RANK_EXPONENT)
    return lambda old, new: with_exponent(old.rank, old.gain, new.rank, new.gain)


def power(exponent: float) -> Law:
    """Return the law G^-exponent."""
    return law_of(power_of_gain(-exponent))


FAMILIES = {
    "power of G": Family(power, POWERS),
    "displacement law": Family(lambda constant: law_of(displacement_law(constant)), CONSTANTS_K),
}
MEANS: Mapping[str, Callable[[pd.Series], float]] = {
    "power of G": lambda values: float(values.mean()),
    "displacement law": lambda values: float(np.exp(np.log(values).mean())),
}
"""Mean of the constants of several models, by law."""


def judged(pairs: Pairs, own: pd.DataFrame) -> pd.DataFrame:
    """Return the regret of every law on every set of runs, with the mean constant of the other models."""

    def laws_of(model: str) -> dict[str, tuple[Law, float]]:
        # Powers that were not fitted, from the weakest.
        exponents = sorted((abs(exponent), name) for name, exponent in POWERS_OF_GAIN.items())
        laws = {name: (power(exponent), exponent) for exponent, name in exponents}
        for law, family in FAMILIES.items():
            constant = MEANS[law](own[(own["law"] == law) & (own["model"] != model)]["constant"])
            laws[law] = family.law(constant), constant
        return laws

    return judge(pairs, laws_of)


def main() -> None:
    """Write the tables of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "gain_policies")
    parser.add_argument("--external", type=Path, help="folder of the public runs; without it Qwen2.5 7B is left out")
    args = parser.parse_args()
    pairs = all_pairs(args.external)
    scanned = scan(pairs, FAMILIES)
    own = own_constants(scanned)
    own["is_ours"] = own["model"].isin(OUR_MODELS)
    policies, tests = with_totals(judged(pairs, own)), judged(later_pairs(), own)
    tables = {"scan": scanned, "constants": own}
    tables |= {"policies": policies.drop(columns="lower_bounds"), "tests": tests.drop(columns="lower_bounds")}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        (args.out / f"{name}.csv").write_text(frames.to_csv(frame))
    for name in ("constants", "policies", "tests"):
        print(f"{name}.csv\n{tables[name].to_string(index=False)}\n")


if __name__ == "__main__":
    main()
