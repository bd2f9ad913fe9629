"""Choose the exponent of the best rate in the number of steps by what it costs, and judge it on models that gave none.

    python benchmarks/steps_policies.py --out results/published/steps_policies

A pair is one setting of a model after two numbers of steps, of `MIN_STEPS` or more, with both best rates inside their
grids. The best rate after the fewer steps is carried to the more steps as a power T^p of their number, as a user does
who tunes a short run. A model's regret is the mean over its sets of runs of the mean over their pairs; every model has
the same weight, and so has every set of a model. A rate outside the grid costs at least what its nearest rate does.

Three ways to choose p are compared, each without the model on which it is judged:

- ``lowest regret``: the p of the lowest mean regret over the other models;
- ``mean of best``: the mean of the other models' own p, of which each has the lowest regret on that model;
- ``mean exponent``: the mean over the other models of the exponent of their best rates.

The advice has the p of the way whose regret, averaged over the models left out, is lowest.

Why the exponents differ is tested by a loss of two terms, L = L0 + a (eta T)^-s + b eta: what is left to learn falls as
a power of the distance travelled, and the noise of the steps grows with the rate. Its best rate falls as
T^(-s / (1 + s)), and s follows from the losses of one rate after three numbers of steps.

- ``two_terms.csv`` has this exponent beside that of the best rates, from the same runs at a constant rate.
- ``policies.csv`` has a row for each model, set of runs and policy: mean and largest regret in nats per token, pairs,
  and how many of their regrets are lower bounds. ``all models`` is the mean over the models.
- ``exponents.csv`` has each model's own p of the lowest regret, the mean exponent of its best rates, and the p of every
  way with all models, by the estimator of a best rate.
- ``summary.csv`` has a row for each model: the exponent of its best rates by both estimators, and the mean regret of
  each policy.
- ``coverage.csv`` has the share of each model's pairs in the 90% range that the other models give.
- ``scan.csv`` has the mean regret of each model by p.

Runs that came later are tests: ``smollm2_long``, ``long_gains``, and of ``small_long`` the seeds 3 and 4, and all but
the first at 16,384 steps.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gain_laws import STEPS_POLICIES
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

from rora_theory.advice.best_rate import QUANTILE, Run
from rora_theory.advice.constants import CONSTANTS
from rora_theory.lab.sweep.curves import THREE_POINTS
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve

MIN_STEPS = 64
"""Fewest steps of a pair: shorter runs end during the first drop of the loss."""

POWERS = np.arange(-40, 1) / 40
"""Powers of the number of steps among which the best is chosen."""

WAYS = ("lowest regret", "mean of best", "mean exponent")
"""Ways of choosing the power from several models."""


def is_pair(old: Run, new: Run) -> bool:
    """Return whether two settings are one after fewer and after more steps."""
    return MIN_STEPS <= old.steps < new.steps and replace(old, steps=new.steps) == new


def growth(old: Run, new: Run) -> float:
    """Return the ratio of two numbers of steps."""
    return new.steps / old.steps


def power_of_steps(power: float) -> Law:
    """Return the law T^power of the number of steps."""
    return lambda old, new: growth(old, new) ** power


FAMILIES = {"power of T": Family(power_of_steps, POWERS)}


def exponent(pair: Pair) -> float:
    """Return the exponent of two best rates."""
    return math.log(pair.best_rate / pair.tuned_rate) / math.log(growth(pair.old, pair.new))


Curves = Mapping[Run, Curve]
"""Curves by setting."""


def seeds_of(design: str, folder: str, most_steps: Mapping[int, int] | None = None) -> list[Curves]:
    """Return the curves of every seed of a published grid at a constant rate, up to the most steps that it may have."""
    return [
        {
            run: curve
            for run, curve in curves.items()
            if run.schedule == "constant" and run.steps <= (most_steps or {}).get(seed, math.inf)
        }
        for seed, curves in seed_curves(design, folder).items()
    ]


LONG_SEEDS = {1: 4096, 2: 4096, 3: 0, 4: 0}
"""Most steps of the seeds of ``small_long`` that count: later runs and what the others run for longer are tests."""


def all_pairs(estimator: str) -> Pairs:
    """Return the pairs from which the exponent is chosen, with best rates by an estimator."""

    def pairs(*seeds: Curves) -> list[Pair]:
        return [pair for curves in seeds for pair in pairs_of(curves.items(), is_pair, estimator)]

    return {
        "SmolLM2-135M": {
            "constant": pairs(curves_after(PUBLISHED / "horizon", (64, 256))),
            "cosine": pairs(curves_after(PUBLISHED / "horizon_cosine", (64, 256, 1024))),
        },
        "Gemma 3 270M": {"cosine": pairs(curves_after(PUBLISHED / "horizon_gemma_cosine", (256, 1024)))},
        "small model": {
            "to 1,024 steps": pairs(*seeds_of("small", "small_models")),
            "to 16,384 steps": pairs(*seeds_of("small_long", "small_long", LONG_SEEDS)),
        },
        "second small model": {"to 1,024 steps": pairs(*seeds_of("medium", "medium_model"))},
    }


def two_term_rows(model: str, curves: Curves) -> Iterator[dict[str, Any]]:
    """Yield the exponent of the two terms beside that of the best rates, for three numbers of steps in equal ratios.

    The losses are those of the measured rate nearest to the best one after the most steps, and their means over seeds.
    """
    by_setting: dict[Run, dict[int, Curve]] = {}
    for run, curve in curves.items():
        by_setting.setdefault(replace(run, steps=None), {})[run.steps] = curve
    for readings in by_setting.values():
        steps = sorted(readings)
        for window in zip(steps, steps[1:], steps[2:], strict=False):
            first, middle, last = (readings[step] for step in window)
            shared = [rate for rate in last.rates if all(np.isclose(readings[s].rates, rate).any() for s in window)]
            if first.edge or middle.edge or last.edge or not shared:
                continue
            rate = shared[int(np.argmin(np.abs(np.log(np.array(shared) / last.best_rate))))]
            before, between, after = (
                float(curve.losses[:, np.isclose(curve.rates, rate)].mean()) for curve in (first, middle, last)
            )
            if not before > between > after:
                continue
            fall = math.log((before - between) / (between - after)) / math.log(window[1] / window[0])
            measured = math.log(last.best_rate / first.best_rate) / math.log(window[2] / window[0])
            row = {"model": model, "from_steps": window[0], "to_steps": window[2]}
            yield row | {"fall": fall, "two_terms": -fall / (1 + fall), "measured": measured}


def two_terms() -> pd.DataFrame:
    """Return the mean exponents over settings and seeds, by model and numbers of steps."""
    runs = {"SmolLM2-135M": [curves_after(PUBLISHED / "horizon", (16, 64, 256))]}
    runs |= {"SmolLM2-135M, longer runs": seeds_of("smollm2_long", "smollm2_long")}
    runs |= {"small model": seeds_of("small", "small_models")}
    runs |= {"small model, longer runs": seeds_of("small_long", "small_long", LONG_SEEDS)}
    runs |= {"second small model": seeds_of("medium", "medium_model")}
    rows = [row for model, seeds in runs.items() for curves in seeds for row in two_term_rows(model, curves)]
    columns = ["model", "from_steps", "to_steps"]
    by = pd.DataFrame(rows).groupby(columns, sort=False)
    table = by[["fall", "two_terms", "measured"]].mean()
    return table.assign(curves=by.size()).reset_index().sort_values(columns)


def own_exponents(pairs: Pairs, scanned: pd.DataFrame) -> pd.DataFrame:
    """Return each model's power of the lowest regret and the mean exponent of its best rates."""
    best = own_constants(scanned).set_index("model")["constant"]
    rows = []
    for model, sets in pairs.items():
        exponents = [np.mean([exponent(pair) for pair in chosen]) for chosen in sets.values()]
        values = {"lowest regret": best[model], "mean exponent": float(np.mean(exponents))}
        rows += [{"model": model, "way": way, "power": power} for way, power in values.items()]
    return pd.DataFrame(rows)


