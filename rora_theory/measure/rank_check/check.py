"""The rank coordinate check of scaling rules: which quantities of a model depend on the rank, with controls.

Adapters of several ranks, nested, take the same few steps (`coordinates.Checker`). The rules meet at a reference rank,
so that they differ in the exponent alone. A log-log slope against the rank within the band of zero, seeds and all, is
flat. Controls must not be: constant gamma grows, the gaussian init shrinks (`control_direction`).

    found = measure.coordinate_check(model, train, held_out)
    found.verdicts[["rule", "whole_model", "modules"]]
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pandas as pd

from rora_theory.adapters.inits import LORA_INITS, LoraInit
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.advice.setting import Setting
from rora_theory.data.batches import Batch
from rora_theory.io import frames
from rora_theory.llama import Model
from rora_theory.measure.rank_check.coordinate_table import (
    BATCH_SPLITS,
    MODEL,
    Coordinate,
    Table,
    in_a_word,
    whole_model,
)
from rora_theory.measure.rank_check.coordinates import Checker
from rora_theory.measure.regimes import thin
from rora_theory.optimizers import FAMILY, OPTIMIZER_NAMES, WORDS, OptimizerName
from rora_theory.scaling import Rule, exponent
from rora_theory.stats import slopes
from rora_theory.stats.rate_optimum import predicted_slopes
from rora_theory.theory.laws import scaling_power
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import (
    alpha_at,
    check_alphas,
    check_choices,
    check_ranks,
    check_rules,
    check_seeds,
    check_steps,
    listed,
    name_of,
)

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
    "inner": "root mean square of A x",
    "delta": "|gamma B A|_F, root mean square over layers",
    "grad_A, grad_B": "Frobenius norm over layers of the gradient that made the step",
    "hidden, logits": "root mean square of their change from the base model's",
    "loss": "nats a token",
    "half_width": "of the 95% interval of the slope, Student's t over seeds",
    "kappa_flat": "exponent that would have been flat: kappa + slope under Adam, kappa + slope/2 under SGD, if the "
    "quantity went on as gamma and gamma^2",
}


@dataclass(frozen=True)
class CheckConfig:
    """What to check.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = (2, 8, 32, 128)
    """ranks of the adapter, two or more"""
    rules: tuple[Rule, ...] = ("lora", "rora")
    """scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    """sgd, momentum, adam or adamw, at a constant rate and without clipping"""
    inits: tuple[LoraInit, ...] = ("kaiming_uniform",)
    """laws of A"""
    controls: bool = True
    """check kappa = 0 and the gaussian init under the first optimizer too, which must not be flat"""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """updates after which to read, ascending"""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """seeds, each of an adapter and of its batches; two or more, for error bars"""
    gamma: float = 2.0
    """scaling of every rule at the reference rank"""
    reference_rank: int = 8
    """rank at which the rules meet"""
    adam_lr: Positive = 1e-4
    """learning rate of adam and adamw"""
    sgd_lr: Positive = 0.01
    """learning rate of sgd"""
    momentum_lr: Positive = 0.001
    """learning rate of momentum"""
    band: Positive = slopes.BAND
    """largest absolute slope to call flat"""

    def __post_init__(self) -> None:
        check_ranks(self.ranks)
        check_rules(self.rules)
        for name, accepted in (("optimizers", OPTIMIZER_NAMES), ("inits", LORA_INITS)):
            check_choices(f"--{name}", getattr(self, name), accepted)
        check_steps(self.steps)
        check_ranges(self)
        check_alphas(self.rules, gamma=self.gamma, reference_rank=self.reference_rank)
        check_seeds(self.seeds, fewest=2)


class Case(NamedTuple):
    """One line of the check: everything but the rank and the seed."""

    optimizer: OptimizerName
    rule: Rule
    init: LoraInit
    control: bool

    def __str__(self) -> str:
        kappa = {"lora": "alpha/r", "rora": "alpha/sqrt(r)", "rslora": "alpha/sqrt(r)"}.get(name_of(self.rule))
        text = f"{WORDS[self.optimizer]}, {kappa or f'kappa = {name_of(self.rule)}'}, A {self.init}"
        return text + (" (control)" if self.control else "")


@dataclass(frozen=True)
class CoordinateCell:
    """One adapter, trained for some steps."""

    case: Case
    seed: int
    rank: int

    def __str__(self) -> str:
        return f"{self.case}, r = {self.rank}, seed {self.seed}"


def cases(config: CheckConfig) -> Iterator[Case]:
    """The rules asked for, then the controls."""
    for optimizer in config.optimizers:
        for rule in config.rules:
            for init in config.inits:
                yield Case(optimizer, rule, init, False)
    if config.controls:
        first = config.optimizers[0]
        if 0.0 not in map(exponent, config.rules):
            yield Case(first, 0.0, "kaiming_uniform", True)
        if "gaussian" not in config.inits:
            # Under constant gamma the gaussian init is flat: the rule farthest from that one.
            yield Case(first, max(config.rules, key=exponent), "gaussian", True)


def coordinate_cells(config: CheckConfig) -> list[CoordinateCell]:
    """Every adapter, in the order of the table."""
    return [
        CoordinateCell(case, seed, rank) for case in cases(config) for seed in config.seeds for rank in config.ranks
    ]


def coordinate_rows(
    config: CheckConfig, checker: Checker, cell: CoordinateCell, batch_of: Callable[[int], Batch], held_out: Batch
) -> list[dict[str, Any]]:
    """The sizes that one adapter shows, as rows of a table.

    Args:
      config, checker, cell: whose.
      batch_of: the batch of step t = 0, 1, ...
      held_out: a batch that is never trained on.
    """
    (optimizer, rule, init, control), rank = cell.case, cell.rank
    rates = {"sgd": config.sgd_lr, "momentum": config.momentum_lr}
    setting = Setting(
        rank=rank,
        alpha=alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank),
        learning_rate=rates.get(optimizer, config.adam_lr),
        rule=rule,
        optimizer=optimizer,
        init=init,
    )
    key = jax.random.fold_in(jax.random.key(0), cell.seed)
    frame = {"optimizer": optimizer, "rule": name_of(rule), "kappa": exponent(rule), "init": init}
    frame |= {"control": int(control), "rank": rank, "learning_rate": setting.learning_rate, "seed": cell.seed}
    frame["scaling"] = setting.scaling
    run = checker.run(setting, key, batch_of, held_out, steps=config.steps)
    return [frame | coordinate._asdict() | {"value": float(value)} for coordinate, value in run]


def size_table(found: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of some `coordinate_rows`."""
    return frames.of(found, COLUMNS)


