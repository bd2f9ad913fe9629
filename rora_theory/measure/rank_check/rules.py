"""Rank coordinate check of scaling rules: settings, controls, slopes and verdicts.

Nested adapters of several ranks take the same few steps (`check.FirstSteps`). All rules have the same scaling at a
reference rank, so that they differ in the exponent only. A quantity is flat if the 95% interval of its log-log slope
against the rank lies within a band around zero. Controls must not be flat: constant gamma grows with the rank, and the
gaussian initialisation shrinks (`control_direction`).

The command ``coordinate_check`` takes the steps. This module needs no extra.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from rora_theory.advice.adapter_config import PEFT_INITS, PeftInit
from rora_theory.advice.setting import Setting
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure.rank_check.coordinate_table import (
    BATCH_SPLITS,
    MODEL,
    Coordinate,
    judge_model,
    slope_rows,
    summarise_verdicts,
    values_by_coordinate,
)
from rora_theory.optimizers import DISPLAY_NAMES, FAMILY, OPTIMIZER_NAMES, OptimizerName, scaling_power
from rora_theory.runs import frames
from rora_theory.scaling import Rule, check_choice, check_integer, exponent
from rora_theory.stats import slopes
from rora_theory.stats.rate_optimum import predicted_slopes
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import alpha_at, check_list, check_rules, check_steps, listed, name_of

COLUMNS = (
    "optimizer", "rule", "kappa", "init", "control", "rank", "scaling", "learning_rate", "seed", "step", "split",
    "module", "quantity", "value",
)  # fmt: skip
SLOPE_COLUMNS = (
    "optimizer", "rule", "kappa", "init", "control", "step", "split", "module", "quantity", "slope", "standard_error",
    "half_width", "seeds", "verdict", "kappa_flat",
)  # fmt: skip
UNITS = {
    "output": "root mean square of gamma B A x over adapted layers, tokens and outputs",
    "hidden, logits": "root mean square of the change since the base model",
    "loss": "nats per token",
    "half_width": "half-width of the 95% interval of the slope, Student's t over seeds",
    "kappa_flat": "exponent that would have been flat: kappa + slope under Adam, kappa + slope/2 under SGD, if the "
    "quantity is proportional to gamma and gamma^2",
}


@dataclass(frozen=True)
class CheckConfig:
    """Settings of the check: trainings that differ in rank, rule, optimizer, initialisation and seed.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = (2, 8, 32, 128)
    """Ranks of the adapter, at least two; they may exceed the layer's width"""
    rules: tuple[Rule, ...] = ("lora", "rora")
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    """Optimizers: sgd, momentum (0.9), adam, adamw (weight decay 0.01), at a constant learning rate"""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of updates after which to measure, in ascending order"""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Seeds of the runs; error bars need two or more"""
    gamma: float = 2.0
    """Scaling factor of every rule at the reference rank"""
    reference_rank: int = 8
    """Rank at which all rules have the same scaling factor"""
    inits: tuple[PeftInit, ...] = ("kaiming_uniform",)
    """Initialisations of A"""
    controls: bool = True
    """Also check two controls that must not be flat, under the first optimizer: kappa = 0 and the gaussian
    initialisation"""
    adam_lr: Positive = 1e-4
    """Learning rate of adam and adamw"""
    sgd_lr: Positive = 0.01
    """Learning rate of sgd, and ten times that of momentum"""
    band: Positive = slopes.BAND
    """Largest absolute slope that counts as flat"""

    def __post_init__(self) -> None:
        check_list("ranks", self.ranks, check_integer, fewest=2)
        check_rules(self.rules, gamma=self.gamma, reference_rank=self.reference_rank)
        check_list("optimizers", self.optimizers, partial(check_choice, choices=OPTIMIZER_NAMES))
        check_steps(self.steps)
        check_list("seeds", self.seeds, check_seed, fewest=2)
        check_ranges(self)
        check_list("inits", self.inits, partial(check_choice, choices=tuple(PEFT_INITS)))


class Case(NamedTuple):
    """Optimizer, rule and initialisation that are checked together over ranks and seeds."""

    optimizer: OptimizerName
    rule: Rule
    init: PeftInit
    control: bool

    def __str__(self) -> str:
        kappa = {"lora": "alpha/r", "rora": "alpha/sqrt(r)", "rslora": "alpha/sqrt(r)"}.get(name_of(self.rule))
        text = f"{DISPLAY_NAMES[self.optimizer]}, {kappa or f'kappa = {name_of(self.rule)}'}, A {self.init}"
        return text + (" (control)" if self.control else "")


