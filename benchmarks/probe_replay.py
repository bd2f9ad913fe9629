"""Regret of the probes' own best rates on the held-back cases, carried by the present law of the advice.

    python benchmarks/probe_replay.py --out results/published/tune/held_back

The probes of `results/published/tune/held_back` were carried to their planned runs by the law of that time, which had
the steps to the power -0.54, and were weighed against the prior of that time. Here the vertex of each probe's losses is
carried by the present exponents in the steps and the rank, and the prior is the present one. It is no test: the present
exponent in the steps was chosen on runs of the same model. Nothing is trained.

``present_law.csv`` has for each rate the mean, median and largest regret in nats per token over the cases, and how many
are lower bounds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sweep_folders import regret_at

from rora_theory.advice.best_rate import Run
from rora_theory.advice.constants import CONSTANTS
from rora_theory.evidence.rate_prior import rate_prior
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve

HELD_BACK = Path(__file__).parents[1] / "results" / "published" / "tune" / "held_back"

PARAMETERS = 0.000984192
"""Number of parameters of the small model in billions."""

PROBE_RANK, BATCH_SIZE = 8, 4
"""Rank of the probes, which had the planned scaling times rank, and number of records per step."""


def read_curve(case: dict[str, Any], path: Path) -> Curve:
    """Return the losses of a case's planned run at each rate."""
    data = json.loads(path.read_text())
    rates = np.array([rate for rate, _ in data["curve"]])
    losses = np.array([sum(sums) / sum(data["tokens"]) for _, sums in data["curve"]])
    order = np.argsort(rates)
    scaling = case["gain"] / case["rank"]
    return Curve("adamw", "both", "lora", 1.0, case["rank"], scaling, rates[order], losses[None, order])


def rates_of(case: dict[str, Any]) -> dict[str, float]:
    """Return the rates of a case: the present prior's, and the probe's carried by the present law."""
    growth = case["steps"] / case["probe_steps"]
    carried = case["probe_vertex"] * growth ** CONSTANTS["steps_exponent"].value
    carried *= (case["rank"] / PROBE_RANK) ** CONSTANTS["rank_exponent"].value
    run = Run(case["rank"], case["gain"], case["steps"], case["schedule"], BATCH_SIZE)
    return {"prior": rate_prior(run, parameters=PARAMETERS).rates.best, "probe alone": carried}


def main() -> None:
    """Write ``present_law.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HELD_BACK)
    folder = parser.parse_args().out
    costs: dict[str, list[tuple[float, bool]]] = {}
    for case in frames.rows(pd.read_csv(folder / "held_back.csv")):
        curve = read_curve(case, folder / "cases" / f"{case['case']}.json")
        for policy, rate in rates_of(case).items():
            costs.setdefault(policy, []).append(regret_at(curve, rate))
    rows = []
    for policy, values in costs.items():
        regrets, bounds = zip(*values, strict=True)
        row = {"policy": policy, "cases": len(regrets), "mean": np.mean(regrets), "median": np.median(regrets)}
        rows.append(row | {"largest": max(regrets), "lower_bounds": sum(bounds)})
    table = pd.DataFrame(rows)
    (folder / "present_law.csv").write_text(frames.to_csv(table))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
