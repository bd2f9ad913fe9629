"""The rank coordinate check of scaling rules: which quantities of a model depend on the rank, with controls.

Adapters of several ranks, nested, take the same few steps (`coordinates.Checker`). The rules meet at a reference rank,
so that they differ in the exponent alone. A log-log slope against the rank within the band of zero, seeds and all, is
flat. Controls must not be: constant gamma grows, the gaussian init shrinks.

    found = measure.coordinate_check(model, train, held_out)
    found.verdicts[["rule", "whole_model", "modules"]]
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from rora_theory.adapters.inits import INITS, Init
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.llama import Model
from rora_theory.measure.coordinate_table import MODEL, SPLITS, Coordinate, Table, in_a_word, whole_model
from rora_theory.measure.coordinates import Checker, Setting
from rora_theory.optimizers import OPTIMIZER_NAMES, WORDS, OptimizerName
from rora_theory.rules import check_steps
from rora_theory.scaling import Rule, alpha_for, check_integer, check_positive, check_rank, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats import slopes


@dataclass(frozen=True)
class CheckConfig:
    """What to check.

    Attributes:
      ranks: two or more.
      rules: scaling rules by the name that the results call them.
      optimizers: at a constant rate and without clipping.
      inits: laws of A.
      controls: whether to check kappa = 0 and the gaussian init under the first optimizer too, which must not be flat.
      steps: updates after which to read, ascending.
      seeds: number of adapters, 2 or more for error bars.
      gamma, reference_rank: scaling of every rule at the rank where they meet.
      adam_rate, sgd_rate, momentum_rate: learning rates; Adam's is AdamW's too.
      band: largest absolute slope to call flat.
      seed: of all draws.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = (2, 8, 32, 128)
    rules: Mapping[str, Rule] = field(default_factory=lambda: {"lora": "lora", "rora": "rora"})
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    inits: tuple[Init, ...] = ("kaiming_uniform",)
    controls: bool = True
    steps: tuple[int, ...] = (1, 2, 5, 10)
    seeds: int = 4
    gamma: float = 2.0
    reference_rank: int = 8
    adam_rate: float = 1e-4
    sgd_rate: float = 0.01
    momentum_rate: float = 0.001
    band: float = slopes.BAND
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fewest in (("ranks", 2), ("rules", 1), ("optimizers", 1), ("inits", 1)):
            values = tuple(getattr(self, name))
            if len(values) < fewest or len(set(values)) < len(values):
                raise InputError(f"{name} is {' '.join(map(str, values))!r}; accepted are {fewest} or more, each once")
        for rank in (*self.ranks, self.reference_rank):
            check_rank(rank)
        for name, accepted in (("optimizers", OPTIMIZER_NAMES), ("inits", INITS)):
            for value in getattr(self, name):
                if value not in accepted:
                    raise InputError(f"--{name} has {value!r}; accepted are {', '.join(accepted)}")
        check_steps(self.steps)
        for name in ("gamma", "adam_rate", "sgd_rate", "momentum_rate", "band"):
            check_positive("--" + name.replace("_", "-"), getattr(self, name))
        check_integer("seeds", self.seeds, least=2)
        check_seed(self.seed, "--seed")

    def rule(self, name: str) -> Rule:
        """Of a case's name: one of ``rules``, or the control's."""
        return {"0": 0.0, **self.rules}[name]


class Case(NamedTuple):
    """One line of the check: everything but the rank and the seed."""

    optimizer: OptimizerName
    rule: str
    init: Init
    control: bool

    @property
    def label(self) -> str:
        """In words."""
        kappa = {"lora": "alpha/r", "rora": "alpha/sqrt(r)", "rslora": "alpha/sqrt(r)"}.get(self.rule)
        text = f"{WORDS[self.optimizer]}, {kappa or f'kappa = {self.rule}'}, A {self.init}"
        return text + (" (control)" if self.control else "")


def cases(config: CheckConfig) -> Iterator[Case]:
    """The rules asked for, then the controls."""
    for optimizer in config.optimizers:
        for rule in config.rules:
            for init in config.inits:
                yield Case(optimizer, rule, init, False)
    if config.controls:
        first = config.optimizers[0]
        asked = {exponent(rule) for rule in config.rules.values()}
        if 0.0 not in asked:
            yield Case(first, "0", "kaiming_uniform", True)
        if "gaussian" not in config.inits:
            # Under constant gamma the gaussian init is flat: the rule farthest from that one.
            steepest = max(config.rules, key=lambda name: exponent(config.rule(name)))
            yield Case(first, steepest, "gaussian", True)


