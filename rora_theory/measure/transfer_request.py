"""A transfer as it is asked for: a setting in figures or from a saved adapter, in a regime that is assumed or measured.

asked = TransferConfig(from_=Path("adapter"), lr=2e-4, to_rank=128, regime="results/regime/RUN")
advice, peft, _ = advise(asked)
print(advice.peft_config(**peft))
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.advice.lora_config import PAPER_TARGETS, PeftInit, Saved, TaskType, peft_targets, read_adapter_config
from rora_theory.advice.setting import REGIMES, Setting
from rora_theory.advice.transfer import MOST_STEPS, Advice, Per, transfer
from rora_theory.errors import InputError
from rora_theory.measure.layers.layer_data import Split
from rora_theory.optimizers import OptimizerName, optimizer_named
from rora_theory.scaling import Rule, check_integer, exponent
from rora_theory.validation.ranges import Count, Positive, check_ranges
from rora_theory.validation.rules import as_words, check_rule, check_unread, option_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferConfig:
    """What was tuned, and where it is to go.

    Raises:
      InputError: a value out of range.
    """

    from_rank: Count | None = None
    """the rank that was tuned; none is 8, or what --from has"""
    to_rank: Count = 128
    """the new rank"""
    alpha: float | None = None
    """alpha at the old rank; none is 16, or what --from has"""
    lr: Positive = 3e-4
    """learning rate at the old rank"""
    rule: Rule | None = None
    """lora (alpha / r), rora or rslora (alpha / sqrt(r)), or an exponent kappa; none is lora, or what --from has"""
    to_rule: Rule | None = None
    """rule at the new rank; left out, it stays as it is"""
    optimizer: OptimizerName | str = "adamw"
    """sgd, momentum, adam or adamw, or a Trainer's name of AdamW such as adamw_bnb_8bit; Lion and signSGD take Adam's
    first step, and others are not covered"""
    init: PeftInit | None = None
    """law of lora_A: kaiming_uniform (PEFT's default) or gaussian (PEFT's, of deviation 1/r); none is kaiming_uniform,
    or what --from has"""
    regime: str = "signal"
    """signal, cross-talk, or the folder of a sims.regime run"""
    split: Split = "heldout"
    """tokens of a measured regime: other text (heldout) or the batch that gave the gradient (train)"""
    per: Per = "type"
    """which modules of a measured regime share an alpha: one for all, one a type, or one for each layer's module"""
    targets: tuple[str, ...] | None = None
    """target_modules of the LoraConfig: names separated by spaces, or all-linear; none is a measured regime's own, and
    the paper's five where the regime is assumed"""
    task_type: TaskType | None = None
    """task_type of the LoraConfig; none is CAUSAL_LM, or what --from has"""
    from_: Path | None = None
    """a saved adapter's folder or its adapter_config.json: gives --from-rank, --alpha, --rule, --init and --targets,
    none of which may then be another, and the LoraConfig's other entries"""
    to_alpha: Positive | None = None
    """alpha at the new rank; the learning rate then makes up for it. Left out, alpha makes up and the rate stays"""
    steps: int | None = None
    """steps of the planned run, at a constant rate (Adam, regime signal); with --takeover or --p-in"""
    takeover: float | None = None
    """distance of A at which its part in the change is as large as B's; 1e-3 to 9e-3 in most modules of SmolLM2-135M"""
    p_in: int | None = None
    """inputs of the modules, in place of --takeover: it is then assumed, as for one sample"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", optimizer_named(self.optimizer))
        check_ranges(self)
        if self.steps is not None:
            check_integer("--steps", self.steps, most=MOST_STEPS)
        for option, rule in (("--rule", self.rule), ("--to-rule", self.to_rule)):
            if rule is not None:
                check_rule(option, rule)
        if self.regime in REGIMES:
            check_unread(self, "split", "per", without="--regime RUN")


DEFAULT = Saved(8, 16.0, "lora", "kaiming_uniform", None, ())
"""What was tuned where neither the caller nor a saved adapter says."""

SAME: dict[str, Callable[[Any], object]] = {"rule": exponent, "targets": frozenset}
"""What two values of an option are the same by: a rule under whatever name, targets in whatever order."""


class Advised(NamedTuple):
    """What was asked for.

    Attributes:
      advice: the transfer.
      peft: arguments of `Advice.peft_config`: the modules, and what a saved adapter has besides.
      thin: what a measured regime leaves open, or nothing.
    """

    advice: Advice
    peft: dict[str, Any]
    thin: str


def read_old(config: TransferConfig) -> tuple[Setting, str | list[str] | None, Saved]:
    """The setting that was tuned and its targets: as given, else as the saved adapter has it, else as in `DEFAULT`; and
    that adapter, whose remarks are warnings of `logging`.

    Raises:
      InputError: a file that is no LoRA's, or a value that was given where the file has another.
    """
    saved = DEFAULT if config.from_ is None else read_adapter_config(config.from_)
    found: dict[str, Any] = dict(zip(("from_rank", "alpha", "rule", "init", "targets"), saved, strict=False))
    for name, value in found.items():
        given, same = getattr(config, name), SAME.get(name, lambda value: value)
        if config.from_ is not None and None not in (given, value) and same(given) != same(value):
            told = f"{option_of(name)} is {as_words(given)}, and {config.from_} has {as_words(value)}"
            raise InputError(f"{told}; accepted is one of the two")
        found[name] = value if given is None else given
    for remark in saved.remarks:
        logger.warning(remark)
    rank, alpha, rule, init, targets = found.values()
    setting = Setting(rank, alpha, config.lr, rule, config.optimizer, init)  # type: ignore[arg-type]
    return setting, saved.expression if targets is None else peft_targets(targets), saved


def advise(config: TransferConfig) -> Advised:
    """The transfer that is asked for.

    Raises:
      InputError: as `read_old`, `transfer`, `peft_targets` and `regime_run.read_regime_run`.
    """
    old, asked, saved = read_old(config)
    regime: Any = config.regime
    targets, thin = asked or list(PAPER_TARGETS), ""
    if config.regime not in REGIMES:
        from rora_theory.measure.regimes import saved_run as regime_run

        run = regime_run.read_regime_run(
            Path(config.regime), optimizer=old.optimizer, init=old.init, split=config.split
        )
        regime, targets, thin = run.terms_of(asked), asked or run.kinds, run.gaps(asked)
    to: dict[str, Any] = {"rule": config.to_rule, "alpha": config.to_alpha}
    planned: dict[str, Any] = {"steps": config.steps, "takeover": config.takeover, "p_in": config.p_in}
    peft = {"target_modules": targets, "per": config.per, "task_type": config.task_type or saved.task_type}
    return Advised(transfer(old, config.to_rank, regime, **to, **planned), peft | {"others": saved.others}, thin)