def coordinate_slopes(config: CheckConfig, sizes: pd.DataFrame) -> pd.DataFrame:
    """Slope of every coordinate but the loss, and of the modules' outputs together (their logarithms' mean).

    Args:
      config: of the check.
      sizes: of `size_table`, every cell's.
    """
    found: list[dict[str, Any]] = []
    ranks = tuple(sorted(config.ranks))
    for case in cases(config):
        values: dict[Coordinate, np.ndarray] = {}
        for named, own in of_case(sizes, case).groupby(list(Coordinate._fields), sort=False):
            by_seed = own.pivot(index="seed", columns="rank", values="value")
            values[Coordinate._make(named)] = by_seed.reindex(index=config.seeds, columns=ranks).to_numpy(np.float64)
        outputs: dict[tuple[str, int], list[np.ndarray]] = {}
        for coordinate, value in values.items():
            if coordinate.quantity == "output":
                outputs.setdefault((coordinate.split, coordinate.step), []).append(value)
        for (split, step), of_modules in outputs.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values[Coordinate("output", split, MODEL, step)] = np.exp(np.mean(np.log(of_modules), axis=0))
        kappa, power = exponent(case.rule), scaling_power(FAMILY[case.optimizer])
        line = {"optimizer": case.optimizer, "rule": name_of(case.rule), "kappa": kappa, "init": case.init}
        line |= {"control": int(case.control)}
        found += [line | own for own in Table(ranks, values).lines(band=config.band, kappa=kappa, power=power)]
    return frames.of(found, SLOPE_COLUMNS)


def of_case(found: pd.DataFrame, case: Case) -> pd.DataFrame:
    """A table's rows of one case."""
    own = {"optimizer": case.optimizer, "rule": name_of(case.rule), "init": case.init}
    return frames.where(found, own)


