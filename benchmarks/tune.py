"""Regret of the learning rates that need no tuned run, on the published runs: `tune`, fixed rates, trainers' defaults.

    python benchmarks/tune.py --out results/published/tune

`tune` gives the best rate that public sweeps lead to expect (`rora_theory.evidence.rate_prior`). This script computes
its regret on the measured curves of our own runs, beside fixed rates at G = 64 that are transferred as G^-0.75. Nothing
is trained. The constants of the law come in part from the same runs.

Files in the output folder: `cases.csv`, a row for each planned run; `by_model.csv`, a summary; and `defaults.csv`, the
regret of the default learning rates of TRL, LLaMA-Factory and `unsloth train`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from rora_theory.advice.best_rate import Run
from rora_theory.evidence.rate_prior import rate_prior
from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import SweepRun, read_runs
from rora_theory.optimizers import Schedule
from rora_theory.runs import files, frames
from rora_theory.runs.reading import read_manifest
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regrets_at
from sims.common.tables import print_records

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

RUNS = {"horizon": 0.135, "horizon_cosine": 0.135, "horizon_gemma": 0.268}
"""Folders of the published runs, with the number of parameters of their model in billions."""

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

    out: Path = PUBLISHED / "tune"
    """Output folder."""


@dataclass(frozen=True)
class PlannedTarget:
    """Setting of a planned run with its measured curve.

    Attributes:
      rank: Rank of the adapter.
      gain: G = gamma r.
      steps: Number of optimizer steps.
      curve: Held-out loss against the learning rate.
    """

    rank: int
    gain: float
    steps: int
    curve: Curve

    @property
    def best_rate(self) -> float:
        """Measured learning rate with the lowest mean loss over seeds."""
        return float(self.curve.rates[self._lowest])

    @property
    def is_edge(self) -> bool:
        """Whether the lowest loss lies at the end of the measured rates."""
        return self._lowest in (0, len(self.curve.rates) - 1)

    @property
    def _lowest(self) -> int:
        return int(np.argmin(self.curve.losses.mean(axis=0)))

    def regret(self, learning_rate: float) -> tuple[float, bool]:
        """Return the mean regret over seeds in nats per token, and whether it is a lower bound."""
        (cost,), (is_lower_bound,) = regrets_at(self.curve, np.array([learning_rate]))
        return float(cost), bool(is_lower_bound)


def planned_targets(runs: Sequence[SweepRun], tokens: Sequence[int]) -> list[PlannedTarget]:
    """Return both ranks at every G and number of steps at which a best rate lies between measured ones."""
    targets = [
        PlannedTarget(curve.rank, curve.gain, steps, curve)
        for steps in TARGET_STEPS
        for curve in curves_at(runs, tokens, steps, draws=2)
        if curve.rank in TARGET_RANKS
    ]
    return [target for target in targets if not target.is_edge]


def regret_rows(
    targets: Sequence[PlannedTarget], *, model: str, parameters: float, schedule: Schedule
) -> list[dict[str, Any]]:
    """Return a row for each planned run with the regrets of all choices.

    Args:
      targets: Planned runs.
      model: Name of the model.
      parameters: Number of parameters of the model in billions.
      schedule: Learning-rate schedule of the runs.
    """
    rows: list[dict[str, Any]] = []
    for target in targets:
        prior = rate_prior(
            Run(target.rank, target.gain, target.steps, schedule, BATCH_SIZE), parameters=parameters
        ).rates
        fixed = {f"fixed {rate:g}": rate * (64 / target.gain) ** 0.75 for rate in FIXED_RATES}
        regrets = {name: target.regret(rate) for name, rate in ({"prior": prior.best} | fixed).items()}
        rows.append(
            {"model": model, "schedule": schedule, "gain": target.gain, "rank": target.rank, "steps": target.steps}
            | {"best_rate": target.best_rate, "prior_rate": prior.best, "low": prior.low, "high": prior.high}
            | {"prior_covers_best": prior.low <= target.best_rate <= prior.high}
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


def default_rate_regret(targets: Sequence[PlannedTarget]) -> pd.DataFrame:
    """Return the regret of the default rates in every planned run."""
    rows = []
    for target, (trainer, rate) in product(targets, DEFAULT_RATES.items()):
        cost, is_lower_bound = target.regret(rate)
        rows.append(
            {"trainer": trainer, "learning_rate": rate, "rank": target.rank, "gain": target.gain}
            | {"steps": target.steps, "best_rate": target.best_rate, "regret": cost, "is_lower_bound": is_lower_bound}
        )
    columns = ("trainer", "learning_rate", "rank", "gain", "steps", "best_rate", "regret", "is_lower_bound")
    return frames.from_rows(rows, columns)


def read_folder(folder: Path) -> tuple[list[SweepRun], list[int], Schedule]:
    """Return the runs of a folder, the tokens of its held-out records and its schedule."""
    runs = read_runs(folder)
    # Full fine-tuning has no adapter.
    runs = [replace(run, gain=round(run.gain, 9)) for run in runs if run.rank and run.gain]
    tokens = frames.read_csv(folder / "records.csv")["tokens"].astype(int).tolist()
    manifest = read_manifest(folder, ("config",)) or {}
    return runs, tokens, manifest["config"]["settings"]["schedule"]


def main(config: RegretOptions) -> None:
    """Compute the regrets, write the tables and print the summary."""
    rows, defaults = [], []
    for name, parameters in RUNS.items():
        runs, tokens, schedule = read_folder(PUBLISHED / name)
        targets = planned_targets(runs, tokens)
        model = "Gemma 3 270M" if "gemma" in name else "SmolLM2-135M"
        rows += regret_rows(targets, model=model, parameters=parameters, schedule=schedule)
        defaults.append(default_rate_regret(targets).assign(model=model, schedule=schedule))
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
