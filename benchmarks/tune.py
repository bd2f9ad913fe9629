"""Regret of the learning rate that a probe advises, replayed on the published runs, beside trainers' default rates.

    python benchmarks/tune.py results/published/horizon --out results/published/tune
    python benchmarks/tune.py results/published/horizon_cosine --out results/published/tune_cosine \\
        --probes results/published/tune_cosine/tenth results/published/tune_cosine/more

A probe of `rora_theory.measure.tuning` needs short runs at three learning rates and the loss of a few held-out records.
The published runs contain such runs: their first 16 or 64 steps. This script fits the best rate of one seed and of one
block of held-out records, carries it to the steps of longer runs as `tune` does, and computes the regret of the result
on the measured curves. Nothing is trained. At a constant rate, the probe's runs are the first steps of the longer runs
whose curve measures the regret. Under another schedule they are separate runs.

Files in the output folder: `cases.csv` (a row for each replayed probe), `by_target.csv` (a summary) and `defaults.csv`
(regret of the default learning rates of TRL, LLaMA-Factory and `unsloth train` in the same settings). With `--probes`,
`probes.csv` has the regret of the rates that runs of `sims.tune` give with the current exponents in the steps, at the
planned gamma r and at least the planned number of steps. `recorded_rate` is the rate that such a run advised for the
planned number of steps, and `share` is the cost of the probe as a share of the target's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro

from rora_theory.advice.best_rate import RateRange
from rora_theory.lab.sweep.curves import curves_at, strength_of
from rora_theory.lab.sweep.runs import SweepRun, merge_repeated_runs, read_runs
from rora_theory.measure.tuning.curve import fit_best_rate
from rora_theory.measure.tuning.plan import ProbePlan, ProbeRun
from rora_theory.measure.tuning.result import carry_fitted
from rora_theory.optimizers import Schedule
from rora_theory.runs import files, frames
from rora_theory.runs.reading import read_manifest
from rora_theory.scaling import scaling_factor
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import loss_at
from sims.common import cli
from sims.common.tables import print_records

PROBE_RANK = 8
PROBE_STEPS = (16, 64)
TARGET_RANKS, TARGET_STEPS = (8, 128), (64, 256, 1024)

BLOCK_SIZE = 16
"""Number of held-out records of a probe; the 96 published ones make six probes."""

DEFAULT_RATES = {"TRL": 2e-5, "LLaMA-Factory": 5e-5, "unsloth train": 2e-4}
"""Default learning rates, from docs/reference/trainers.md."""

CASE_COLUMNS = ("strength", "probe_steps", "seed", "block", "rank", "steps", "learning_rate", "low", "high")
CASE_COLUMNS = (*CASE_COLUMNS, "best_rate", "regret", "is_lower_bound", "is_edge", "covers_best")


@dataclass(frozen=True)
class Config:
    """Settings of the replay."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.horizon, such as results/published/horizon."""
    out: Path
    """Output folder."""
    probes: tuple[Path, ...] = ()
    """Run folders of sims.tune, planned for the same records, schedule and settings."""


@dataclass(frozen=True)
class Target:
    """Setting of a planned run with its measured curve.

    Attributes:
      rank: Rank of the adapter.
      strength: G = gamma r.
      steps: Number of optimizer steps.
      curve: Held-out loss against the learning rate.
    """

    rank: int
    strength: float
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


def planned_targets(runs: Sequence[SweepRun], tokens: Sequence[int]) -> list[Target]:
    """Return the settings of planned runs: both ranks at every G and number of steps that was measured."""
    return [
        Target(curve.rank, strength_of(curve), steps, curve)
        for steps in TARGET_STEPS
        for curve in curves_at(runs, tokens, steps, draws=2)
        if curve.rank in TARGET_RANKS
    ]


def replayed_probes(
    runs: Sequence[SweepRun], tokens: Sequence[int], strength: float, steps: int
) -> Iterator[tuple[int, int, list[ProbeRun], list[int]]]:
    """Yield the probes at a G and number of steps: the seed, the block of records, three runs and the tokens."""
    at_setting = [
        run for run in runs if run.rank == PROBE_RANK and run.strength == strength and run.losses(steps) is not None
    ]
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


