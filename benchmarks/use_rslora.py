"""Best rates with and without use_rslora under cosine decay, and what it costs to keep the rate.

    python benchmarks/use_rslora.py --out results/published/use_rslora

The folder has one run folder per seed, ``seed_0`` and so on, with ranks 8, 32 and 128 at alpha 32 after 256 steps. Each
seed has data of its own, so that the spread over seeds contains that between samples of the data. The predictions in
``predictions.csv`` are older than the runs.

- ``best.csv`` has each best rate. One at an edge of its grid is a bound and enters no ratio.
- ``outcomes.csv`` has each ratio of two best rates of one seed, by the lowest losses and by whole curves, beside the
  first prediction of it, and beside the factor and range that `rora_theory.transfer` states.
- ``exponents.csv`` has the exponents in the rank and in G, as means over seeds with their errors.
- ``regret.csv`` has the regret of every policy by seed in nats per token, with one row for policies of the same rate.
- ``policies.csv`` has the mean of the regrets over seeds.
- ``coverage.csv`` has the numbers of ratios and of those in the range predicted before and in transfer's 90% range.
"""

import argparse
import math
from functools import partial
from operator import mul
from pathlib import Path

import numpy as np
import pandas as pd
from sweep_folders import best_row, distinct_factors, log2_ratios, mean_regrets, read_curves

from rora_theory.advice.best_rate import Run, transfer_rate
from rora_theory.evidence.policies import measured_policies
from rora_theory.lab.sweep.curves import ESTIMATORS
from rora_theory.runs import frames
from rora_theory.stats.estimate import over_seeds
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regret

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
STEPS = 256
ALPHA = 32.0
RSLORA, RANK, BOTH = "use_rslora", "rank", "rank and use_rslora"
"""What differs between two settings."""


def setting_of(curve: Curve) -> str:
    """Return the setting as ``predictions.csv`` writes it."""
    return f"rank {curve.rank}, G {curve.gain:.3g}"


def rank_of(setting: str) -> int:
    """Return the rank of a setting as `setting_of` writes it."""
    return int(setting.split(",")[0].removeprefix("rank "))


def pairs_of(curves: list[Curve]) -> list[tuple[str, Curve, Curve]]:
    """Return the changes of one seed: rank at alpha / r, use_rslora at one rank, and both from the lowest rank."""
    plain = {curve.rank: curve for curve in curves if math.isclose(curve.gain, ALPHA)}
    with_rslora = {curve.rank: curve for curve in curves if not math.isclose(curve.gain, ALPHA)}
    lowest = min(plain, default=0)
    pairs = [(RANK, plain[lowest], plain[rank]) for rank in sorted(plain) if rank != lowest]
    pairs += [(RSLORA, plain[rank], with_rslora[rank]) for rank in sorted(plain.keys() & with_rslora.keys())]
    return pairs + [
        (BOTH, plain[lowest], with_rslora[rank]) for rank in sorted(with_rslora) if plain and rank != lowest
    ]


def ratio_rows(first: Curve, second: Curve) -> list[dict[str, object]]:
    """Return the best rate of the second curve over that of the first, of one seed, by both estimators."""
    if first.edge or second.edge:
        return [{"estimator": name, "ratio": None, "log2_error": None} for name in ESTIMATORS]
    return [
        {"estimator": name, "ratio": 2**logs.value, "log2_error": logs.known_error}
        for name, logs in log2_ratios(first, second).items()
    ]


def exponent_rows(outcomes: pd.DataFrame) -> list[dict[str, object]]:
    """Return the exponent of every change in what it changes, as a mean over the seeds whose ratio is known."""
    rows: list[dict[str, object]] = []
    known = outcomes[(outcomes["change"] != BOTH) & outcomes["ratio"].notna()]
    for (estimator, change, first, second), ratios in known.groupby(["estimator", "change", "from", "to"], sort=False):
        # At one alpha, use_rslora multiplies G by the square root of the rank.
        by_rank = ("rank", rank_of(second) / rank_of(first))
        variable, factor = by_rank if change == RANK else ("G", math.sqrt(rank_of(second)))
        estimate = over_seeds(np.log(ratios["ratio"].to_numpy()) / math.log(factor))
        row = {"estimator": estimator, "change": change, "from": first, "to": second}
        row |= {"variable": variable, "exponent": estimate.value}
        half_width = estimate.half_width() if estimate.has_error else None
        rows.append(row | {"half_width": half_width, "seeds": len(ratios)})
    return rows


def stated_range(old: Run, new: Run) -> dict[str, object]:
    """Return the factor of the best rate that `rora_theory.transfer` states, with its 90% range."""
    change = transfer_rate(1.0, old, new)
    return {"advice": change.best, "advice_low": change.low, "advice_high": change.high}


def main() -> None:
    """Write the tables of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "use_rslora")
    folder = parser.parse_args().out
    best, outcomes, costs = [], [], []
    for run in sorted(folder.glob("seed_*")):
        seed = {"seed": int(run.name.split("_")[1])}
        curves = read_curves(run, STEPS)
        constants = pd.read_csv(run / "constants.csv").set_index(["rank", "gain"])["constant"]
        best += [seed | best_row(curve) for curve in curves]
        for change, first, second in pairs_of(curves):
            row = {"change": change, "from": setting_of(first), "to": setting_of(second)}
            runs = [Run(curve.rank, curve.gain, STEPS) for curve in (first, second)]
            stated = stated_range(*runs)
            outcomes += [seed | row | ratio | stated for ratio in ratio_rows(first, second)]
            # At an edge of its grid the lowest loss is unknown, and with it the regret.
            if first.edge or second.edge:
                continue
            # The displacement law has the constant K that was measured in the tuned runs, the advice the published one.
            named = measured_policies({STEPS: float(constants[first.rank, ALPHA])})
            for policy, factor in distinct_factors(named, *runs).items():
                costs.append(seed | row | {"policy": policy} | regret(first, second, partial(mul, factor)).row())
    predictions = pd.read_csv(folder / "predictions.csv").drop_duplicates(["from", "to"])
    compared = pd.DataFrame(outcomes)
    tables = {"best": pd.DataFrame(best), "exponents": pd.DataFrame(exponent_rows(compared))}
    compared = compared[compared["change"] != BOTH]
    compared = compared.merge(predictions[["from", "to", "prediction", "low", "high"]], how="left")
    tables |= {
        "outcomes": compared,
        "regret": pd.DataFrame(costs),
        "policies": mean_regrets(pd.DataFrame(costs), ["change", "from", "to", "policy"]),
    }
    coverage = []
    for estimator, known in compared.dropna(subset=["ratio"]).groupby("estimator", sort=False):
        in_predicted = known["ratio"].between(known["low"], known["high"]).sum()
        in_stated = known["ratio"].between(known["advice_low"], known["advice_high"]).sum()
        row = {"estimator": estimator, "ratios": len(known), "seeds": known["seed"].nunique()}
        coverage.append(row | {"in_predicted_range": int(in_predicted), "in_stated_range": int(in_stated)})
    tables["coverage"] = pd.DataFrame(coverage)
    for name, frame in tables.items():
        (folder / f"{name}.csv").write_text(frames.to_csv(frame))
        print(f"{name}.csv\n{frame.to_string(index=False)}\n")
    for row in coverage:
        print(
            f"By {row['estimator']}, from {row['seeds']} seeds, {row['in_predicted_range']} of {row['ratios']} ratios "
            f"lie in the range predicted before, and {row['in_stated_range']} in the 90% range that transfer states."
        )


if __name__ == "__main__":
    main()