def cell_rows(
    config: CheckConfig,
    checker: Checker,
    case: Case,
    seed: int,
    rank: int,
    batch_of: Callable[[int], Batch],
    held_out: Batch,
) -> list[dict[str, Any]]:
    """The sizes that one adapter shows, as rows of a table.

    Args:
      config, checker, case, seed, rank: whose.
      batch_of: the batch of step t = 0, 1, ...
      held_out: a batch that is never trained on.
    """
    rule = config.rule(case.rule)
    alpha = alpha_for(rule, scaling=config.gamma, rank=config.reference_rank)
    rates = {"sgd": config.sgd_rate, "momentum": config.momentum_rate}
    setting = Setting(rank, alpha, rule, case.init, case.optimizer, rates.get(case.optimizer, config.adam_rate))
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    frame = {"optimizer": case.optimizer, "rule": case.rule, "kappa": exponent(rule), "init": case.init}
    frame |= {"control": int(case.control), "rank": rank, "learning_rate": setting.learning_rate, "seed": seed}
    frame["scaling"] = scaling_factor(rule, alpha=alpha, rank=rank)
    run = checker.run(setting, key, batch_of, held_out, steps=config.steps)
    return [
        frame
        | {name: getattr(coordinate, name) for name in ("step", "split", "module", "quantity")}
        | {"value": float(f"{value:.6g}")}
        for coordinate, value in run
    ]


def fits(config: CheckConfig, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slope of every coordinate but the loss, and of the modules' outputs together (their logarithms' mean)."""
    found = []
    ranks = tuple(sorted(config.ranks))
    for case in cases(config):
        group = of_case(rows, case)
        values: dict[Coordinate, np.ndarray] = {}
        for row in group:
            coordinate = Coordinate(row["quantity"], row["split"], row["module"], row["step"])
            table = values.setdefault(coordinate, np.full((config.seeds, len(ranks)), np.nan))
            table[row["seed"], ranks.index(row["rank"])] = row["value"]
        modules = [name for name in dict.fromkeys(row["module"] for row in group) if name != MODEL]
        for split_, step in dict.fromkeys((row["split"], row["step"]) for row in group):
            outputs = np.stack([values[Coordinate("output", split_, module, step)] for module in modules])
            with np.errstate(divide="ignore", invalid="ignore"):
                values[Coordinate("output", split_, MODEL, step)] = np.exp(np.mean(np.log(outputs), axis=0))
        kappa, power = exponent(config.rule(case.rule)), 2 if case.optimizer in ("sgd", "momentum") else 1
        line = {"optimizer": case.optimizer, "rule": case.rule, "init": case.init, "control": int(case.control)}
        line |= {"kappa": kappa}
        found += [line | own for own in Table(ranks, values).lines(band=config.band, kappa=kappa, power=power)]
    return found


def of_case(rows: Sequence[dict[str, Any]], case: Case) -> list[dict[str, Any]]:
    """A table's rows of one case."""
    return [row for row in rows if (row["optimizer"], row["rule"], row["init"]) == case[:3]]


def verdicts(config: CheckConfig, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the slopes of `fits` say of each case: of the whole model, and of the modules' own outputs.

    Returns:
      a row a case; ``flat SPLIT STEP`` counts the modules whose output is flat, ``kappa_flat`` is of the final hidden
      state on the training batch after the last step, None where it did not move.
    """
    rows = []
    for case in cases(config):
        group = of_case(found, case)
        modules = [name for name in dict.fromkeys(row["module"] for row in group) if name != MODEL]
        own = {
            (split, step): [
                row["verdict"]
                for row in group
                if (row["quantity"], row["split"], row["step"]) == ("output", split, step) and row["module"] in modules
            ]
            for split in SPLITS
            for step in config.steps
        }
        whole = whole_model(group)
        parts = in_a_word([verdict for each in own.values() for verdict in each])
        if case.control:
            whole, parts = _of_control(whole), _of_control(parts)
        last = [
            row
            for row in group
            if (row["quantity"], row["split"], row["step"]) == ("hidden", "train", config.steps[-1])
        ]
        row = dict(zip(("optimizer", "rule", "init", "control"), case, strict=True))
        row |= {"whole_model": whole, "modules": parts}
        row |= {f"flat {split} {step}": f"{each.count('flat')} of {len(each)}" for (split, step), each in own.items()}
        rows.append(row | {"kappa_flat": last[0].get("kappa_flat") if last else None})
    return rows


def _of_control(word: str) -> str:
    if word == "flat":
        return "FLAT: the check has no power"
    return f"{word}, as a control must" if word.startswith(("grows", "shrinks")) else word


@dataclass(frozen=True, eq=False)
class Check:
    """What `coordinate_check` found, as tidy frames.

    Attributes:
      sizes: a row a case, rank, seed, step, split, module and quantity, see `coordinate_table.Coordinate`.
      slopes: a row a case, step, split, module and quantity, with the slope's error and verdict, see `fits`.
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
) -> Check:
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
    rows = [
        row
        for case in cases(config)
        for seed in range(config.seeds)
        for rank in config.ranks
        for row in cell_rows(config, checker, case, seed, rank, partial(_in_turn, batches), held_out)
    ]
    found = fits(config, rows)
    return Check(*(pd.DataFrame(table) for table in (rows, found, verdicts(config, found))))


def _in_turn(batches: Sequence[Batch], step: int) -> Batch:
    return batches[step % len(batches)]