@dataclass(frozen=True)
class CoordinateCell:
    """Training of one adapter for a few steps."""

    case: Case
    seed: int
    rank: int

    def __str__(self) -> str:
        return f"{self.case}, r = {self.rank}, seed {self.seed}"


def cases(config: CheckConfig) -> Iterator[Case]:
    """Yield the cases of the configuration, then the controls."""
    for optimizer in config.optimizers:
        for rule in config.rules:
            for init in config.inits:
                yield Case(optimizer, rule, init, False)
    # Controls, for which the law predicts a dependence on the rank: the check must detect it.
    if config.controls:
        optimizer = config.optimizers[0]
        if 0.0 not in map(exponent, config.rules):
            yield Case(optimizer, 0.0, "kaiming_uniform", True)
        if "gaussian" not in config.inits:
            # The gaussian init is flat under constant gamma: use the rule with the largest exponent, farthest from it.
            yield Case(optimizer, max(config.rules, key=exponent), "gaussian", True)


def coordinate_cells(config: CheckConfig) -> list[CoordinateCell]:
    """Return the cells of all adapters in the order of the table."""
    return [
        CoordinateCell(case, seed, rank) for case in cases(config) for seed in config.seeds for rank in config.ranks
    ]


def setting_of(config: CheckConfig, cell: CoordinateCell) -> Setting:
    """Return the setting of a cell's adapter and training."""
    optimizer, rule, init, _ = cell.case
    # Each optimizer has its own learning rate.
    rates = {"sgd": config.sgd_lr, "momentum": config.sgd_lr / 10}
    return Setting(
        rank=cell.rank,
        alpha=alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank),
        learning_rate=rates.get(optimizer, config.adam_lr),
        rule=rule,
        optimizer=optimizer,
        init=init,
    )


def coordinate_rows(
    config: CheckConfig, cell: CoordinateCell, sizes: Iterable[tuple[Coordinate, float]]
) -> list[dict[str, Any]]:
    """Return the sizes of one adapter as rows of a table.

    Args:
      cell: Case, seed and rank of the adapter.
      sizes: Coordinates with their sizes.

    Returns:
      A row with the columns `COLUMNS` for each coordinate.
    """
    setting, (optimizer, rule, init, control) = setting_of(config, cell), cell.case
    labels = {"optimizer": optimizer, "rule": name_of(rule), "kappa": exponent(rule), "init": init}
    labels |= {"control": int(control), "rank": cell.rank, "learning_rate": setting.learning_rate, "seed": cell.seed}
    labels["scaling"] = setting.scaling
    return [labels | coordinate._asdict() | {"value": float(value)} for coordinate, value in sizes]


def coordinate_slopes(config: CheckConfig, sizes: pd.DataFrame) -> pd.DataFrame:
    """Fit the slope of every coordinate except the loss, and of the geometric mean of the modules' outputs.

    Args:
      sizes: Frame with the columns `COLUMNS`, of all cells.

    Returns:
      A frame with the columns `SLOPE_COLUMNS`.
    """
    rows: list[dict[str, Any]] = []
    ranks = tuple(sorted(config.ranks))
    for case in cases(config):
        # Sizes of each coordinate as an array [seeds, ranks].
        values = values_by_coordinate(rows_of_case(sizes, case), ranks=ranks, seeds=config.seeds)
        # Geometric mean of the outputs of all modules.
        outputs: dict[tuple[str, int], list[np.ndarray]] = {}
        for coordinate, value in values.items():
            if coordinate.quantity == "output":
                outputs.setdefault((coordinate.split, coordinate.step), []).append(value)
        for (split, step), by_module in outputs.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values[Coordinate("output", split, MODEL, step)] = np.exp(np.mean(np.log(by_module), axis=0))
        # Slopes and verdicts.
        kappa, power = exponent(case.rule), scaling_power(FAMILY[case.optimizer])
        labels = {"optimizer": case.optimizer, "rule": name_of(case.rule), "kappa": kappa, "init": case.init}
        labels |= {"control": int(case.control)}
        rows += [labels | row for row in slope_rows(ranks, values, band=config.band, kappa=kappa, power=power)]
    return frames.from_rows(rows, SLOPE_COLUMNS)


