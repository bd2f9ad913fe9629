"""Request for a transfer: the tuned setting, from options or a saved adapter, and an assumed or measured regime.

config = TransferConfig(from_=Path("adapter"), lr=2e-4, to_rank=128, regime="results/regime/RUN")
advice, peft, _ = advise(config)
print(advice.peft_config(**peft))
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.advice.adapter_config import PAPER_TARGETS, PeftInit, TaskType, peft_targets
from rora_theory.advice.lora_config import SavedSetting
from rora_theory.advice.modules import AlphaGrouping
from rora_theory.advice.run_change import RunChange
from rora_theory.advice.setting import REGIMES, Setting
from rora_theory.advice.trainer_configs import read_trainer_config
from rora_theory.advice.transfer import Advice, transfer
from rora_theory.errors import InputError
from rora_theory.measure.regimes.layer import Split
from rora_theory.optimizers import SCHEDULES, OptimizerName, Schedule, parse_optimizer
from rora_theory.scaling import Rule, exponent
from rora_theory.validation.ranges import Count, NotNegative, Positive, check_ranges
from rora_theory.validation.rules import as_words, check_unread

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferConfig:
    """Tuned setting and the rank to transfer it to.

    Raises:
      InputError: If a value is out of range.
    """

    from_rank: Count | None = None
    """Tuned rank; the default is that of --from, or 8"""
    to_rank: Count = 128
    """New rank"""
    alpha: float | None = None
    """Alpha at the tuned rank; the default is that of --from, or 16"""
    lr: Positive | None = None
    """Learning rate at the tuned rank; the default is that of --from, or 3e-4"""
    rule: Rule | None = None
    """Scaling rule: lora (alpha / r), rora or rslora (alpha / sqrt(r)), or an exponent kappa; the default is that of
    --from, or lora"""
    to_rule: Rule | None = None
    """Scaling rule at the new rank; the default is the tuned rule"""
    optimizer: OptimizerName | str | None = None
    """Optimizer: sgd, momentum, adam, adamw, or the Trainer's name of a variant of AdamW such as adamw_bnb_8bit. For
    Lion and signSGD, adam describes the first step alone; other optimizers are not supported. The default is that of
    --from, or adamw"""
    init: PeftInit | None = None
    """Initialisation of lora_A: kaiming_uniform (PEFT's default) or gaussian (PEFT's, with standard deviation 1/r); the
    default is that of --from, or kaiming_uniform"""
    regime: str = "signal"
    """Part of the first step that dominates: signal, cross-talk, or the folder of a sims.regime run that measured it"""
    split: Split = "heldout"
    """Tokens of a measured regime: heldout (other text) or train (the batch of the gradient)"""
    per: AlphaGrouping = "type"
    """Modules of a measured regime that share an alpha: one for all, type for each type, or module for each module of
    each layer"""
    targets: tuple[str, ...] | None = None
    """Target modules of the LoraConfig: names separated by spaces, or all-linear; the default is that of --from, or the
    modules of a measured regime, or the paper's five"""
    task_type: TaskType | None = None
    """Task type of the LoraConfig; the default is that of --from, or CAUSAL_LM"""
    from_: Path | None = None
    """Folder of a saved adapter, its adapter_config.json, or the YAML of Axolotl or LLaMA-Factory. It provides
    --from-rank, --alpha, --rule, --init and --targets, and in YAML --lr and --optimizer, which must not be set to other
    values, and the other entries of the LoraConfig. In YAML it also provides --steps and --schedule for --to-steps and
    --to-schedule"""
    to_alpha: Positive | None = None
    """Alpha at the new rank, for which the learning rate then compensates. By default the product of scaling and rank
    stays (alpha, under alpha / r), and the learning rate follows the rank"""
    steps: Count | None = None
    """Number of optimizer steps for which --lr was tuned; only for Adam with PEFT's default initialisation"""
    to_steps: Count | None = None
    """Number of optimizer steps of the new run; the default is --steps"""
    schedule: Schedule | None = None
    """Learning-rate schedule with which --lr was tuned: constant, linear or cosine"""
    to_schedule: Schedule | None = None
    """Learning-rate schedule of the new run; the default is --schedule"""
    batch_size: Count | None = None
    """Number of records per optimizer step with which --lr was tuned"""
    to_batch_size: Count | None = None
    """Number of records per optimizer step of the new run; the default is --batch-size"""
    displacement_constant: NotNegative | None = None
    """Displacement constant K of your own runs; the default is the published one"""

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            object.__setattr__(self, "optimizer", parse_optimizer(self.optimizer))
        check_ranges(self)
        for option, rule in (("rule", self.rule), ("to_rule", self.to_rule)):
            if rule is not None:
                exponent(rule, option)
        if self.regime in REGIMES:
            check_unread(self, "split", "per", requires="regime")


