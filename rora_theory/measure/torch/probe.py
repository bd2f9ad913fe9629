"""Training runs of a probe on a PyTorch model, which is left as it was."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from rora_theory.advice.lora_config import check_uniform, init_of
from rora_theory.errors import InputError, first_line, shown
from rora_theory.measure.torch.batches import Batch, Loss, move_batch
from rora_theory.measure.torch.examples import Group, count_targets
from rora_theory.measure.torch.modules import preserved_state, with_autograd
from rora_theory.scaling import scaling_factor
from rora_theory.tune.plan import ProbeRun, Schedule, Trial, scaled_warmup, schedule_factor

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]
"""Function of the adapter's parameters and the peak learning rate that returns an optimizer."""

ADAPTER = "probe"
"""Name of the adapter that a run trains."""

TRAINS_OTHERS = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
"""Entries of a ``LoraConfig`` with which weights outside the adapters' matrices are trained or copied."""


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the runs of a probe.

    Attributes:
      config: PEFT's configuration of the probe's adapters.
      strength: gamma * r of the adapters.
      steps: Number of steps of the planned run.
      schedule: Shape of the learning rate.
      warmup: Number of warm-up steps of the planned run.
      accumulation: Number of batches per optimizer step.
      make_optimizer: Function that returns the optimizer.
      max_grad_norm: Maximum norm of the gradient; 0 disables clipping.
      seed: Seed of the adapters' initialisation and of dropout.
    """

    config: LoraConfig
    strength: float
    steps: int
    schedule: Schedule
    warmup: int
    accumulation: int
    make_optimizer: MakeOptimizer
    max_grad_norm: float
    seed: int


def strength_of(config: LoraConfig) -> float:
    """Return gamma * r of a configuration.

    Raises:
      InputError: If the configuration is not LoRA's, trains more than adapters of one rank and alpha, or has an
        initialisation with B other than 0.
    """
    if not isinstance(config, LoraConfig):
        raise InputError(f"config must be a LoraConfig of PEFT, got {type(config).__name__}")
    values = vars(config)
    check_uniform(values)
    for name in TRAINS_OTHERS:
        if values.get(name):
            raise InputError(f"config.{name} must be empty for a probe, got {shown(values[name])}")
    if config.bias != "none":
        raise InputError(f"config.bias must be 'none' for a probe, got {config.bias!r}")
    init_of(config.init_lora_weights)
    return scaling_factor("rslora" if config.use_rslora else "lora", alpha=config.lora_alpha, rank=config.r) * config.r


def probe_config(config: LoraConfig, rank: int) -> LoraConfig:
    """Return a configuration of another rank with the same gamma * r."""
    new: Any = copy.deepcopy(config)
    new.lora_alpha, new.r, new.use_rslora = strength_of(config), rank, False
    new.inference_mode = False
    return new


class ProbeModel:
    """Model on which the runs of a probe are trained one after another.

    Args:
      model: Base model without adapters.
      settings: Settings of all runs.
      batches: Training batches in the order in which every run uses them; repeated if there are too few.
      groups: Held-out rows.
      loss: Function of the model and a batch that returns the mean loss over its labels.
      on_step: Function that is called after every optimizer step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: ProbeSettings,
        batches: Sequence[Batch],
        groups: Sequence[Group],
        loss: Loss,
        on_step: Callable[[], Any] = lambda: None,
    ) -> None:
        self._model, self._settings, self._loss, self._on_step = model, settings, loss, on_step
        self._batches, self._groups = batches, groups

    def train(self, trial: Trial) -> ProbeRun:
        """Train a fresh adapter and evaluate it. The model is restored, also if an error is raised."""
        settings = self._settings
        with with_autograd(), _restored(self._model):
            # The same seed for every run: the same initial adapters and dropout masks.
            torch.manual_seed(settings.seed)
            with _adapted(self._model, settings.config) as layers:
                starts = [layer.lora_A[ADAPTER].weight.detach().clone() for layer in layers]
                diverged_at = self._train_adapter(trial)
                if diverged_at is None:
                    losses = self._evaluate()
                    if not math.isfinite(math.fsum(losses)):
                        diverged_at = trial.steps
                if diverged_at is not None:
                    return ProbeRun(trial.learning_rate, trial.steps, diverged_at=diverged_at)
                ratios = [
                    led_ratio(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, start)
                    for layer, start in zip(layers, starts, strict=True)
                ]
        return ProbeRun(
            trial.learning_rate,
            trial.steps,
            tuple(losses),
            tuple(ratio for ratio in ratios if math.isfinite(ratio)),
        )

    def _train_adapter(self, trial: Trial) -> int | None:
        """Train the adapter and return the step at which a loss or gradient was not finite, or None."""
        settings = self._settings
        warmup = scaled_warmup(settings.warmup, settings.steps, trial.steps)
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = settings.make_optimizer(parameters, trial.learning_rate)
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step in range(trial.steps):
            # Learning rate of this step.
            factor = schedule_factor(settings.schedule, step, steps=trial.steps, warmup=warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            # Gradient of the mean loss over the labels of all batches of the step.
            optimizer.zero_grad()
            first = step * settings.accumulation
            batches = [self._batches[(first + i) % len(self._batches)] for i in range(settings.accumulation)]
            targets = [count_targets(self._model, batch) for batch in batches]
            total = 0.0
            for batch, count in zip(batches, targets, strict=True):
                loss = self._loss(self._model, move_batch(batch, self._model)) * (count / max(sum(targets), 1))
                loss.backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                return step + 1
            # Clip as transformers' Trainer does, then update.
            if settings.max_grad_norm:
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                if not math.isfinite(float(norm)):
                    return step + 1
            optimizer.step()
            self._on_step()
        return None

    def _evaluate(self) -> list[float]:
        """Return the loss of each group of held-out rows, summed over its labels."""
        self._model.eval()
        with torch.no_grad():
            return [
                float(self._loss(self._model, move_batch(group.batch, self._model))) * group.targets
                for group in self._groups
            ]


def led_ratio(lora_A: torch.Tensor, lora_B: torch.Tensor, start: torch.Tensor) -> float:
    r"""Compute the ratio of the A-led to the B-led change of a module, for inputs without a preferred direction.

    It is :math:`\|B (A - A_0)\|_F / \|B A_0\|_F`.

    Args:
      lora_A: A after training.
      lora_B: B after training.
      start: A before training.

    Returns:
      The ratio; NaN if the B-led change is 0.
    """
    A, B, A_0 = (tensor.detach().double().cpu() for tensor in (lora_A, lora_B, start))
    # |B C|^2 = tr(B'B CC'): avoids forming the product.
    gram = B.T @ B
    led_A, led_B = (float((gram * (C @ C.T)).sum()) for C in (A - A_0, A_0))
    return math.sqrt(max(led_A, 0.0) / led_B) if led_B > 0 else math.nan


@contextmanager
def _adapted(model: torch.nn.Module, config: LoraConfig) -> Iterator[list[LoraLayer]]:
    """Add an adapter to a model, yield its layers, and remove it.

    Raises:
      InputError: If PEFT refuses the configuration for this model.
    """
    try:
        wrapped = get_peft_model(model, copy.deepcopy(config), adapter_name=ADAPTER)
    except ValueError as error:
        raise InputError(f"config does not suit the model: {first_line(error)}") from error
    try:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A]
        if not layers:
            raise InputError("config must adapt a linear module, got target_modules without one")
        model.train()
        yield layers
    finally:
        wrapped.unload()


@contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    """Restore the state of a model on exit: modes, ``requires_grad``, hooks, buffers and random generators.

    Raises:
      InputError: If the model has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model must have no adapters, got a model with layers of PEFT. Pass the base model.")
    modes = [(module, module.training) for module in model.modules()]
    requirements = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # PEFT registers hooks for gradient checkpointing; transformers stores theirs in attributes.
    hooks = [(module, set(module._forward_hooks)) for module in model.modules()]
    attributes = dict(vars(model))
    try:
        with ExitStack() as stack:
            # Buffers of modules in training mode are the ones that a forward pass may change.
            model.train()
            stack.enter_context(preserved_state(model))
            yield
    finally:
        for module, before in hooks:
            for key in set(module._forward_hooks) - before:
                del module._forward_hooks[key]
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
        for parameter, requires_grad in requirements:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
