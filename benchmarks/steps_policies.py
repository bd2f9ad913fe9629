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

Runs that came later are tests: ``smollm2_long``, ``long_gains``, and the seeds of ``small_long`` after the first at
16,384 steps.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gain_laws
import numpy as np
import pandas as pd
from gain_grid import DESIGNS
from sweep_folders import read_curves

from rora_theory.advice.best_rate import QUANTILE
from rora_theory.advice.constants import CONSTANTS
from rora_theory.runs import frames
from rora_theory.stats.curve_optima import whole_curve_log2_rates
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regrets_at

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

MIN_STEPS = 64
"""Fewest steps of a pair: shorter runs end during the first drop of the loss."""

POWERS = np.arange(-40, 1) / 40
"""Powers of the number of steps among which the best is chosen."""

WITHOUT_FIT = {"keep the rate": 0.0, "T^-0.25": -0.25, "square root": -0.5}
"""Powers that were not fitted, by name."""

WAYS = ("lowest regret", "mean of best", "mean exponent")
"""Ways of choosing the power from several models."""


@dataclass(frozen=True)
class StepsPair:
    """One setting after two numbers of steps.

    Attributes:
      rate: Best rate after the fewer steps.
      best_rate: Best rate after the more steps.
      growth: Ratio of the numbers of steps.
      curve: Curve after the more steps.
    """

    rate: float
    best_rate: float
    growth: float
    curve: Curve

    @property
    def exponent(self) -> float:
        """Exponent of the two best rates."""
        return math.log(self.best_rate / self.rate) / math.log(self.growth)

    def regret(self, power: float) -> tuple[float, bool]:
        """Return the regret of a power of the number of steps in nats per token, and whether it is a lower bound."""
        (cost,), (is_lower_bound,) = regrets_at(self.curve, np.array([self.rate * self.growth**power]))
        return float(cost), bool(is_lower_bound)


Pairs = Mapping[str, Mapping[str, list[StepsPair]]]
"""Pairs by model and, within it, by set of runs."""


def three_points(curve: Curve) -> float:
    """Return the best rate by the parabola through the lowest loss and its neighbours."""
    return curve.best_rate


def whole_curve(curve: Curve) -> float:
    """Return the best rate by the quadratic through the whole curve."""
    return 2 ** whole_curve_log2_rates((1.0,), curve).value


BestRate = Callable[[Curve], float]
Curves = Mapping[tuple[object, int], Curve]
"""Curves by setting and number of steps."""


def pairs_of(curves: Curves, best_rate: BestRate) -> Iterator[StepsPair]:
    """Yield all pairs of one setting after fewer and after more steps."""
    inside = {key: curve for key, curve in curves.items() if key[1] >= MIN_STEPS and not curve.edge}
    rates = {key: best_rate(curve) for key, curve in inside.items()}
    for old, new in itertools.permutations(inside, 2):
        (setting, fewer), (same, more) = old, new
        if setting == same and fewer < more:
            yield StepsPair(rates[old], rates[new], more / fewer, inside[new])


def folder_curves(folder: str, steps: tuple[int, ...]) -> Curves:
    """Return the curves of adapters of a published run folder."""
    return {
        ((curve.rank, curve.gain), step): curve
        for step in steps
        for curve in read_curves(PUBLISHED / folder, step)
        if curve.gain > 0  # full fine-tuning has no G
    }


def seed_curves(design: str, folder: Path) -> Curves:
    """Return the curves of a seed of a grid of `gain_grid` at a constant rate."""
    curves = gain_laws.read_curves(folder, DESIGNS[design])
    return {
        ((key.rank, key.gain, key.batch_size), key.steps): curve
        for key, curve in curves.items()
        if key.schedule == "constant"
    }


def seeds_of(design: str, most_steps: Mapping[int, int] | None = None) -> list[Curves]:
    """Return the curves of every seed of a published grid, up to the most steps that a seed may have."""
    folders = {"small": "small_models", "medium": "medium_model"}
    seeds = []
    for folder in sorted((PUBLISHED / folders.get(design, design)).glob("seed_*")):
        most = (most_steps or {}).get(int(folder.name.split("_")[1]), math.inf)
        seeds.append({key: curve for key, curve in seed_curves(design, folder).items() if key[1] <= most})
    return seeds


LONG_SEEDS = {1: 4096, 2: 4096}
"""Most steps of the seeds of ``small_long`` that count: what they run for longer are tests."""


def all_pairs(best_rate: BestRate) -> Pairs:
    """Return the pairs from which the exponent is chosen."""

    def over_seeds(seeds: list[Curves]) -> list[StepsPair]:
        return [pair for curves in seeds for pair in pairs_of(curves, best_rate)]

    return {
        "SmolLM2-135M": {
            "constant": list(pairs_of(folder_curves("horizon", (64, 256)), best_rate)),
            "cosine": list(pairs_of(folder_curves("horizon_cosine", (64, 256, 1024)), best_rate)),
        },
        "Gemma 3 270M": {"cosine": list(pairs_of(folder_curves("horizon_gemma_cosine", (256, 1024)), best_rate))},
        "small model": {
            "to 1,024 steps": over_seeds(seeds_of("small")),
            "to 16,384 steps": over_seeds(seeds_of("small_long", LONG_SEEDS)),
        },
        "second small model": {"to 1,024 steps": over_seeds(seeds_of("medium"))},
    }


