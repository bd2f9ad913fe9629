"""Analysis of the runs of a grid of horizons: best rates, comparisons, and exponents compared with the law."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np
import pandas as pd

from rora_theory.lab.finetune.config import LossOn
from rora_theory.lab.sweep.curves import (
    best_rate_table,
    compare_at_one_rate,
    compare_best_rates,
    curves_at,
)
from rora_theory.lab.sweep.estimators import estimator_table
from rora_theory.lab.sweep.law import pooled_exponents, setting_exponents, step_exponents
from rora_theory.lab.sweep.part_tables import constants_by_steps, part_table
from rora_theory.lab.sweep.rate_estimates import rate_table, ratio_table
from rora_theory.lab.sweep.regret import policies, regret_by_policy, regret_table
from rora_theory.lab.sweep.runs import FULL, SweepRun, merge_repeated_runs
from rora_theory.optimizers import Schedule
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.verdicts import Outcome

UNITS = {
    "gain": "gamma times the rank: alpha under alpha / r, alpha sqrt(r) under alpha / sqrt(r)",
    "validation_loss, answer_loss": "nats per token of the held-out records; errors are over records",
}

POWERFUL_SWEEP = (
    "A verdict needs about five seeds, two ranks and seven rates a quarter of a decade apart around each best rate."
)
"""Sweep whose pooled verdicts are right in nine of ten cases, see ``power.csv`` of `benchmarks.verdict_rules`."""

BOOTSTRAP_SAMPLES = 1000
"""Number of bootstrap samples of the held-out records."""


@dataclass(frozen=True, eq=False)
class SweepAnalysis:
    """Analysis of runs as frames, which are empty if the runs do not suffice.

    Attributes:
      best: Best rates at every step by the three lowest losses, `curves.best_rate_table`.
      rates: Best rates by every estimator and both losses, `rate_estimates.rate_table`.
      ratios: Ratios of best rates, `rate_estimates.ratio_table`.
      comparisons: Comparisons of curves at their best rates, `curves.compare_best_rates`.
      one_rate: Comparisons at the same rate, `curves.compare_at_one_rate`.
      exponents: Exponents of the best rates in gain and rank, `law.setting_exponents`.
      pooled: The exponents by whole curves, pooled over the other setting, `law.pooled_exponents`.
      estimators: Exponents by estimators that use whole curves, `estimators.estimator_table`.
      steps: Exponents of the best rates in the number of steps, `law.step_exponents`.
      parts: Ratio of the parts of the change in every run, `part_tables.part_table`.
      constants: Displacement constants K, `part_tables.constants_by_steps`.
      regret: Cost of policies between all measured conditions, `regret.regret_table`.
      policies: Summary of the cost, `regret.regret_by_policy`.
    """

    best: pd.DataFrame
    rates: pd.DataFrame
    ratios: pd.DataFrame
    comparisons: pd.DataFrame
    one_rate: pd.DataFrame
    exponents: pd.DataFrame
    pooled: pd.DataFrame
    estimators: pd.DataFrame
    steps: pd.DataFrame
    parts: pd.DataFrame
    constants: pd.DataFrame
    regret: pd.DataFrame
    policies: pd.DataFrame

    def files(self) -> dict[str, pd.DataFrame]:
        """Return the frames that are not empty by the names of their files."""
        by_name = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{name}.csv": frame for name, frame in by_name.items() if not frame.empty}


def analyse(
    runs: Sequence[SweepRun],
    tokens: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    shared: Mapping[str, Any],
    *,
    crossing_distances: Sequence[float] = (),
    linear_terms: Sequence[float] = (),
    other_runs: Mapping[str, Sequence[SweepRun]] | None = None,
) -> SweepAnalysis:
    """Analyse the runs of a matrix, each combination of model, kind of adapter and further axes by itself.

    Every combination is compared with the first one. If there are several, the frames have a column for each setting in
    which they differ.

    Args:
      runs: Runs of the matrix.
      tokens: Numbers of tokens of the held-out records and of their answers by model.
      shared: Settings that all runs share, by name.
      crossing_distances: Crossing distances of the model's modules, see `judge_runs`.
      linear_terms: Linear terms of the model's modules, see `judge_runs`.
      other_runs: Runs to compare with, by description.
    """
    names = dict.fromkeys(name for run in runs for name, _ in run.axes)
    groups: dict[tuple[Any, ...], list[SweepRun]] = {}
    for run in runs:
        if run.rate:
            # Full fine-tuning and other methods without a rank are analysed beside LoRA.
            adapter = run.adapter if run.rank else "lora"
            key = (run.model, adapter, *(value for _, value in run.axes))
            groups.setdefault(key, []).append(run)
    judgements: list[SweepAnalysis] = []
    others = dict(other_runs or {})
    labels = ("model", "adapter", *names)
    different = [place for place in range(len(labels)) if len({key[place] for key in groups}) > 1]
    for key, group in groups.items():
        settings = dict(shared) | dict(group[0].axes)
        law: dict[str, Any] = {"crossing_distances": crossing_distances, "linear_terms": linear_terms}
        by_loss = dict(zip(get_args(LossOn), tokens[key[0]], strict=True))
        judged = judge_runs(
            group,
            by_loss[group[0].loss_on],
            **law,
            warmup=settings["warmup"],
            schedule=settings["schedule"],
            other_runs=others,
            tokens_by_loss=by_loss,
        )
        described = {labels[place]: key[place] for place in different}
        judgements.append(
            SweepAnalysis(*(frame.assign(**described) if len(frame) else frame for frame in vars(judged).values()))
        )
        # Losses of different models cannot be compared.
        if key == next(iter(groups)) and "model" not in described:
            others[", ".join(f"{name} {value}" for name, value in described.items())] = group
    tables = zip(*(vars(judged).values() for judged in judgements), strict=True)
    empty = [pd.DataFrame()] * len(fields(SweepAnalysis))
    return SweepAnalysis(*(map(_concatenate, tables) if judgements else empty))


def judge_runs(
    runs: Sequence[SweepRun],
    tokens: Sequence[int],
    *,
    crossing_distances: Sequence[float],
    warmup: int,
    schedule: Schedule = "constant",
    linear_terms: Sequence[float] = (),
    other_runs: Mapping[str, Sequence[SweepRun]] | None = None,
    tokens_by_loss: Mapping[LossOn, Sequence[int]] | None = None,
) -> SweepAnalysis:
    """Find the best rates at every step of the readings, and compare them with each other and with the law.

    Args:
      runs: Runs of one grid; runs of the same setting are merged, see `runs.merge_repeated_runs`.
      tokens: Number of tokens of each held-out record in the loss by which the runs are judged.
      crossing_distances: Crossing distances of the model's modules; if empty, the law's exponents are left out.
      warmup: Number of steps of linear warm-up.
      schedule: Schedule of the learning rate after the warm-up.
      linear_terms: Linear terms of the model's modules, see `law.setting_exponents`.
      other_runs: Runs to compare with, by description, see `runs.read_comparison_runs`.
      tokens_by_loss: Numbers of tokens by the tokens of the loss, for the best rates by both losses; None uses the loss
        by which the runs are judged.
    """
    # Curves of loss against rate at every step, and their minima.
    runs = merge_repeated_runs(runs)
    steps = sorted({reading.step for run in runs for reading in run.read.readings})
    loss_on = runs[0].loss_on if runs else "all"
    losses: dict[LossOn, Sequence[int]] = {loss_on: tokens} | dict(tokens_by_loss or {})
    by_step = {step: _curves_by_loss(runs, losses, step) for step in steps}
    curves = {step: by_loss[loss_on] for step, by_loss in by_step.items()}
    best = _concatenate(best_rate_table(step_curves, step) for step, step_curves in curves.items())
    parts = part_table(runs)
    # Without a curve of three rates, only the parts of the change can be analysed.
    if best.empty:
        frames_by_name = dict.fromkeys((field.name for field in fields(SweepAnalysis)), pd.DataFrame())
        return SweepAnalysis(**frames_by_name | {"best": best, "parts": parts})
    # Comparisons of curves, also with those of other runs after the same number of steps, and best rates by every
    # estimator and by the losses over all tokens and over the answers.
    merged_others = {name: merge_repeated_runs(named_runs) for name, named_runs in (other_runs or {}).items()}
    comparisons, rates, ratios = [], [], []
    for step, by_loss in by_step.items():
        others = {name: _curves_by_loss(named_runs, losses, step) for name, named_runs in merged_others.items()}
        others_by_loss = {name: {other: named[name] for other, named in others.items()} for name in losses}
        comparisons.append(compare_best_rates(curves[step], step, others_by_loss[loss_on]))
        rates.append(rate_table(by_loss, step))
        ratios.append(ratio_table(by_loss, step, others_by_loss))
    # Exponents of the best rates, with those of the laws.
    constants = constants_by_steps(parts, best)
    by_steps = constants.groupby("step") if len(constants) else ()
    ranges = {int(step): (float(rows["constant"].min()), float(rows["constant"].max())) for step, rows in by_steps}
    exponents = pooled = exponents_in_steps = pd.DataFrame()
    if crossing_distances:
        law: dict[str, Any] = {"crossing_distances": crossing_distances, "warmup": warmup, "schedule": schedule}
        exponents = _concatenate(
            setting_exponents(step_curves, step, **law, linear_terms=linear_terms, constants=ranges)
            for step, step_curves in curves.items()
        )
        by_step_exponents = exponents.groupby("step") if len(exponents) else ()
        pooled = _concatenate(pooled_exponents(curves[step], step, rows) for step, rows in by_step_exponents)
        exponents_in_steps = step_exponents(curves, **law)
    at_same_rate = _concatenate(compare_at_one_rate(runs, tokens, step) for step in steps)
    # Regret of policies, with the geometric middle of the displacement constants at each step.
    middle = {step: math.sqrt(low * high) for step, (low, high) in ranges.items()}
    crossing_distance = float(np.median(crossing_distances)) if crossing_distances else None
    by_name = policies(middle, crossing_distance=crossing_distance)
    costs = regret_table(runs, tokens, curves, by_name, draws=BOOTSTRAP_SAMPLES)
    return SweepAnalysis(
        best,
        _concatenate(rates),
        _concatenate(ratios),
        _concatenate(comparisons),
        at_same_rate,
        exponents,
        pooled,
        _concatenate(estimator_table(curves[step], step) for step in steps),
        exponents_in_steps,
        parts,
        constants,
        costs,
        regret_by_policy(costs),
    )


def _curves_by_loss(
    runs: Sequence[SweepRun], tokens: Mapping[LossOn, Sequence[int]], step: int
) -> dict[LossOn, list[Curve]]:
    """Return the curves after a number of steps by the tokens of the loss."""
    return {
        loss_on: curves_at([replace(run, loss_on=loss_on) for run in runs], counts, step, draws=BOOTSTRAP_SAMPLES)
        for loss_on, counts in tokens.items()
    }


def _concatenate(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate the tables that are not empty, since an empty one would convert integers to floats."""
    with_rows = [table for table in tables if len(table)]
    return pd.concat(with_rows) if with_rows else pd.DataFrame()


