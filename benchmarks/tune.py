"""Regret of the learning rates that `tune` advises, replayed on the published runs, beside simpler choices.

    python benchmarks/tune.py --out results/published/tune

A probe of `rora_theory.measure.tuning` needs short runs at three learning rates and the loss of a few held-out records.
The published runs contain such runs: their first 16 or 64 steps, or separate short runs under a decay. This script
updates the prior of the public sweeps by one seed and one block of held-out records, and computes the regret of the
result on the measured curve of the planned run. Nothing is trained. The prior's constants and the law's exponents in
the steps come in part from the same runs; the regrets are not those of a test that was kept apart.

Files in the output folder: `cases.csv`, a row for each replayed probe with the regret of the prior, of the probe and of
fixed rates at G = 64 that are transferred as G^-0.75; `by_model.csv`, a summary; and `defaults.csv`, the regret of the
default learning rates of TRL, LLaMA-Factory and `unsloth train`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from rora_theory.advice.best_rate import Run, best_rate_change
from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import SweepRun, merge_repeated_runs, read_runs
from rora_theory.measure.tuning.posterior import update
from rora_theory.measure.tuning.prior import rate_prior
from rora_theory.measure.tuning.trial import ProbeRun
from rora_theory.optimizers import Schedule
from rora_theory.runs import files, frames
from rora_theory.runs.reading import read_manifest
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import loss_at
from sims.common.tables import print_records

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

RUNS = {"horizon": 0.135, "horizon_cosine": 0.135, "horizon_gemma": 0.268}
"""Folders of the replayed runs, with the number of parameters of their model in billions."""

BATCH_SIZE = 4
"""Number of records per step of the replayed runs."""

FIXED_RATES = (2e-4, 5e-4, 7e-4)
"""Fixed rates at G = 64, which are transferred to other gains as G^-0.75."""

PROBE_RANK = 8
PROBE_STEPS = (16, 64)
TARGET_RANKS, TARGET_STEPS = (8, 128), (64, 256, 1024)

BLOCK_SIZE = 16
"""Number of held-out records of a probe; the 96 published ones make six probes."""

DEFAULT_RATES = {"TRL": 2e-5, "LLaMA-Factory": 5e-5, "unsloth train": 2e-4}
"""Default learning rates, from docs/reference/trainers.md."""

POLICIES = ("prior", "probe", *(f"fixed {rate:g}" for rate in FIXED_RATES))
"""Choices whose regrets are compared."""


@dataclass(frozen=True)
class ReplayOptions:
    """Settings of the replay."""

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
        losses, is_lower_bound = loss_at(self.curve.rates, self.curve.losses, learning_rate)
        return float(np.mean(losses - self.curve.losses[:, self._lowest])), is_lower_bound


def planned_targets(runs: Sequence[SweepRun], tokens: Sequence[int]) -> list[PlannedTarget]:
    """Return the settings of planned runs: both ranks at every G and number of steps that was measured."""
    return [
        PlannedTarget(curve.rank, curve.gain, steps, curve)
        for steps in TARGET_STEPS
        for curve in curves_at(runs, tokens, steps, draws=2)
        if curve.rank in TARGET_RANKS
    ]


def replayed_probes(
    runs: Sequence[SweepRun], tokens: Sequence[int], gain: float, steps: int
) -> Iterator[tuple[int, int, list[ProbeRun], list[int]]]:
    """Yield the probes at a G and number of steps: the seed, the block of records, three runs and the tokens."""
    at_setting = [run for run in runs if run.rank == PROBE_RANK and run.gain == gain and run.losses(steps) is not None]
    for seed in sorted({run.seed for run in at_setting}):
        by_rate = {run.rate: np.asarray(run.losses(steps)) for run in at_setting if run.seed == seed}
        rates = sorted(by_rate)
        if len(rates) < 3:
            continue
        for block, start in enumerate(range(0, len(tokens), BLOCK_SIZE)):
            records = slice(start, start + BLOCK_SIZE)
            totals = [float(by_rate[rate][records].sum()) for rate in rates]
            # The rate with the lowest loss and its neighbours, which the probe would have trained last.
            middle = min(max(int(np.argmin(totals)), 1), len(rates) - 2)
            chosen = rates[middle - 1 : middle + 2]
            probe_runs = [ProbeRun(rate, steps, tuple(map(float, by_rate[rate][records]))) for rate in chosen]
            yield seed, block, probe_runs, list(tokens[records])


def replay(
    runs: Sequence[SweepRun], tokens: Sequence[int], *, model: str, parameters: float, schedule: Schedule
) -> list[dict[str, Any]]:
    """Return a row for each probe and planned run.

    Args:
      runs: Distinct runs of the folder.
      tokens: Number of tokens of each held-out record.
      model: Name of the model.
      parameters: Number of parameters of the model in billions.
      schedule: Learning-rate schedule of the runs.
    """
    rows: list[dict[str, Any]] = []
    for target, probe_steps in product(planned_targets(runs, tokens), PROBE_STEPS):
        if probe_steps >= target.steps or target.is_edge:
            continue
        planned = Run(target.rank, target.gain, target.steps, schedule, BATCH_SIZE)
        prior = rate_prior(planned, parameters=parameters)
        carry = best_rate_change(replace(planned, rank=PROBE_RANK, steps=probe_steps), planned)
        fixed = {f"fixed {rate:g}": rate * (64 / target.gain) ** 0.75 for rate in FIXED_RATES}
        for seed, block, probe_runs, block_tokens in replayed_probes(runs, tokens, target.gain, probe_steps):
            belief = update(prior, probe_runs, block_tokens, carry).belief
            rates = {"prior": prior.rates.best, "probe": belief.rates.best} | fixed
            regrets = {name: target.regret(rate) for name, rate in rates.items()}
            rows.append(
                {"model": model, "schedule": schedule, "gain": target.gain, "rank": target.rank}
                | {"steps": target.steps, "probe_steps": probe_steps, "seed": seed, "block": block}
                | {"best_rate": target.best_rate, "prior_rate": prior.rates.best, "rate": belief.rates.best}
                | {"low": belief.rates.low, "high": belief.rates.high}
                | {"covers_best": belief.rates.low <= target.best_rate <= belief.rates.high}
                | {"prior_covers_best": prior.rates.low <= target.best_rate <= prior.rates.high}
                | {name: regret for name, (regret, _) in regrets.items()}
                | {"is_lower_bound": any(is_bound for _, is_bound in regrets.values())}
            )
    return rows


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """Summarise the regrets by model, schedule and choice; every planned run has the same weight."""
    rows = []
    for (model, schedule), part in cases.groupby(["model", "schedule"]):
        by_target = part.groupby(["gain", "rank", "steps"])
        for policy in POLICIES:
            means = by_target[policy].mean()
            rows.append(
                {"model": model, "schedule": schedule, "policy": policy, "planned_runs": len(means)}
                | {"probes": len(part), "mean": means.mean(), "median": means.median(), "largest": part[policy].max()}
                | {"coverage": part["covers_best"].mean() if policy == "probe" else math.nan}
                | ({"coverage": part["prior_covers_best"].mean()} if policy == "prior" else {})
            )
    return pd.DataFrame(rows)


def default_rate_regret(runs: Sequence[SweepRun], tokens: Sequence[int]) -> pd.DataFrame:
    """Return the regret of the default rates in every planned run whose best rate lies inside the grid."""
    rows = []
    for target, (trainer, rate) in product(planned_targets(runs, tokens), DEFAULT_RATES.items()):
        if target.is_edge:
            continue
        cost, is_lower_bound = target.regret(rate)
        rows.append(
            {"trainer": trainer, "learning_rate": rate, "rank": target.rank, "gain": target.gain}
            | {"steps": target.steps, "best_rate": target.best_rate, "regret": cost, "is_lower_bound": is_lower_bound}
        )
    columns = ("trainer", "learning_rate", "rank", "gain", "steps", "best_rate", "regret", "is_lower_bound")
    return frames.from_rows(rows, columns)


def read_folder(folder: Path) -> tuple[list[SweepRun], list[int], Schedule]:
    """Return the distinct runs of a folder, the tokens of its held-out records and its schedule."""
    runs = merge_repeated_runs(read_runs(folder))
    # Full fine-tuning has no adapter whose rate a probe could tune.
    runs = [replace(run, gain=round(run.gain, 9)) for run in runs if run.rank and run.gain]
    tokens = frames.read_csv(folder / "records.csv")["tokens"].astype(int).tolist()
    manifest = read_manifest(folder, ("config",)) or {}
    return runs, tokens, manifest["config"]["settings"]["schedule"]


def main(config: ReplayOptions) -> None:
    """Replay the probes, write the tables and print the summary."""
    rows, defaults = [], []
    for name, parameters in RUNS.items():
        runs, tokens, schedule = read_folder(PUBLISHED / name)
        model = "Gemma 3 270M" if "gemma" in name else "SmolLM2-135M"
        rows += replay(runs, tokens, model=model, parameters=parameters, schedule=schedule)
        defaults.append(default_rate_regret(runs, tokens).assign(model=model, schedule=schedule))
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
    targets = cases.groupby(["model", "schedule", "gain", "rank", "steps"])[list(POLICIES)].mean()
    prior, probe = targets["prior"].mean(), targets["probe"].mean()
    print(
        f"\nOver {len(targets)} planned runs the prior costs {prior:.4f} nats per token on average, and the probe "
        f"{probe:.4f}; its 90% ranges hold {cases['covers_best'].mean():.0%} of the best rates."
    )


if __name__ == "__main__":
    main(tyro.cli(ReplayOptions, description=__doc__))
