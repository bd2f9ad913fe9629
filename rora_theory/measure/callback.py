"""Callback for trainers of transformers and TRL that logs a run's regime and the advice for another rank."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from rora_theory.advice.adapter_config import check_uniform, init_of
from rora_theory.advice.lora_config import DORA_REMARK
from rora_theory.advice.setting import Setting
from rora_theory.errors import InputError, shown
from rora_theory.measure.batches import Batch, Loss
from rora_theory.measure.modules import lora_config
from rora_theory.measure.regimes.model import TorchRegime, Transferred, regime
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.optimizers import FAMILY, parse_optimizer
from rora_theory.scaling import check_instance, check_integer

logger = logging.getLogger(__name__)


class RegimeCallback(TrainerCallback):
    """Callback that measures the regime before chosen steps and logs it with the loss.

        trainer = SFTTrainer(...)
        trainer.add_callback(RegimeCallback(trainer.log, batch, held_out, to_rank=128))

    It logs these figures:

    - ``regime/crossing_rank``: median over modules of the crossing rank r*, at the held-out tokens.
    - ``regime/steps_until_A_dominates``: time t_A at which A crosses at the run's learning rate, under Adam.
    - ``regime/alpha`` and ``regime/learning_rate``: the setting at ``to_rank`` that preserves the whole model's change.
      See `rora_theory.transfer`.

    The advice as a sentence goes to Python's ``logging``. A progress bar is shown if the trainer shows its own
    (``disable_tqdm``).

    The callback does not affect training. It measures the model at the current step with its adapters active; after the
    first step the law describes a fresh adapter added to that model.

    Args:
      log: Method ``log`` of the trainer.
      batch: Batch that yields the gradient, see `regime`. It should resemble the training data.
      held_out: Batch of other records, see `regime`.
      to_rank: Rank for which to give advice.
      setting: Tuned setting; None reads it from the run's ``LoraConfig`` and ``TrainingArguments``.
      steps: Numbers of updates after which to measure; 0 is before the first. A warning names the steps that the run
        does not reach.
      loss: Loss function, see `regime`.
      layers: Indices of the layers to measure, see `regime`.
      tokens: Number of held-out tokens at which the inputs of modules are sampled.

    Attributes:
      measured: Measured regimes by step.
      transfers: Advice by step.

    Raises:
      InputError: If a step or rank is out of range or ``setting`` is not a `Setting`. When training begins: if the
        run's setting can't be read, or if its weights are sharded over processes (FSDP, DeepSpeed).
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
        check_integer("to_rank", to_rank)
        if setting is not None:
            check_instance("setting", setting, Setting, "a Setting")
        for step in steps:
            check_integer("steps", step, minimum=0)
        self._log, self._batch, self._held_out, self._loss = log, batch, held_out, loss
        self._to_rank, self._setting, self._steps = to_rank, setting, frozenset(steps)
        self._layers, self._tokens = layers, tokens
        self.measured: dict[int, TorchRegime] = {}
        self.transfers: dict[int, Transferred] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Read the run's setting, so that an unsupported one is refused before any work."""
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise InputError(
                "the weights are sharded over processes (FSDP or DeepSpeed), which RegimeCallback does not support. "
                "Measure the model in one process with rora_theory.measure.regime."
            )
        if self._setting is None:
            self._setting = read_setting(kwargs["model"], args)
        unreachable = self._missed(reached=state.max_steps - 1)
        if unreachable and state.is_world_process_zero:
            logger.warning(f"steps {unreachable} can't be measured: the run has only {state.max_steps} steps")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Warn of steps that the run skipped, because it stopped early or resumed after them."""
        missed = sorted(set(self._missed()) - set(self._missed(reached=state.max_steps - 1)))
        if missed and state.is_world_process_zero:
            logger.warning(f"nothing was measured at steps {missed}: training ended at step {state.global_step}")

    def _missed(self, reached: float = -1) -> list[int]:
        """Return the steps above ``reached`` at which nothing was measured."""
        return sorted(step for step in self._steps - set(self.measured) if step > reached)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Measure the model if this is one of the chosen steps."""
        step = state.global_step
        if self._setting is None or step not in self._steps - set(self.measured) or not state.is_world_process_zero:
            return
        # Measure only what the run's setting needs.
        setting = self._setting
        family = FAMILY[setting.optimizer]
        config = RegimeConfig(
            ranks=(setting.rank,),
            rules=(setting.rule,),
            optimizers=(family,),
            inits=(setting.init,),
            rows=0,
            tokens=self._tokens,
        )
        # Measure the model as it is at this step, with its adapters active.
        measured = regime(
            kwargs["model"],
            self._batch,
            self._held_out,
            loss=self._loss,
            config=config,
            layers=self._layers,
            adapters="on",
            progress=not getattr(args, "disable_tqdm", True),
        )
        transferred = measured.transfer(setting, self._to_rank)
        self.measured[step], self.transfers[step] = measured, transferred
        # Log the figures with the loss, and the advice as a sentence.
        held_out = measured.crossings[measured.crossings["split"] == "heldout"]
        figures = {"crossing_rank": float(held_out["crossing_rank"].median())}
        # The crossing distance divided by the learning rate is a number of steps.
        if family == "adam":
            crossing_distance = measured.crossing_distance_at(setting.rank, setting.init)
            figures["steps_until_A_dominates"] = crossing_distance / setting.learning_rate
        figures |= {"alpha": transferred.advice.alpha, "learning_rate": transferred.learning_rate}
        self._log({f"regime/{name}": value for name, value in figures.items()})
        logger.info(transferred.advice.sentence())


def read_setting(model: torch.nn.Module, args: Any) -> Setting:
    """Read the setting of a run from its model's ``LoraConfig`` and its ``TrainingArguments``.

    A warning is logged if the model uses DoRA.

    Args:
      model: PEFT model with LoRA.
      args: ``TrainingArguments`` of the run.

    Returns:
      The tuned setting of the run.

    Raises:
      InputError: If the model has no LoRA, has modules of several ranks or alphas, or if no law is known for its
        optimizer or initialisation.
    """
    config = lora_config(model)
    if config is None:
        raise InputError("the model has no LoRA adapter of PEFT. Add one with get_peft_model, or pass setting.")
    check_uniform(vars(config))
    if config.use_dora:
        logger.warning(DORA_REMARK)
    # An enumeration or a string, depending on the version of transformers.
    name = str(getattr(args.optim, "value", args.optim))
    try:
        optimizer = parse_optimizer(name)
    except InputError:
        raise InputError(
            f"optim must be a variant of adamw or sgd, got {shown(name)}. For another optimizer pass setting."
        ) from None
    rule: Any = "rslora" if config.use_rslora else "lora"
    return Setting(
        config.r, float(config.lora_alpha), args.learning_rate, rule, optimizer, init_of(config.init_lora_weights)
    )