DEFAULT = SavedSetting(8, 16.0, "lora", "kaiming_uniform", None, (), learning_rate=3e-4, optimizer="adamw")
"""Tuned setting where neither the options nor a saved adapter provide a value."""

COMPARISON_KEYS: dict[str, Callable[[Any], object]] = {"rule": exponent, "targets": frozenset}
"""Functions by which two values of an option are compared: rules by exponent, targets in any order."""


class Advised(NamedTuple):
    """Answer to a request.

    Attributes:
      advice: Advice for the request.
      peft: Arguments of `Advice.peft_config`: the target modules, and other entries of a saved adapter.
      thin: Limits of a measured regime as a sentence, or an empty string.
    """

    advice: Advice
    peft: dict[str, Any]
    thin: str


def read_tuned(config: TransferConfig) -> tuple[Setting, str | list[str] | None, SavedSetting]:
    """Determine the tuned setting and its targets.

    Each value comes from the options, the file or `DEFAULT`, in this order. Remarks about the file are logged as
    warnings.

    Returns:
      The tuned setting, its targets, and the content of the file.

    Raises:
      InputError: If the file has no LoRA setting, or if an option differs from the file.
    """
    saved = DEFAULT if config.from_ is None else read_trainer_config(config.from_)
    values: dict[str, Any] = dict(zip(("from_rank", "alpha", "rule", "init", "targets"), saved, strict=False))
    values |= {"lr": saved.learning_rate, "optimizer": saved.optimizer}
    # An option may repeat the value in the file but not contradict it.
    for name, saved_value in values.items():
        option, key = getattr(config, name), COMPARISON_KEYS.get(name, lambda value: value)
        if config.from_ is not None and None not in (option, saved_value) and key(option) != key(saved_value):
            raise InputError(
                f"{name} is {as_words(option)}, but {config.from_} has {as_words(saved_value)}. Remove one of the two."
            )
        values[name] = saved_value if option is None else option
    for remark in saved.remarks:
        logger.warning(remark)
    # An adapter's configuration has neither a learning rate nor an optimizer.
    if values["lr"] is None:
        logger.warning(
            f"{config.from_} has no learning rate: {DEFAULT.learning_rate:g} is used; pass the tuned one as lr"
        )
    values["lr"] = values["lr"] or DEFAULT.learning_rate
    values["optimizer"] = values["optimizer"] or DEFAULT.optimizer
    rank, alpha, rule, init, targets, learning_rate, optimizer = values.values()
    setting = Setting(rank, alpha, learning_rate, rule, optimizer, init)
    return setting, saved.expression if targets is None else peft_targets(targets), saved


def advise(config: TransferConfig) -> Advised:
    """Compute the advice that a configuration requests.

    Returns:
      The advice, the arguments of `Advice.peft_config`, and the limits of a measured regime.

    Raises:
      InputError: If `read_tuned`, `transfer`, `peft_targets` or `saved_run.read_regime_run` refuses a value.
    """
    tuned, requested, saved = read_tuned(config)
    regime: Any = config.regime
    # An adapter of parameters alone has no target modules.
    default_targets = [] if saved.other_entries.get("target_parameters") else list(PAPER_TARGETS)
    targets, thin = requested or default_targets, ""
    if config.regime not in REGIMES:
        # Imports pandas, which takes longer than the rest of the command: only if needed.
        from rora_theory.measure.regimes import saved_run as regime_run

        run = regime_run.read_regime_run(
            Path(config.regime), optimizer=tuned.optimizer, init=tuned.init, split=config.split
        )
        regime, targets, thin = run.terms_of(requested), requested or run.module_types, run.describe_gaps(requested)
    new: dict[str, Any] = {"rule": config.to_rule, "alpha": config.to_alpha}
    runs = {field.name: getattr(config, field.name) for field in fields(RunChange)}
    # A trainer's file states the run of the tuned setting, which matters only if the new run is another.
    for name, value in (("steps", saved.steps), ("schedule", saved.schedule)):
        if runs[name] is None and runs[f"to_{name}"] is not None:
            runs[name] = value
    # The effect of the number of steps depends on the schedule.
    if runs["schedule"] is None and runs["to_steps"] is not None and saved.schedule is not None:
        if saved.schedule in SCHEDULES:
            runs["schedule"] = saved.schedule
        else:
            logger.warning(f"{config.from_}: schedule {saved.schedule!r} was not measured: a constant rate is assumed")
    peft = {"target_modules": targets, "per": config.per, "task_type": config.task_type or saved.task_type}
    return Advised(
        transfer(tuned, config.to_rank, regime, **new, **runs), peft | {"other_entries": saved.other_entries}, thin
    )