def ways(scanned: pd.DataFrame, own: pd.DataFrame) -> dict[str, float]:
    """Return the power that each way of choosing it gives for some models."""
    means = own.groupby("way")["power"].mean()
    return {
        "lowest regret": float(scanned.groupby("constant")["regret"].mean().idxmin()),
        "mean of best": float(means["lowest regret"]),
        "mean exponent": float(means["mean exponent"]),
    }


def judged(pairs: Pairs, scanned: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Return the regret of every power on every set of runs, of the fitted ones without the model itself."""

    def laws_of(model: str) -> dict[str, tuple[Law, float]]:
        others = ways(scanned[scanned["model"] != model], own[own["model"] != model])
        return {policy: (power_of_steps(power), power) for policy, power in (STEPS_POLICIES | others).items()}

    table = with_totals(judge(pairs, laws_of))
    return table.rename(columns={"law": "policy", "constant": "power"}).drop(columns="median")


def summarise(policies: pd.DataFrame, own: pd.DataFrame, by_whole_curves: pd.DataFrame) -> pd.DataFrame:
    """Return the exponent of each model's best rates, by both estimators, beside the mean regret of every policy."""
    over_runs = policies[policies["runs"] == "all"]
    table = over_runs.pivot(index="model", columns="policy", values="mean")
    for place, (name, exponents) in enumerate({"exponent": own, "exponent_whole_curve": by_whole_curves}.items()):
        table.insert(place, name, exponents[exponents["way"] == "mean exponent"].set_index("model")["power"])
    table.insert(2, "pairs", over_runs.groupby("model")["pairs"].first())
    return table.loc[over_runs["model"].unique()].reset_index()


def spread_over_models(own: pd.DataFrame, power: float) -> float:
    """Return the root mean square distance of the models' mean exponents from a power, which is one fitted value."""
    distances = own[own["way"] == "mean exponent"]["power"] - power
    return math.sqrt((distances**2).sum() / (len(distances) - 1))


def coverage(pairs: Pairs, scanned: pd.DataFrame, own: pd.DataFrame, way: str) -> pd.DataFrame:
    """Return the share of every model's pairs in the 90% range around the power, both from the other models."""
    rows = []
    for model, sets in pairs.items():
        others = own[own["model"] != model]
        power = ways(scanned[scanned["model"] != model], others)[way]
        spread = spread_over_models(others, power)
        inside = [
            abs(exponent(pair) - power) * log_growth
            <= QUANTILE * math.hypot(spread * log_growth, CONSTANTS["pair"].spread)
            for chosen in sets.values()
            for pair in chosen
            for log_growth in [math.log(growth(pair.old, pair.new))]
        ]
        row = {"model": model, "power": power, "spread": spread, "pairs": len(inside)}
        rows.append(row | {"coverage": float(np.mean(inside))})
    return pd.DataFrame(rows)


def chosen_way(policies: pd.DataFrame) -> str:
    """Return the way of choosing the power that has the lowest regret on models left out, from `judged`."""
    means = policies[policies["model"] == "all models"].set_index("policy")["mean"]
    return str(means[means.index.isin(WAYS)].idxmin())


def main() -> None:
    """Write the tables of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "steps_policies")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    exponents, own_of = {}, {}
    # The last estimator is that of the tables below.
    for name in ("whole curve", THREE_POINTS):
        pairs = all_pairs(name)
        scanned = scan(pairs, FAMILIES)
        own = own_exponents(pairs, scanned)
        own_of[name] = own
        fitted = pd.DataFrame({"model": "all models", "way": way, "power": p} for way, p in ways(scanned, own).items())
        exponents[name] = pd.concat([own, fitted]).assign(estimator=name)
    # The tables of regret have the tuned rates of a user, who has no more than the lowest losses.
    policies = judged(pairs, scanned, own)
    tables = {"scan": scanned.drop(columns="law").rename(columns={"constant": "power"}), "policies": policies}
    tables["summary"] = summarise(policies, own, own_of["whole curve"])
    tables["two_terms"] = two_terms()
    tables["coverage"] = coverage(pairs, scanned, own, chosen_way(policies))
    tables["exponents"] = pd.concat(exponents.values())
    for name, frame in tables.items():
        (folder / f"{name}.csv").write_text(frames.to_csv(frame))
        print(f"{name}.csv\n{frame.to_string(index=False)}\n")


if __name__ == "__main__":
    main()
