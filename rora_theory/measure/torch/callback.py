"""A callback for trainers of transformers and TRL: the run's regime, and the advice for another rank, in its log."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from rora_theory.advice.lora_config import OF_DORA, check_uniform, init_of
from rora_theory.advice.setting import Setting, check_setting
from rora_theory.errors import InputError, shown
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.torch.batches import Batch, Loss
from rora_theory.measure.torch.modules import lora_config
from rora_theory.measure.torch.regimes import TorchRegime, Transfer, regime
from rora_theory.optimizers import FAMILY, optimizer_named
from rora_theory.scaling import check_integer, check_rank

logger = logging.getLogger(__name__)


class RegimeCallback(TrainerCallback):
    """Measures before the first step, and before chosen others, and logs what it finds beside the loss.

        trainer = SFTTrainer(...)
        trainer.add_callback(RegimeCallback(trainer.log, batch, held_out, to_rank=128))

    Logged are ``regime/crossing_rank``, r* of the held-out tokens, the median over modules;
    ``regime/steps_until_A_leads``, t_A at the run's learning rate, under Adam; and ``regime/alpha`` and
    ``regime/learning_rate``, which keep the whole model's change at ``to_rank``: under Adam at the run's last step, by
    the law with the measured takeover distance and a constant rate, under SGD at the first. The advice in words goes to
    Python's ``logging``. A progress bar is shown where the trainer shows its own (``disable_tqdm``).

    The training goes on as without it. The model is measured as it is at that step, adapters and all; after the first
    the law is that of a fresh adapter put on it.

    Args:
      log: the trainer's own ``log``.
      batch, held_out: as `regime` takes them; the batch should be what the run learns from.
      to_rank: of the advice.
      setting: what was tuned; None is the run's own, of its ``LoraConfig`` and ``TrainingArguments``.
      steps: Numbers of updates after which to measure; 0 is before the first. A warning names those that the run does
        not reach.
      loss, layers: see `regime`.
      tokens: held-out tokens at which modules are read.

    Attributes:
      measured: what was found, by step.
      transfers: the advice, by step.

    Raises:
      InputError: a step or rank out of range, or what is no setting; when training begins, a run whose setting can't be
        told, or one whose weights are spread over processes (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        log: Any,
        batch: Batch,
        held_out: Batch,
        *,
        to_rank: int = 128,
        setting: Setting | None = None,
        steps: Sequence[int] = (0,),
        loss: Loss | None = None,
        layers: Sequence[int] | None = None,
        tokens: int = 64,
    ) -> None:
        check_rank(to_rank)
        if setting is not None:
            check_setting("setting", setting)
        for step in steps:
            check_integer("steps", step, least=0)
        self._log, self._batch, self._held_out, self._loss = log, batch, held_out, loss
        self._to_rank, self._setting, self._steps = to_rank, setting, frozenset(steps)
        self._layers, self._tokens = layers, tokens
        self.measured: dict[int, TorchRegime] = {}
        self.transfers: dict[int, Transfer] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Read the run's setting, so that a wrong one is refused before any work."""
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise InputError("the weights are spread over processes (FSDP or DeepSpeed); accepted are whole ones")
        if self._setting is None:
            self._setting = setting_of(kwargs["model"], args)
        beyond = self._missed(reached=state.max_steps - 1)
        if beyond and state.is_world_process_zero:
            logger.warning(f"steps {beyond} are beyond the last of a run of {state.max_steps} steps")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Warn of steps that a run did not reach, because it stopped early or began later."""
        missed = sorted(set(self._missed()) - set(self._missed(reached=state.max_steps - 1)))
        if missed and state.is_world_process_zero:
            logger.warning(f"nothing was measured at steps {missed}: training ended at step {state.global_step}")

    def _missed(self, reached: float = -1) -> list[int]:
        """Steps above ``reached`` at which nothing was measured."""
        return sorted(step for step in self._steps - set(self.measured) if step > reached)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Measure, where this is one of the steps."""
        step = state.global_step
        if self._setting is None or step not in self._steps - set(self.measured) or not state.is_world_process_zero:
            return
        own = self._setting
        family = FAMILY[own.optimizer]
        config = RegimeConfig(
            ranks=(own.rank,), rules=(own.rule,), optimizers=(family,), inits=(own.init,), rows=0, tokens=self._tokens
        )
        found = regime(
            kwargs["model"],
            self._batch,
            self._held_out,
            loss=self._loss,
            config=config,
            layers=self._layers,
            adapters="on",
            progress=not getattr(args, "disable_tqdm", True),
        )
        carried = found.transfer(own, self._to_rank, steps=state.max_steps if family == "adam" else None)
        self.measured[step], self.transfers[step] = found, carried
        held_out = found.crossings[found.crossings["split"] == "heldout"]
        figures = {"crossing_rank": float(held_out["crossing_rank"].median())}
        if family == "adam":
            figures["steps_until_A_leads"] = found.takeover_at(own.rank, own.init) / own.learning_rate
        figures |= {"alpha": carried.advice.alpha, "learning_rate": carried.learning_rate}
        self._log({f"regime/{name}": value for name, value in figures.items()})
        logger.info(carried.advice.sentence())


def setting_of(model: torch.nn.Module, args: Any) -> Setting:
    """The setting of a run: of its model's ``LoraConfig`` and its ``TrainingArguments``; of DoRA's a warning is logged.

    Raises:
      InputError: a model without LoRA, patterns (modules of several ranks or alphas), or an optimizer or init that has
        no law here.
    """
    config = lora_config(model)
    if config is None:
        raise InputError("the model has no LoRA of PEFT's; accepted is one that has, or a setting=")
    check_uniform(vars(config))
    if config.use_dora:
        logger.warning(OF_DORA)
    name = str(getattr(args.optim, "value", args.optim))
    try:
        optimizer = optimizer_named(name)
    except InputError:
        raise InputError(f"optim is {shown(name)}; accepted are kinds of adamw and sgd, or a setting=") from None
    rule: Any = "rslora" if config.use_rslora else "lora"
    return Setting(
        config.r, float(config.lora_alpha), args.learning_rate, rule, optimizer, init_of(config.init_lora_weights)
    )