def rows_of_case(table: pd.DataFrame, case: Case) -> pd.DataFrame:
    """Return a table's rows of one case."""
    return frames.where(table, {"optimizer": case.optimizer, "rule": name_of(case.rule), "init": case.init})


def verdicts(config: CheckConfig, slopes: pd.DataFrame) -> pd.DataFrame:
    """Summarise the slopes of each case in verdicts on the whole model and on the outputs of modules.

    Args:
      slopes: Frame of `coordinate_slopes`.

    Returns:
      A row for each case. ``flat SPLIT STEP`` is the number of modules with a flat output. ``kappa_flat`` is that of
      the final hidden state on the training batch after the last step, or NaN if it did not change.
    """
    rows = []
    for case in cases(config):
        group = rows_of_case(slopes, case)
        # Verdicts on the modules' outputs by split and step.
        outputs = group[(group["quantity"] == "output") & (group["module"] != MODEL)]
        flat_counts: dict[str, str] = {}
        all_verdicts: list[str] = []
        for split in BATCH_SPLITS:
            for step in config.steps:
                is_selected = (outputs["split"] == split) & (outputs["step"] == step)
                module_verdicts = outputs["verdict"][is_selected].tolist()
                flat_counts[f"flat {split} {step}"] = f"{module_verdicts.count('flat')} of {len(module_verdicts)}"
                all_verdicts += module_verdicts
        whole_model, modules = judge_model(group.to_dict("records")), summarise_verdicts(all_verdicts)
        # A control is expected to fail: state whether it does.
        if case.control:
            whole_model, modules = _judge_control(case, whole_model), _judge_control(case, modules)
        last = group.query("quantity == 'hidden' and split == 'train' and step == @config.steps[-1]")
        row = case._asdict() | {"rule": name_of(case.rule), "whole_model": whole_model, "modules": modules}
        row |= flat_counts
        rows.append(row | {"kappa_flat": last["kappa_flat"].iloc[0] if len(last) else math.nan})
    return pd.DataFrame(rows)


def describe_check(config: CheckConfig, judged: pd.DataFrame) -> str:
    """Return a sentence with the verdicts on the whole model, controls last.

    Args:
      judged: Frame of `verdicts`.
    """
    clauses = [f"{case}: {verdict}" for case, verdict in zip(cases(config), judged["whole_model"], strict=True)]
    steps = f"{listed(config.steps)} {'steps' if max(config.steps) > 1 else 'step'}"
    return f"Change of the whole model after {steps}, against the rank: {'; '.join(clauses)}."


def control_growth(case: Case) -> list[float]:
    """Compute the powers of the rank in a control's first step by the law, if signal or cross-talk dominates.

    The entries of a gaussian A are proportional to 1/r, and the step contains A to the same power as gamma.
    """
    decrease = scaling_power(FAMILY[case.optimizer]) if case.init == "gaussian" else 0
    # The slopes are those of the rate that preserves the step, which is the inverse of the step's growth.
    rate_slopes = predicted_slopes(case.optimizer, exponent(case.rule), trained="B")
    return [-slope - decrease for slope in rate_slopes.values()]


def control_direction(case: Case) -> Literal["grows", "shrinks", ""]:
    """Return the direction in which a control's first step depends on the rank by the law.

    The direction is empty if it depends on whether signal or cross-talk dominates.
    """
    growth = control_growth(case)
    return "grows" if min(growth) >= 0 else "shrinks" if max(growth) <= 0 else ""


def _judge_control(case: Case, verdict: str) -> str:
    """Describe whether a control depends on the rank in the direction that the law predicts."""
    # A flat control means that the check cannot detect a dependence, unless the law allows the control to be flat.
    if verdict == "flat":
        if 0 in control_growth(case):
            return "flat, which the law allows if one term dominates: no control"
        return "FLAT: the check has no power"
    expected, measured = control_direction(case), verdict.partition(" ")[0]
    if not expected or measured not in ("grows", "shrinks"):
        return verdict
    if measured == expected:
        return f"{verdict}, as expected of the control"
    return f"{verdict}, AGAINST THE LAW: this control {expected}"