def describe_exponents(runs: int, best: pd.DataFrame, exponents: pd.DataFrame, *, law: bool) -> str:
    """Return a sentence on whether the runs support each law, or on what is missing.

    Args:
      runs: Number of runs.
      best: `curves.best_rate_table` of every step.
      exponents: `law.setting_exponents` of every step.
      law: Whether crossing distances are known.
    """
    if best.empty:
        return f"No rank and gamma r has runs at three learning rates yet ({runs} runs in all)."
    if not law:
        return f"{runs} runs give {len(best)} best rates. Pass a run of sims.regime to compare them with the law."
    if exponents.empty:
        return f"No two best rates of the {runs} runs can be compared yet."
    laws = {"displacement law": "displacement_verdict", "law of a constant gradient": "verdict"}
    clauses = [f"the {law} {_count_verdicts(exponents[column])}" for law, column in laws.items() if column in exponents]
    is_undecided = any((exponents[column] == "undecided").any() for column in laws.values() if column in exponents)
    return f"Exponents of {runs} runs: {'; '.join(clauses)}.{f' {POWERFUL_SWEEP}' if is_undecided else ''}"


def _count_verdicts(verdicts: pd.Series) -> str:
    counts = verdicts.value_counts()
    return ", ".join(f"{name} {counts[name]} times" for name in get_args(Outcome) if name in counts)


def add_against_column(exponents: pd.DataFrame) -> pd.DataFrame:
    """Add a column ``against`` to `law.setting_exponents` that describes what the rate is compared against."""
    return exponents.assign(against=exponents["over"].map({"gain": "gamma r at r =", "rank": "r at gamma r ="}))


def add_size_column(frame: pd.DataFrame) -> pd.DataFrame:
    """Add a column ``size`` with the rank as text to a frame of a judgement, unless it summarises ranks."""
    if "rank" not in frame:
        return frame
    return frame.assign(size=frame["rank"].map("{:g}".format, na_action="ignore").fillna(FULL))
