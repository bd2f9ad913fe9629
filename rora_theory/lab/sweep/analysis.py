"""Analysis of the runs of a grid of horizons: best rates, comparisons, and exponents compared with the law."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd

from rora_theory.evidence.policies import measured_policies
from rora_theory.lab.finetune.config import LossOn
from rora_theory.lab.sweep.change_parts import constants_by_steps, part_table
from rora_theory.lab.sweep.curves import (
    best_rate_table,
    compare_at_one_rate,
    compare_best_rates,
    curves_at,
    rate_table,
    ratio_table,
)
from rora_theory.lab.sweep.law import RateLaw, setting_exponents, step_exponents
from rora_theory.lab.sweep.regret import regret_by_policy, regret_table
from rora_theory.lab.sweep.runs import FULL, SweepRun
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


TABLES: Mapping[str, str] = {
    "best": "best rates at every step by the three lowest losses, `curves.best_rate_table`",
    "rates": "best rates by every estimator and both losses, `curves.rate_table`",
    "ratios": "ratios of best rates, `curves.ratio_table`",
    "comparisons": "comparisons of curves at their best rates, `curves.compare_best_rates`",
    "one_rate": "comparisons at the same rate, `curves.compare_at_one_rate`",
    "exponents": "exponents of the best rates in gain and rank, `law.SettingExponents.by_setting`",
    "pooled": "the exponents by whole curves, alone and pooled, `law.SettingExponents.pooled`",
    "steps": "exponents of the best rates in the number of steps, `law.step_exponents`",
    "parts": "ratio of the parts of the change in every run, `change_parts.part_table`",
    "constants": "displacement constants K, `change_parts.constants_by_steps`",
    "regret": "cost of policies between all measured conditions, `regret.regret_table`",
    "policies": "summary of the cost, `regret.regret_by_policy`",
}
"""Tables of an analysis, with the functions that describe their columns."""


def analyse(
    runs: Sequence[SweepRun],
    tokens: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    shared: Mapping[str, Any],
    *,
    law: RateLaw | None = None,
    other_runs: Mapping[str, Sequence[SweepRun]] | None = None,
) -> dict[str, pd.DataFrame]:
    """Analyse the runs of a matrix, each combination of model, kind of adapter and further axes by itself.

    Every combination is compared with the first one. If there are several, the frames have a column for each setting in
    which they differ.

    Args:
      runs: Runs of the matrix.
      tokens: Numbers of tokens of the held-out records and of their answers by model.
      shared: Settings that all runs share, by name.
      law: Law of the model's best rates, see `law.read_regime`; warm-up and schedule are those of the runs. None leaves
        the law of a constant gradient out.
      other_runs: Runs to compare with, by description.

    Returns:
      The tables by their names from `TABLES`; empty where the runs do not suffice.
    """
    names = dict.fromkeys(name for run in runs for name, _ in run.axes)
    groups: dict[tuple[Any, ...], list[SweepRun]] = {}
    for run in runs:
        if run.rate:
            # Full fine-tuning and other methods without a rank are analysed beside LoRA.
            adapter = run.adapter if run.rank else "lora"
            key = (run.model, adapter, *(value for _, value in run.axes))
            groups.setdefault(key, []).append(run)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    others = dict(other_runs or {})
    labels = ("model", "adapter", *names)
    different = [place for place in range(len(labels)) if len({key[place] for key in groups}) > 1]
    for key, group in groups.items():
        settings = dict(shared) | dict(group[0].axes)
        by_loss = dict(zip(get_args(LossOn), tokens[key[0]], strict=True))
        group_law = replace(law or RateLaw(), warmup=settings["warmup"], schedule=settings["schedule"])
        judged = judge_runs(group, by_loss, group_law, other_runs=others)
        described = {labels[place]: key[place] for place in different}
        for name, frame in judged.items():
            tables[name].append(frame.assign(**described) if len(frame) else frame)
        # Losses of different models cannot be compared.
        if key == next(iter(groups)) and "model" not in described:
            others[", ".join(f"{name} {value}" for name, value in described.items())] = group
    return {name: _concatenate(parts) for name, parts in tables.items()}


def judge_runs(
    runs: Sequence[SweepRun],
    tokens: Mapping[LossOn, Sequence[int]],
    law: RateLaw,
    *,
    other_runs: Mapping[str, Sequence[SweepRun]] | None = None,
) -> dict[str, pd.DataFrame]:
    """Find the best rates at every step of the readings, and compare them with each other and with the law.

    Args:
      runs: Runs of one grid, see `runs.read_runs`.
      tokens: Number of tokens of each held-out record by the tokens of the loss; at least that by which the runs are
        judged.
      law: Law of a constant gradient; without crossing distances, the exponents of the laws are left out.
      other_runs: Runs to compare with, by description, see `runs.read_comparison_runs`.

    Returns:
      The tables by their names from `TABLES`; empty where the runs do not suffice.
    """
    # Curves of loss against rate at every step, and their minima.
    steps = sorted({reading.step for run in runs for reading in run.read.readings})
    loss_on = runs[0].loss_on if runs else "all"
    by_step = {step: _curves_by_loss(runs, tokens, step) for step in steps}
    curves = {step: by_loss[loss_on] for step, by_loss in by_step.items()}
    tables = dict.fromkeys(TABLES, pd.DataFrame())
    best = _concatenate(best_rate_table(step_curves, step) for step, step_curves in curves.items())
    tables |= {"best": best, "parts": part_table(runs)}
    # Without a curve of three rates, only the parts of the change can be analysed.
    if best.empty:
        return tables
    # Comparisons of curves, also with those of other runs after the same number of steps, and best rates by every
    # estimator and by the losses over all tokens and over the answers.
    comparisons, rates, ratios = [], [], []
    for step, by_loss in by_step.items():
        others = {name: _curves_by_loss(named_runs, tokens, step) for name, named_runs in (other_runs or {}).items()}
        others_by_loss = {name: {other: named[name] for other, named in others.items()} for name in tokens}
        comparisons.append(compare_best_rates(curves[step], step, others_by_loss[loss_on]))
        rates.append(rate_table(by_loss, step))
        ratios.append(ratio_table(by_loss, step, others_by_loss))
    tables |= {"comparisons": _concatenate(comparisons), "rates": _concatenate(rates), "ratios": _concatenate(ratios)}
    tables["one_rate"] = _concatenate(compare_at_one_rate(runs, tokens[loss_on], step) for step in steps)
    # Exponents of the best rates, with those of the laws.
    tables["constants"] = constants = constants_by_steps(tables["parts"], best)
    by_steps = constants.groupby("step") if len(constants) else ()
    ranges = {int(step): (float(rows["constant"].min()), float(rows["constant"].max())) for step, rows in by_steps}
    measured = [setting_exponents(step_curves, step, law, constants=ranges) for step, step_curves in curves.items()]
    tables["exponents"] = _concatenate(exponents.by_setting for exponents in measured)
    tables["pooled"] = _concatenate(exponents.pooled for exponents in measured)
    if law.crossing_distances:
        tables["steps"] = step_exponents(curves, law)
    # Regret of policies, with the geometric middle of the displacement constants at each step.
    middle = {step: math.sqrt(low * high) for step, (low, high) in ranges.items()}
    crossing_distance = float(np.median(law.crossing_distances)) if law.crossing_distances else None
    by_name = measured_policies(middle, crossing_distance=crossing_distance)
    tables["regret"] = regret_table(runs, tokens[loss_on], curves, by_name, draws=BOOTSTRAP_SAMPLES)
    tables["policies"] = regret_by_policy(tables["regret"])
    return tables


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
      exponents: `law.SettingExponents.by_setting` of every step.
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
    """Add a column ``against`` to `law.SettingExponents.by_setting` with what the rate is compared with."""
    return exponents.assign(against=exponents["over"].map({"gain": "gamma r at r =", "rank": "r at gamma r ="}))


def add_size_column(frame: pd.DataFrame) -> pd.DataFrame:
    """Add a column ``size`` with the rank as text to a frame of a judgement, unless it summarises ranks."""
    if "rank" not in frame:
        return frame
    return frame.assign(size=frame["rank"].map("{:g}".format, na_action="ignore").fillna(FULL))
