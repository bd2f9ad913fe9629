"""A transfer as it is asked for: a setting in figures or from a saved adapter, in a regime that is assumed or measured.

asked = with_saved(TransferConfig(from_=Path("adapter"), lr=2e-4, to_rank=128, regime="results/regime/RUN"))
advice, targets, thin = advise(asked)
print(advice.peft_config(target_modules=targets))
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rora_theory.advice.lora_config import PAPER_TARGETS, TaskType, peft_targets, read_adapter_config
from rora_theory.advice.setting import REGIMES, Setting
from rora_theory.advice.transfer import Advice, transfer
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.optimizers import OptimizerName
from rora_theory.rules import check_integers, check_positives, check_rule
from rora_theory.scaling import Rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferConfig:
    """What was tuned, and where it is to go. Raises `InputError` where a value is out of range."""

    from_rank: int = 8
    """the rank that was tuned"""
    to_rank: int = 128
    """the new rank"""
    alpha: float = 16.0
    """alpha at the old rank"""
    lr: float = 3e-4
    """learning rate at the old rank"""
    rule: Rule = "lora"
    """lora (alpha / r), rora or rslora (alpha / sqrt(r)), or an exponent kappa"""
    to_rule: Rule | None = None
    """rule at the new rank; left out, it stays as it is"""
    optimizer: OptimizerName = "adamw"
    """sgd, momentum, adam or adamw; others have no law here (Lion and signSGD take Adam's first step)"""
    init: Init = "kaiming_uniform"
    """law of lora_A: kaiming_uniform (PEFT's default) or gaussian (PEFT's, of deviation 1/r); normal and rademacher
    have a law, but no LoraConfig"""
    regime: str = "signal"
    """signal, cross-talk, or the folder of a sims.regime run"""
    split: Literal["train", "heldout"] = "heldout"
    """tokens of a measured regime: other text (heldout) or the batch that gave the gradient (train)"""
    per: Literal["one", "type", "module"] = "type"
    """which modules of a measured regime share an alpha: one for all, one a type, or one for each layer's module"""
    targets: tuple[str, ...] | None = None
    """target_modules of the LoraConfig: names separated by spaces, or all-linear; none is a measured regime's own, and
    the paper's five where the regime is assumed"""
    task_type: TaskType = "CAUSAL_LM"
    """task_type of the LoraConfig"""
    from_: Path | None = None
    """a saved adapter's folder or its adapter_config.json: gives --from-rank, --alpha, --rule, --init and --targets"""
    to_alpha: float | None = None
    """alpha at the new rank; the learning rate then makes up for it. Left out, alpha makes up and the rate stays"""
    steps: int | None = None
    """steps of the planned run, at a constant rate (Adam, regime signal)"""
    takeover: float | None = None
    """distance of A at which its part in the change is as large as B's; 1e-3 to 9e-3 in most modules of SmolLM2-135M"""
    p_in: int | None = None
    """inputs of the modules, in place of --takeover: it is then assumed, as for one sample"""

    def __post_init__(self) -> None:
        check_integers(self, from_rank=1, to_rank=1)
        check_positives(self, "lr", "to_alpha")
        for option, rule in (("--rule", self.rule), ("--to-rule", self.to_rule)):
            if rule is not None:
                check_rule(option, rule)


Asked = TypeVar("Asked", bound=TransferConfig)


def with_saved(config: Asked) -> Asked:
    """The same with what a saved adapter says in the place of the defaults; its remarks are warnings of `logging`.

    Raises:
      InputError: a file that is no LoRA's, or a value that was given where the file has another.
    """
    if config.from_ is None:
        return config
    saved = read_adapter_config(config.from_)
    found: dict[str, Any] = {"from_rank": saved.rank, "alpha": saved.alpha, "rule": saved.rule, "init": saved.init}
    for name, value in found.items():
        given = getattr(config, name)
        if given not in (getattr(TransferConfig, name), value):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {given!r}, and {config.from_} has {value!r}; accepted is one of the two")
    for remark in saved.remarks:
        logger.warning(remark)
    return replace(config, **found, targets=config.targets or saved.targets)


def advise(config: TransferConfig) -> tuple[Advice, str | list[str], str]:
    """The transfer that is asked for, PEFT's ``target_modules``, and what a measured regime leaves open or nothing.

    Raises:
      InputError: as `transfer`, `peft_targets` and `regime_run.read_regime_run`.
    """
    old = Setting(config.from_rank, config.alpha, config.lr, config.rule, config.optimizer, config.init)
    asked = None if config.targets is None else peft_targets(config.targets)
    regime: Any = config.regime
    targets, thin = asked or list(PAPER_TARGETS), ""
    if config.regime not in REGIMES:
        from rora_theory.measure import regime_run  # and with it pandas, which takes as long as all the rest

        run = regime_run.read_regime_run(
            Path(config.regime), optimizer=old.optimizer, init=old.init, split=config.split
        )
        regime, targets, thin = run.terms_of(asked), asked or run.kinds, run.gaps(asked)
    to: dict[str, Any] = {"rule": config.to_rule, "alpha": config.to_alpha}
    planned: dict[str, Any] = {"steps": config.steps, "takeover": config.takeover, "p_in": config.p_in}
    return transfer(old, config.to_rank, regime, **to, **planned), targets, thin