def two_term_rows(model: str, curves: Curves) -> Iterator[dict[str, Any]]:
    """Yield the exponent of the two terms beside that of the best rates, for three numbers of steps in equal ratios.

    The losses are those of the measured rate nearest to the best one after the most steps, and their means over seeds.
    """
    by_setting: dict[object, dict[int, Curve]] = {}
    for (setting, steps), curve in curves.items():
        by_setting.setdefault(setting, {})[steps] = curve
    for setting, readings in by_setting.items():
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
            row = {"model": model, "setting": str(setting), "from_steps": window[0], "to_steps": window[2]}
            yield row | {"fall": fall, "two_terms": -fall / (1 + fall), "measured": measured}


def two_terms() -> pd.DataFrame:
    """Return the mean exponents over settings and seeds, by model and numbers of steps."""
    runs = {"SmolLM2-135M": [folder_curves("horizon", (16, 64, 256))]}
    runs |= {"SmolLM2-135M, longer runs": seeds_of("smollm2_long")}
    runs |= {"small model": seeds_of("small"), "small model, longer runs": seeds_of("small_long", LONG_SEEDS)}
    runs |= {"second small model": seeds_of("medium")}
    rows = [row for model, seeds in runs.items() for curves in seeds for row in two_term_rows(model, curves)]
    columns = ["model", "from_steps", "to_steps"]
    by = pd.DataFrame(rows).groupby(columns, sort=False)
    table = by[["fall", "two_terms", "measured"]].mean()
    return table.assign(curves=by.size()).reset_index().sort_values(columns)


def mean_regret(sets: Mapping[str, list[StepsPair]], power: float) -> float:
    """Return a model's mean regret of a power; its sets of runs have the same weight."""
    return float(np.mean([np.mean([pair.regret(power)[0] for pair in pairs]) for pairs in sets.values()]))


def scan(pairs: Pairs) -> pd.DataFrame:
    """Return the mean regret of every model by power."""
    return pd.DataFrame(
        {"model": model, "power": power, "regret": mean_regret(sets, power)}
        for model, sets in pairs.items()
        for power in POWERS.tolist()
    )


def own_exponents(pairs: Pairs, scanned: pd.DataFrame) -> pd.DataFrame:
    """Return each model's power of the lowest regret and the mean exponent of its best rates."""
    best = scanned.loc[scanned.groupby("model", sort=False)["regret"].idxmin()].set_index("model")
    rows = []
    for model, sets in pairs.items():
        exponents = [np.mean([pair.exponent for pair in chosen]) for chosen in sets.values()]
        values = {"lowest regret": best.loc[model, "power"], "mean exponent": float(np.mean(exponents))}
        rows += [{"model": model, "way": way, "power": power} for way, power in values.items()]
    return pd.DataFrame(rows)


def ways(scanned: pd.DataFrame, own: pd.DataFrame) -> dict[str, float]:
    """Return the power that each way of choosing it gives for some models."""
    means = own.groupby("way")["power"].mean()
    return {
        "lowest regret": float(scanned.groupby("power")["regret"].mean().idxmin()),
        "mean of best": float(means["lowest regret"]),
        "mean exponent": float(means["mean exponent"]),
    }


def judged(pairs: Pairs, scanned: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Return the regret of every power on every set of runs, of the fitted ones without the model itself."""
    rows = []
    for model, sets in pairs.items():
        others = ways(scanned[scanned["model"] != model], own[own["model"] != model])
        for (runs, chosen), (policy, power) in itertools.product(sets.items(), (WITHOUT_FIT | others).items()):
            costs, bounds = zip(*(pair.regret(power) for pair in chosen), strict=True)
            row = {"model": model, "runs": runs, "policy": policy, "power": power, "pairs": len(costs)}
            rows.append(row | {"mean": np.mean(costs), "largest": max(costs), "lower_bounds": sum(bounds)})
    frame = pd.DataFrame(rows)

    def total(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
        parts = {"pairs": "sum", "mean": "mean", "largest": "max", "lower_bounds": "sum"}
        return table.groupby(by, sort=False).agg(parts).reset_index()

    by_model = total(frame, ["model", "policy"]).assign(runs="all")
    return pd.concat([frame, by_model, total(by_model, ["policy"]).assign(model="all models", runs="all")])


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
            abs(pair.exponent - power) * math.log(pair.growth)
            <= QUANTILE * math.hypot(spread * math.log(pair.growth), CONSTANTS["pair"].spread)
            for chosen in sets.values()
            for pair in chosen
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
    for name, best_rate in (("whole curve", whole_curve), ("three points", three_points)):
        pairs = all_pairs(best_rate)
        scanned = scan(pairs)
        own = own_exponents(pairs, scanned)
        own_of[name] = own
        fitted = pd.DataFrame({"model": "all models", "way": way, "power": p} for way, p in ways(scanned, own).items())
        exponents[name] = pd.concat([own, fitted]).assign(estimator=name)
    # The tables of regret have the tuned rates of a user, who has no more than the lowest losses.
    policies = judged(pairs, scanned, own)
    tables = {"scan": scanned, "policies": policies, "summary": summarise(policies, own, own_of["whole curve"])}
    tables["two_terms"] = two_terms()
    tables["coverage"] = coverage(pairs, scanned, own, chosen_way(policies))
    tables["exponents"] = pd.concat(exponents.values())
    for name, frame in tables.items():
        (folder / f"{name}.csv").write_text(frames.to_csv(frame))
        print(f"{name}.csv\n{frame.to_string(index=False)}\n")


if __name__ == "__main__":
    main()
