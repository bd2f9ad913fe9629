"""What the means of a probe buy: run length, number of runs, held-out records and schedule, replayed on measured runs.

    python benchmarks/probe_means.py --out results/published/tune

The published runs contain short runs at several rates with the loss of 96 held-out records. A probe of given means uses
some of them, updates the prior of the public sweeps, and is judged by its regret on the measured curve of the planned
run. Nothing is trained. The costs are those that `rora_theory.measure.tuning.plan` counts.

Files in the output folder: `means.csv`, a row for each combination of means with the mean regret over planned runs,
the prior's and the cost; and `paired_errors.csv`, the error of a difference of two losses on the same records.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from tune import BATCH_SIZE, PROBE_RANK, PUBLISHED, RUNS, PlannedTarget, planned_targets, read_folder

from rora_theory.advice.best_rate import Run, best_rate_change
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.measure.tuning.plan import EVALUATION_COST
from rora_theory.measure.tuning.posterior import update
from rora_theory.measure.tuning.prior import rate_prior
from rora_theory.measure.tuning.trial import ProbeRun
from rora_theory.optimizers import Schedule
from rora_theory.runs import files, frames
from rora_theory.stats.paired import mean_per_token
from sims.common.tables import print_records

LENGTHS = (16, 64, 256)
"""Numbers of steps of a probe's runs."""

RUN_COUNTS = (2, 3, 4, 5)
"""Numbers of runs of a probe: the lowest loss and its neighbours."""

RECORD_COUNTS = (4, 16, 48, 96)
"""Numbers of held-out records; 0 stands for the losses of training batches in place of held-out ones."""

MAX_BLOCKS = 4
"""Most blocks of held-out records that are replayed for one seed."""


@dataclass(frozen=True)
class ProbeMeansOptions:
    """Settings of the study."""

    out: Path = PUBLISHED / "tune"
    """Output folder."""