def verdicts(config: CheckConfig, found: pd.DataFrame) -> pd.DataFrame:
    """What the slopes of `coordinate_slopes` say of each case: of the whole model, and of the modules' own outputs.

    Returns:
      a row a case; ``flat SPLIT STEP`` counts the modules whose output is flat, ``kappa_flat`` is of the final hidden
      state on the training batch after the last step, NaN where it did not move.
    """
    lines = []
    for case in cases(config):
        group = of_case(found, case)
        outputs = group[(group["quantity"] == "output") & (group["module"] != MODEL)]
        own = {
            (split, step): outputs["verdict"][(outputs["split"] == split) & (outputs["step"] == step)].tolist()
            for split in BATCH_SPLITS
            for step in config.steps
        }
        whole = whole_model(group.to_dict("records"))
        parts = in_a_word([verdict for each in own.values() for verdict in each])
        if case.control:
            whole, parts = _of_control(case, whole), _of_control(case, parts)
        last = group.query("quantity == 'hidden' and split == 'train' and step == @config.steps[-1]")
        line = case._asdict() | {"rule": name_of(case.rule), "whole_model": whole, "modules": parts}
        line |= {f"flat {split} {step}": f"{each.count('flat')} of {len(each)}" for (split, step), each in own.items()}
        lines.append(line | {"kappa_flat": last["kappa_flat"].iloc[0] if len(last) else math.nan})
    return pd.DataFrame(lines)


def check_in_words(config: CheckConfig, judged: pd.DataFrame) -> str:
    """The verdicts on the whole model, controls last, in a sentence.

    Args:
      config: of the check.
      judged: of `verdicts`.
    """
    words = [f"{case}: {word}" for case, word in zip(cases(config), judged["whole_model"], strict=True)]
    steps = f"{listed(config.steps)} step{'s' * (max(config.steps) > 1)}"
    return f"Change of the whole model after {steps}, against the rank: {'; '.join(words)}."


def control_growth(case: Case) -> list[float]:
    """The powers of the rank that the law gives a control's first step, of whichever part leads.

    The gaussian A falls as 1/r, and the step carries A to the power of gamma.
    """
    smaller = scaling_power(FAMILY[case.optimizer]) if case.init == "gaussian" else 0
    kept = predicted_slopes(case.optimizer, exponent(case.rule), trained="B")  # by a rate that moves the other way
    return [-slope - smaller for slope in kept.values()]


def control_direction(case: Case) -> Literal["grows", "shrinks", ""]:
    """Where the law has a control's first step go with the rank, whichever part leads; empty where that decides."""
    growth = control_growth(case)
    return "grows" if min(growth) >= 0 else "shrinks" if max(growth) <= 0 else ""


def _of_control(case: Case, word: str) -> str:
    if word == "flat":
        if 0 in control_growth(case):
            return "flat, as the law has it where one of its parts leads: no control"
        return "FLAT: the check has no power"
    must, found = control_direction(case), word.partition(" ")[0]
    if not must or found not in ("grows", "shrinks"):
        return word
    return f"{word}, as a control must" if found == must else f"{word}, AGAINST THE LAW: this control {must}"


@dataclass(frozen=True, eq=False)
class CoordinateCheck:
    """What `coordinate_check` found, as tidy frames.

    Attributes:
      sizes: a row a case, rank, seed, step, split, module and quantity, see `coordinate_table.Coordinate`.
      slopes: a row a case, step, split, module and quantity, with error and verdict, see `coordinate_slopes`.
      verdicts: a row a case, see `verdicts`.
    """

    sizes: pd.DataFrame
    slopes: pd.DataFrame
    verdicts: pd.DataFrame


def coordinate_check(
    model: Model,
    train: Batch | Sequence[Batch],
    held_out: Batch,
    config: CheckConfig | None = None,
    *,
    target_modules: Sequence[str] | str = PAPER_TARGETS,
) -> CoordinateCheck:
    """Check scaling rules on a model.

    Args:
      model: of `rora_theory.llama.load`.
      train: the batch of every step, or one a step, begun again where steps go on.
      held_out: a batch that is never trained on; `unseen.apart_from` leaves out what it shares with the training.
      config: what to check; None is `CheckConfig` as it stands.
      target_modules: what is adapted.

    Raises:
      InputError: a rank or module that does not fit the model.
    """
    config = config or CheckConfig()
    batches = [train] if isinstance(train, Batch) else list(train)
    checker = Checker(model.params, model.config, width=max(config.ranks), target_modules=target_modules)
    sizes = size_table(
        row
        for cell in coordinate_cells(config)
        for row in coordinate_rows(config, checker, cell, partial(_in_turn, batches), held_out)
    )
    found = coordinate_slopes(config, sizes)
    judged = verdicts(config, found)
    thin.warn((sizes, found, judged), thin.of_ranks(config.ranks))
    return CoordinateCheck(sizes, found, judged)


def _in_turn(batches: Sequence[Batch], step: int) -> Batch:
    return batches[step % len(batches)]