def replay(runs: Sequence[SweepRun], tokens: Sequence[int], schedule: Schedule = "constant") -> pd.DataFrame:
    """Return a row for each probe and planned run.

    Args:
      runs: Distinct runs of the folder.
      tokens: Number of tokens of each held-out record.
      schedule: Learning-rate schedule of the runs.
    """
    rows: list[dict[str, Any]] = []
    for target, probe_steps in product(planned_targets(runs, tokens), PROBE_STEPS):
        if probe_steps >= target.steps:
            continue
        for seed, block, probe_runs, block_tokens in replayed_probes(runs, tokens, target.strength, probe_steps):
            rates = [run.learning_rate for run in probe_runs]
            # The plan of such a probe; its costs do not matter here.
            plan = ProbePlan(
                steps=target.steps,
                strength=target.strength,
                probe_steps=probe_steps,
                screen_steps=None,
                schedule=schedule,
                learning_rate=rates[1],
                spacing=rates[1] / rates[0],
                training_costs=(),
                budget=float(target.steps),
                setup_cost=0.0,
                evaluation_cost=0.0,
            )
            # Fit the best rate, and carry it to the target's steps and rank.
            fitted = fit_best_rate(plan, probe_runs, block_tokens)
            low, rate, high = carry_fitted(
                RateRange(fitted.low, fitted.learning_rate, fitted.high),
                steps=(probe_steps, target.steps),
                ranks=(PROBE_RANK, target.rank),
                schedule=schedule,
            )
            regret, is_lower_bound = target.regret(rate)
            rows.append(
                {"strength": target.strength, "probe_steps": probe_steps, "seed": seed, "block": block}
                | {"rank": target.rank, "steps": target.steps, "learning_rate": rate, "low": low, "high": high}
                | {"best_rate": target.best_rate, "regret": regret, "is_lower_bound": is_lower_bound}
                | {"is_edge": bool(fitted.edge) or target.is_edge, "covers_best": low <= target.best_rate <= high}
            )
    return frames.from_rows(rows, CASE_COLUMNS)


def summarise_targets(cases: pd.DataFrame) -> pd.DataFrame:
    """Summarise the probes by number of steps and rank.

    Probes whose best rate, or that of the planned run, lies at the end of a grid have columns of their own. A regret
    that is a lower bound is not within 0.01.
    """
    rows = []
    for (probe_steps, steps, rank), group in cases.groupby(["probe_steps", "steps", "rank"]):
        is_edge = group["is_edge"].astype(bool)
        inside, edges = group[~is_edge], group[is_edge]
        is_bound = inside["is_lower_bound"].astype(bool)
        rows.append(
            {"probe_steps": probe_steps, "steps": steps, "rank": rank, "probes": len(inside)}
            | {"median": inside["regret"].median(), "largest": inside["regret"].max()}
            | {"within_0.01": ((inside["regret"] <= 0.01) & ~is_bound).mean()}
            | {"covers_best": inside["covers_best"].mean(), "lower_bounds": int(is_bound.sum())}
            | {"edges": len(edges), "largest_at_edges": edges["regret"].max()}
            | {"covers_best_at_edges": edges["covers_best"].mean()}
        )
    columns = ("probe_steps", "steps", "rank", "probes", "median", "largest", "within_0.01", "covers_best")
    return frames.from_rows(rows, (*columns, "lower_bounds", "edges", "largest_at_edges", "covers_best_at_edges"))


def default_rate_regret(runs: Sequence[SweepRun], tokens: Sequence[int]) -> pd.DataFrame:
    """Return the regret of the default rates in every planned run whose best rate lies inside the grid."""
    rows = []
    for target, (trainer, rate) in product(planned_targets(runs, tokens), DEFAULT_RATES.items()):
        if target.is_edge:
            continue
        cost, is_lower_bound = target.regret(rate)
        rows.append(
            {"trainer": trainer, "learning_rate": rate, "rank": target.rank, "strength": target.strength}
            | {"steps": target.steps, "best_rate": target.best_rate, "regret": cost, "is_lower_bound": is_lower_bound}
        )
    columns = ("trainer", "learning_rate", "rank", "strength", "steps", "best_rate", "regret", "is_lower_bound")
    return frames.from_rows(rows, columns)