def probes_of(
    runs: Sequence[SweepRun], tokens: Sequence[int], *, gain: float, steps: int, count: int, records: int
) -> Iterator[tuple[int, list[ProbeRun], list[int]]]:
    """Yield the probes of given means at a gain: the seed, the runs and the tokens of the records.

    Args:
      runs: Distinct runs of a folder.
      tokens: Number of tokens of each held-out record.
      gain: G of the planned run.
      steps: Number of steps of the probe's runs.
      count: Number of the probe's runs.
      records: Number of held-out records; 0 uses the training losses of the second half of the steps.
    """
    candidates = [run for run in runs if run.rank == PROBE_RANK and run.gain == gain and run.losses(steps) is not None]
    for seed in sorted({run.seed for run in candidates}):
        by_rate = {run.rate: run for run in candidates if run.seed == seed}
        rates = sorted(by_rate)
        if len(rates) < count:
            continue
        if records:
            losses = {rate: np.asarray(by_rate[rate].losses(steps)) for rate in rates}
            starts = range(0, len(tokens) - records + 1, records)[:MAX_BLOCKS]
            blocks = [(slice(start, start + records), list(tokens[start : start + records])) for start in starts]
        else:
            losses = {rate: np.asarray(by_rate[rate].read.train_losses[steps // 2 : steps]) for rate in rates}
            blocks = [(slice(None), [1] * (steps - steps // 2))]
        for block, block_tokens in blocks:
            totals = [float(losses[rate][block].sum()) for rate in rates]
            # A window of rates around the lowest loss, as the probe would have trained.
            first = min(max(int(np.argmin(totals)) - count // 2, 0), len(rates) - count)
            chosen = rates[first : first + count]
            yield seed, [ProbeRun(rate, steps, tuple(map(float, losses[rate][block]))) for rate in chosen], block_tokens


def share_of_cost(target: PlannedTarget, *, steps: int, count: int, records: int) -> tuple[float, float]:
    """Return the cost of a probe as a share of the planned run, and the share of it that evaluations have."""
    training, evaluation = count * steps, count * EVALUATION_COST * records / BATCH_SIZE
    return (training + evaluation) / target.steps, evaluation / (training + evaluation)


def study(
    runs: Sequence[SweepRun],
    probe_runs: Sequence[SweepRun],
    tokens: Sequence[int],
    *,
    model: str,
    parameters: float,
    schedule: Schedule,
    probe_schedule: Schedule,
) -> list[dict[str, Any]]:
    """Return a row for each replayed probe and planned run.

    Args:
      runs: Runs with the curves of the planned runs.
      probe_runs: Runs of which the probe uses some.
      tokens: Number of tokens of each held-out record.
      model: Name of the model.
      parameters: Number of parameters of the model in billions.
      schedule: Schedule of the planned runs.
      probe_schedule: Schedule of the probe's runs.
    """
    rows: list[dict[str, Any]] = []
    for target, steps in product(planned_targets(runs, tokens), LENGTHS):
        if steps >= target.steps or target.is_edge:
            continue
        planned = Run(target.rank, target.gain, target.steps, schedule, BATCH_SIZE)
        prior = rate_prior(planned, parameters=parameters)
        probe = replace(planned, rank=PROBE_RANK, steps=steps, schedule=probe_schedule)
        carry = best_rate_change(probe, planned)
        prior_regret = target.regret(prior.rates.best)[0]
        for count, records in product(RUN_COUNTS, (0, *RECORD_COUNTS)):
            cost, evaluation_share = share_of_cost(target, steps=steps, count=count, records=records)
            for seed, chosen, block_tokens in probes_of(
                probe_runs, tokens, gain=target.gain, steps=steps, count=count, records=records
            ):
                rate = update(prior, chosen, block_tokens, carry).belief.rates.best
                rows.append(
                    {"model": model, "schedule": schedule, "probe_schedule": probe_schedule, "gain": target.gain}
                    | {"rank": target.rank, "steps": target.steps, "probe_steps": steps, "runs": count}
                    | {"records": records, "seed": seed, "cost": cost, "evaluation_share": evaluation_share}
                    | {"prior": prior_regret, "probe": target.regret(rate)[0]}
                )
    return rows


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """Return the mean regrets by model, schedules and means; every planned run has the same weight."""
    means = ["model", "schedule", "probe_schedule", "probe_steps", "runs", "records"]
    by_target = cases.groupby([*means, "gain", "rank", "steps"])[["prior", "probe", "cost", "evaluation_share"]].mean()
    table = by_target.groupby(means).agg(
        planned_runs=("prior", "size"),
        prior=("prior", "mean"),
        probe=("probe", "mean"),
        cost=("cost", "mean"),
        evaluation_share=("evaluation_share", "mean"),
    )
    return table.assign(left=table["probe"] / table["prior"]).reset_index()


def paired_errors(runs: Sequence[SweepRun], tokens: Sequence[int], *, model: str) -> list[dict[str, Any]]:
    """Return the errors of the difference of two losses at neighbouring rates, by steps and records.

    ``per_root_token`` is the error times the root of the number of tokens, which hardly depends on their number;
    ``third`` is the number of tokens at which the error is a third of the median difference.
    """
    rows = []
    for steps in LENGTHS:
        by_setting: dict[tuple[Any, ...], dict[float, Sequence[float]]] = {}
        for run in runs:
            losses = run.losses(steps)
            if losses is not None:
                by_setting.setdefault((run.rank, run.gain, run.seed), {})[run.rate] = losses
        differences, errors = [], []
        for by_rate in by_setting.values():
            rates = sorted(by_rate)
            for low, high in pairwise(rates):
                gap = mean_per_token(np.subtract(by_rate[low], by_rate[high]).tolist(), list(tokens))
                differences.append(abs(gap.value))
                errors.append(gap.error)
        if errors:
            error, difference = float(np.median(errors)) * math.sqrt(sum(tokens)), float(np.median(differences))
            rows.append(
                {"model": model, "steps": steps, "pairs": len(errors), "difference": difference}
                | {"error": float(np.median(errors)), "tokens": sum(tokens), "per_root_token": error}
                | {"third": (3 * error / difference) ** 2}
            )
    return rows


def write_means(config: ProbeMeansOptions) -> None:
    """Replay all means, write the tables and print the summary."""
    rows, errors = [], []
    folders = {name: read_folder(PUBLISHED / name) for name in RUNS}
    for name, parameters in RUNS.items():
        runs, tokens, schedule = folders[name]
        model = "Gemma 3 270M" if "gemma" in name else "SmolLM2-135M"
        errors += [row | {"schedule": schedule} for row in paired_errors(runs, tokens, model=model)]
        settings: dict[str, Any] = {"model": model, "parameters": parameters, "schedule": schedule}
        rows += study(runs, runs, tokens, **settings, probe_schedule=schedule)
        if name == "horizon_cosine":
            rows += study(runs, folders["horizon"][0], tokens, **settings, probe_schedule="constant")
    table = summarise(pd.DataFrame(rows))
    config.out.mkdir(parents=True, exist_ok=True)
    for name, frame in {"means": table, "paired_errors": pd.DataFrame(errors)}.items():
        files.write_whole(config.out / f"{name}.csv", frames.to_csv(frame))
    columns = {
        name: f"{{{name}}}" for name in ("model", "schedule", "probe_schedule", "probe_steps", "runs", "records")
    }
    columns |= {"cost": "{cost:.0%}", "prior": "{prior:.4f}", "probe": "{probe:.4f}", "left": "{left:.0%}"}
    print_records("Regret in nats per token by the means of the probe", table, columns, left=3)
    columns = {"model": "{model}", "schedule": "{schedule}", "steps": "{steps}", "difference": "{difference:.4f}"}
    columns |= {"error": "{error:.4f}", "tokens for a third": "{third:.0f}"}
    print_records("Differences of the losses at neighbouring rates", pd.DataFrame(errors), columns, left=2)


if __name__ == "__main__":
    write_means(tyro.cli(ProbeMeansOptions, description=__doc__))
