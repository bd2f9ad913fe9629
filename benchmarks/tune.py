"""Regret of the learning rates that need no tuned run, on the published runs: `tune`, fixed rates, trainers' defaults.

    python benchmarks/tune.py --external EXTERNAL --out results/published/tune

`tune` gives the best rate that public sweeps lead to expect (`rora_theory.evidence.rate_prior`). This script computes
its regret on the measured curves of our own runs and of two public sweeps that gave the rate nothing, beside fixed
rates at G = 64 that are transferred as G^-0.75. Nothing is trained. The law's constants come in part from our runs.

EXTERNAL is the folder of the public sweeps' original files, as for ``benchmarks/public_sweeps.py``.

Files in the output folder: `cases.csv`, a row for each planned run; `by_model.csv`, a summary; and `defaults.csv`, the
regret of the default learning rates of TRL, LLaMA-Factory and `unsloth train`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from sweep_folders import curves_after, regret_at

from rora_theory.advice.best_rate import Run
from rora_theory.evidence.rate_prior import rate_prior
from rora_theory.evidence.sweeps import Sweep, load_sweeps
from rora_theory.optimizers import Schedule
from rora_theory.runs import files, frames
from rora_theory.stats.rate_curves import Curve
from sims.common.tables import print_records

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

RUNS: Mapping[str, tuple[str, float, Schedule]] = {
    "horizon": ("SmolLM2-135M", 0.135, "constant"),
    "horizon_cosine": ("SmolLM2-135M", 0.135, "cosine"),
    "horizon_gemma": ("Gemma 3 270M", 0.268, "constant"),
}
"""Model of each folder of published runs, its number of parameters in billions, and the schedule."""

PUBLIC_RUNS: Mapping[str, tuple[float, Schedule]] = {"qwen2.5-7b": (7.6, "linear"), "qwen3-4b": (4.0, "constant")}
"""Parameters in billions and schedule of the public sweeps that are no part of the starting rates."""

BATCH_SIZE = 4
"""Number of records per step of the published runs."""

FIXED_RATES = (2e-4, 5e-4, 7e-4)
"""Fixed rates at G = 64, which are transferred to other gains as G^-0.75."""

TARGET_RANKS, TARGET_STEPS = (8, 128), (64, 256, 1024)

DEFAULT_RATES = {"TRL": 2e-5, "LLaMA-Factory": 5e-5, "unsloth train": 2e-4}
"""Default learning rates, from docs/reference/trainers.md."""

POLICIES = ("prior", *(f"fixed {rate:g}" for rate in FIXED_RATES))
"""Choices whose regrets are compared."""


@dataclass(frozen=True)
class RegretOptions:
    """Settings of the comparison."""

    external: Path
    """Folder of the original files of the public sweeps."""
    out: Path = PUBLISHED / "tune"
    """Output folder."""


Targets = Mapping[Run, Curve]
"""Measured curves of planned runs."""


def planned_targets(curves: Targets) -> Targets:
    """Return both ranks at every G and number of steps at which a best rate lies between measured ones."""
    return {
        run: curve
        for run, curve in curves.items()
        if run.rank in TARGET_RANKS and 0 < curve.lowest < len(curve.rates) - 1
    }


def case_rows(targets: Targets, *, model: str, parameters: float) -> list[dict[str, Any]]:
    """Return a row for each planned run with the regrets of all choices.

    Args:
      targets: Planned runs.
      model: Name of the model.
      parameters: Number of parameters of the model in billions.
    """
    rows: list[dict[str, Any]] = []
    for run, curve in targets.items():
        prior = rate_prior(run, parameters=parameters).rates
        fixed = {f"fixed {rate:g}": rate * (64 / run.gain) ** 0.75 for rate in FIXED_RATES}
        regrets = {name: regret_at(curve, rate) for name, rate in ({"prior": prior.best} | fixed).items()}
        best_rate = float(curve.rates[curve.lowest])
        rows.append(
            {"model": model, "schedule": run.schedule, "gain": run.gain, "rank": run.rank, "steps": run.steps}
            | {"best_rate": best_rate, "prior_rate": prior.best, "low": prior.low, "high": prior.high}
            | {"prior_covers_best": prior.low <= best_rate <= prior.high}
            | {name: regret for name, (regret, _) in regrets.items()}
            | {"is_lower_bound": any(is_bound for _, is_bound in regrets.values())}
        )
    return rows


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """Summarise the regrets by model, schedule and choice."""
    rows = []
    for (model, schedule), part in cases.groupby(["model", "schedule"]):
        for policy in POLICIES:
            regrets = part[policy]
            rows.append(
                {"model": model, "schedule": schedule, "policy": policy, "planned_runs": len(part)}
                | {"mean": regrets.mean(), "median": regrets.median(), "largest": regrets.max()}
                | {"coverage": part["prior_covers_best"].mean() if policy == "prior" else math.nan}
            )
    return pd.DataFrame(rows)


def default_rate_regret(targets: Targets) -> pd.DataFrame:
    """Return the regret of the default rates in every planned run."""
    rows = []
    for (run, curve), (trainer, rate) in product(targets.items(), DEFAULT_RATES.items()):
        cost, is_lower_bound = regret_at(curve, rate)
        rows.append(
            {"trainer": trainer, "learning_rate": rate, "rank": run.rank, "gain": run.gain, "steps": run.steps}
            | {"best_rate": float(curve.rates[curve.lowest]), "regret": cost, "is_lower_bound": is_lower_bound}
        )
    return pd.DataFrame(rows)


def read_targets(name: str, schedule: Schedule) -> Targets:
    """Return the planned runs of a published run folder."""
    curves = curves_after(PUBLISHED / name, TARGET_STEPS, schedule)
    return planned_targets({replace(run, batch_size=BATCH_SIZE): curve for run, curve in curves.items()})


def read_public_targets(sweep: Sweep, schedule: Schedule) -> Targets:
    """Return the settings of a public sweep whose best rates lie inside their grids."""
    inside = [fit.curve for fit in sweep.fits if fit.is_inside]
    return {Run(curve.rank, curve.gain, sweep.steps, schedule, sweep.batch_size): curve for curve in inside}


def main(config: RegretOptions) -> None:
    """Compute the regrets, write the tables and print the summary."""
    rows, defaults = [], []
    for name, (model, parameters, schedule) in RUNS.items():
        targets = read_targets(name, schedule)
        rows += case_rows(targets, model=model, parameters=parameters)
        defaults.append(default_rate_regret(targets).assign(model=model, schedule=schedule))
    for source, (parameters, schedule) in PUBLIC_RUNS.items():
        for sweep in load_sweeps(source, config.external):
            targets = read_public_targets(sweep, schedule)
            rows += case_rows(targets, model=sweep.model, parameters=parameters)
    cases = pd.DataFrame(rows)
    summary = summarise(cases)
    config.out.mkdir(parents=True, exist_ok=True)
    for name, frame in {"cases": cases, "by_model": summary, "defaults": pd.concat(defaults)}.items():
        files.write_whole(config.out / f"{name}.csv", frames.to_csv(frame))
    print_records(
        "Regret in nats per token, mean over planned runs",
        frames.rows(summary),
        {
            "model": "{model}",
            "schedule": "{schedule}",
            "choice": "{policy}",
            "planned runs": "{planned_runs}",
            "mean": "{mean:.4f}",
            "largest": "{largest:.4f}",
            "range has the best": "{coverage:.0%}",
        },
        left=3,
    )


if __name__ == "__main__":
    main(tyro.cli(RegretOptions, description=__doc__))