def probe_run_regret(folders: Sequence[Path], runs: Sequence[SweepRun], tokens: Sequence[int]) -> pd.DataFrame:
    """Return the regret of the rates of runs of `sims.tune`, in measured settings of the planned steps or more.

    The best rate that a probe recorded is carried to the planned run with the current exponents. The rate that the
    probe advised when it ran, ``recorded_rate``, may come from earlier ones. A rate holds for any rank at the planned
    gamma r, see `rora_theory.measure.tuning.result.rank_factors`.

    Args:
      folders: Run folders of sims.tune.
      runs: Distinct runs of the measured folder.
      tokens: Number of tokens of each held-out record.
    """
    rows, measured = [], planned_targets(runs, tokens)
    for folder in folders:
        settings = read_manifest(folder, ("config",))["config"]
        tuning = files.read_json(folder / "tuning.json", accepted="the file of a run of sims.tune")
        strength = scaling_factor(settings["rule"], alpha=settings["alpha"], rank=settings["rank"]) * settings["rank"]
        for target in measured:
            if target.steps < settings["steps"] or not math.isclose(target.strength, strength, rel_tol=1e-6):
                continue
            is_planned = target.steps == settings["steps"]
            fitted = tuning["probe"]
            low, rate, high = carry_fitted(
                RateRange(fitted["low"], fitted["learning_rate"], fitted["high"]),
                steps=(fitted["steps"], target.steps),
                ranks=(min(settings["probe_rank"], settings["rank"]), target.rank),
                schedule=settings["schedule"],
            )
            cost, is_lower_bound = target.regret(rate)
            rows.append(
                {"probe": folder.name, "seed": settings["seed"], "probe_steps": fitted["steps"]}
                | {"share": tuning["cost"]["spent"] / target.steps}
                | {"recorded_rate": tuning["learning_rate"] if is_planned else math.nan}
                | {"learning_rate": rate, "low": low, "high": high}
                | {"rank": target.rank, "steps": target.steps, "best_rate": target.best_rate, "regret": cost}
                | {"is_lower_bound": is_lower_bound, "is_edge": target.is_edge}
            )
    columns = ("probe", "seed", "probe_steps", "share", "recorded_rate", "learning_rate", "low", "high", "rank")
    return frames.from_rows(rows, (*columns, "steps", "best_rate", "regret", "is_lower_bound", "is_edge"))


def main(config: Config) -> None:
    """Replay the probes, write the tables and print the summary."""
    runs = merge_repeated_runs(read_runs(config.run))
    # Full fine-tuning has no adapter whose rate a probe could tune.
    runs = [replace(run, strength=round(run.strength, 9)) for run in runs if run.rank and run.strength]
    tokens = frames.read_csv(config.run / "records.csv")["tokens"].astype(int).tolist()
    schedule = read_manifest(config.run, ("config",))["config"]["settings"]["schedule"]
    cases, costs = replay(runs, tokens, schedule), default_rate_regret(runs, tokens)
    summary = summarise_targets(cases)
    config.out.mkdir(parents=True, exist_ok=True)
    tables = {"cases": cases, "by_target": summary, "defaults": costs}
    judged = [cases]
    if config.probes:
        tables["probes"] = probe_run_regret(config.probes, runs, tokens)
        judged.append(tables["probes"])
    for name, frame in tables.items():
        # Runs that were read at the end alone leave no beginnings to replay, only probes that were run.
        if len(frame):
            files.write_whole(config.out / f"{name}.csv", frames.to_csv(frame))
    print_records(
        "Regret of the advised rate in replayed probes, nats per token",
        frames.rows(summary),
        {
            "probe's steps": "{probe_steps}",
            "steps": "{steps}",
            "rank": "{rank}",
            "probes": "{probes}",
            "median": "{median:.4f}",
            "largest": "{largest:.4f}",
            "range has the best": "{covers_best:.0%}",
        },
    )
    inside = pd.concat([table[~table["is_edge"].astype(bool)] for table in judged])
    # Below or above the measured rates the regret is a lower bound, which can't show that a rate is close enough.
    is_bound = inside["is_lower_bound"].astype(bool)
    within = int(((inside["regret"] <= 0.01) & ~is_bound).sum())
    unknown = int(((inside["regret"] <= 0.01) & is_bound).sum())
    print(
        f"\n{within} of {len(inside)} probes advise a rate within 0.01 nats of the best one measured. "
        f"For {unknown} more, whose rate lies outside the measured ones, this is unknown."
    )


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, description=__doc__ or "")))
