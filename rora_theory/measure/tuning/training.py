"""Training runs of a probe on a PyTorch model, which is left as it was."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from rora_theory.advice.lora_config import check_uniform, init_of
from rora_theory.errors import InputError, first_line, shown
from rora_theory.measure.adapters import with_peft
from rora_theory.measure.batches import (
    Batch,
    Loss,
    MasksByShape,
    find_masks,
    has_other_positions,
    move_batch,
    naming_failure,
    select_masks,
)
from rora_theory.measure.hooks import HALF_LOSS_SCALE, first_input
from rora_theory.measure.modules import (
    copied_modules,
    preserved_state,
    remove_adapters,
    trainable_parameters,
    with_autograd,
)
from rora_theory.measure.tokens import mark_sinks
from rora_theory.measure.tuning.examples import Group, count_targets
from rora_theory.measure.tuning.plan import scaled_warmup
from rora_theory.measure.tuning.trial import ProbeRun, Trial
from rora_theory.optimizers import Schedule, schedule_factor
from rora_theory.scaling import check_instance, scaling_factor

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]
"""Function of the adapter's parameters and the peak learning rate that returns an optimizer."""

ADAPTER = "probe"
"""Name of the adapter that a run trains."""

UNSUPPORTED_ENTRIES = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens"
)  # fmt: skip
"""Entries of a ``LoraConfig`` that train or copy other weights, or with which adapters act on some tokens only."""


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the runs of a probe.

    Attributes:
      config: PEFT's configuration of the probe's adapters.
      gain: gamma * r of the adapters.
      steps: Number of steps of the planned run.
      schedule: Shape of the learning rate.
      warmup: Number of warm-up steps of the planned run.
      accumulation: Number of batches per optimizer step.
      make_optimizer: Function that returns the optimizer.
      max_grad_norm: Maximum norm of the gradient; 0 disables clipping.
      seed: Seed of the adapters' initialisation and of dropout.
    """

    config: LoraConfig
    gain: float
    steps: int
    schedule: Schedule
    warmup: int
    accumulation: int
    make_optimizer: MakeOptimizer
    max_grad_norm: float
    seed: int


def check_no_adapters(model: torch.nn.Module) -> None:
    """Raise `InputError` if PEFT has changed a model: layers with adapters, a learned prompt, or a configuration.

    A learned prompt adds no layers to the base model, only a configuration to the model around it.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if configs or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            # Name the kinds of adapters if their configuration is known.
            kinds = [str(config.peft_type.value) for config in configs.values()] if isinstance(configs, dict) else []
            description = ", ".join(kinds) or type(module).__name__
            raise InputError(f"model must have no adapters of PEFT, got {description}. Pass the base model.")


def build_optimizer(
    make_optimizer: Callable[..., torch.optim.Optimizer], parameters: list[Any], *arguments: float
) -> torch.optim.Optimizer:
    """Return the optimizer that a function makes of trainable parameters and a learning rate, if it takes one.

    Raises:
      InputError: If the function returns something else.
    """
    optimizer = make_optimizer(parameters, *arguments)
    if not hasattr(optimizer, "param_groups"):
        raise InputError(f"make_optimizer must return an optimizer of PyTorch, got {shown(optimizer)}")
    return optimizer


def config_gain(config: LoraConfig) -> float:
    """Return gamma * r of a configuration.

    Raises:
      InputError: If the configuration is not LoRA's, trains more than adapters of one rank and alpha, or has an
        initialisation with B other than 0.
    """
    check_instance("config", config, LoraConfig, "a LoraConfig of PEFT")
    values = vars(config)
    check_uniform(values)
    # The law describes adapters that start at B = 0, with nothing else trained.
    for name in UNSUPPORTED_ENTRIES:
        if values.get(name):
            raise InputError(f"config.{name} must be empty for a probe, got {shown(values[name])}")
    if config.bias != "none":
        raise InputError(f"config.bias must be 'none' for a probe, got {config.bias!r}")
    init_of(config.init_lora_weights)
    return scaling_factor("rslora" if config.use_rslora else "lora", alpha=config.lora_alpha, rank=config.r) * config.r


def probe_config(config: LoraConfig, rank: int) -> LoraConfig:
    """Return a configuration of another rank with the same gamma * r."""
    new: Any = copy.deepcopy(config)
    new.lora_alpha, new.r, new.use_rslora = config_gain(config), rank, False
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
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: ProbeSettings,
        batches: Sequence[Batch],
        groups: Sequence[Group],
        loss: Loss,
    ) -> None:
        self._model, self._settings, self._loss = model, settings, loss
        self._batches, self._groups = batches, groups
        self._targets = [count_targets(model, batch) for batch in batches]
        self._masks = [find_masks(model, group.batch, batches[0]) for group in groups]

    def check_labels(self, steps: int) -> None:
        """Raise `InputError` unless the batches of each of the first steps have a label.

        The mean loss of a step without labels is 0 / 0, in a training run too.
        """
        for step in range(steps):
            indices = self._batch_indices(step)
            if not any(self._targets[i] for i in indices):
                numbers = ", ".join(str(i + 1) for i in indices)
                raise InputError(f"train must have a label in the batches of every step, got none in batch {numbers}")

    def describe(self) -> tuple[list[dict[str, str]], list[str]]:
        """Return the settings of the optimizer and the names of the modules that are trained beside the adapters.

        The settings are the class and the options of every group of parameters, at a learning rate of 1.

        Raises:
          InputError: If ``make_optimizer`` does not return an optimizer, or PEFT refuses the configuration.
        """
        with with_autograd(), _restored(self._model), _adapted(self._model, self._settings.config):
            parameters = trainable_parameters(self._model)
            optimizer = build_optimizer(self._settings.make_optimizer, parameters, 1.0)
            kind = {"class": type(optimizer).__qualname__}
            groups = [
                kind | {name: repr(value) for name, value in sorted(group.items()) if name != "params"}
                for group in optimizer.param_groups
            ]
            return groups, copied_modules(self._model)

    def train(
        self, trial: Trial, on_step: Callable[[], Any], on_stage: Callable[[str], Any] = lambda _: None
    ) -> ProbeRun:
        """Train a fresh adapter and evaluate it. The model is restored, also if an error is raised.

        Args:
          trial: Learning rate and number of steps.
          on_step: Function that is called after every optimizer step.
          on_stage: Function of a description of the work that begins.
        """
        with self.adapted() as layers:
            parts = LedParts(layers)
            on_stage(f"training {trial}")
            diverged_at = self._train_adapter(trial, on_step)
            if diverged_at is None:
                # The last update may diverge too, which only the evaluation shows.
                losses = self._evaluate(parts, on_stage)
                if not math.isfinite(math.fsum(losses)):
                    diverged_at = trial.steps
            if diverged_at is not None:
                return ProbeRun(trial.learning_rate, trial.steps, diverged_at=diverged_at)
            return ProbeRun(trial.learning_rate, trial.steps, tuple(losses), parts.ratios())

    @contextmanager
    def adapted(self) -> Iterator[list[LoraLayer]]:
        """Add a fresh adapter to the model, yield its layers, and restore the model.

        The same seed gives the same initial adapter and dropout masks every time.
        """
        with with_autograd(), _restored(self._model):
            torch.manual_seed(self._settings.seed)
            with _adapted(self._model, self._settings.config) as layers:
                yield layers

    def _batch_indices(self, step: int) -> list[int]:
        """Return the indices of the batches of a step, counted from 0; after the last batch the first follows."""
        first = step * self._settings.accumulation
        return [(first + i) % len(self._batches) for i in range(self._settings.accumulation)]

    def _train_adapter(self, trial: Trial, on_step: Callable[[], Any]) -> int | None:
        """Train the adapter and return the step at which a loss or gradient was not finite, or None."""
        settings = self._settings
        # The warm-up keeps its share of the steps.
        warmup = scaled_warmup(settings.warmup, settings.steps, trial.steps)
        parameters = trainable_parameters(self._model)
        # Each group of parameters keeps its own peak, as an optimizer may have several.
        optimizer = build_optimizer(settings.make_optimizer, parameters, trial.learning_rate)
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step in range(trial.steps):
            # Learning rate of this step.
            factor = float(schedule_factor(settings.schedule, step, steps=trial.steps, warmup=warmup))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            # Gradient of the mean loss over the labels of all batches of the step.
            optimizer.zero_grad()
            labelled = [i for i in self._batch_indices(step) if self._targets[i]]
            targets = sum(self._targets[i] for i in labelled)
            total = 0.0
            for i in labelled:
                loss = self._loss(self._model, move_batch(self._batches[i], self._model)).float()
                loss = loss * (self._targets[i] / targets)
                with naming_failure("the backward pass"):
                    (loss * HALF_LOSS_SCALE).backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                self._check_first_step(step, f"loss {total}")
                return step + 1
            # Gradients of the loss itself. A power of 2 changes no digit of those in float32 or bfloat16.
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= HALF_LOSS_SCALE
            # Clip as transformers' Trainer does, then update.
            if settings.max_grad_norm:
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                if not math.isfinite(float(norm)):
                    self._check_first_step(step, f"gradient norm {float(norm)}")
                    return step + 1
            optimizer.step()
            on_step()
        return None

    def _check_first_step(self, step: int, value: str) -> None:
        """Raise `InputError` for a divergence in the first step, which does not depend on the learning rate."""
        if not step:
            numbers = ", ".join(str(i + 1) for i in self._batch_indices(step))
            raise InputError(
                f"train must have a finite loss and gradient before the first update, got {value} in batch {numbers}. "
                "Check the model and the batch."
            )

    def _evaluate(self, parts: "LedParts", on_stage: Callable[[str], Any]) -> list[float]:
        """Return the loss of each group of held-out rows, summed over its labels, and measure the parts."""
        losses = []
        self._model.eval()
        with torch.no_grad():
            for number, (group, masks) in enumerate(zip(self._groups, self._masks, strict=True), 1):
                on_stage(f"held-out rows, part {number} of {len(self._groups)}")
                with parts.reading(masks):
                    losses.append(float(self._loss(self._model, move_batch(group.batch, self._model))) * group.targets)
        return losses


class LedParts:
    r"""Squares of the B part and the A part of every adapted module at held-out tokens.

    With :math:`A_0` for A before training they are those of :math:`B A_0 x` and :math:`B (A - A_0) x`. Padding,
    tokens that repeat the beginning of a training record, and attention sinks are left out.

    Args:
      layers: PEFT's layers with a fresh adapter. Convolutions are left out.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self._layers = [layer for layer in layers if layer.lora_A[ADAPTER].weight.ndim == 2]
        self._starts = [layer.lora_A[ADAPTER].weight.detach().clone() for layer in self._layers]
        self._squares = [(0.0, 0.0)] * len(self._layers)

    @contextmanager
    def reading(self, masks: MasksByShape) -> Iterator[None]:
        """Add the squares at the tokens of the forward passes within the context."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                # The layer's own input: DoRA runs A on the identity matrix too.
                hook = layer.register_forward_pre_hook(partial(self._add, index, masks), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def ratios(self) -> tuple[float, ...]:
        """Return the ratio of the A part to the B part of every module with a change."""
        ratios = [math.sqrt(A_part / B_part) for B_part, A_part in self._squares if B_part > 0 and A_part >= 0]
        return tuple(ratio for ratio in ratios if math.isfinite(ratio))

    def _add(self, index: int, masks: MasksByShape, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs).detach()
        if has_other_positions(masks, x):
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        # Leave out padding, seen tokens and attention sinks.
        mask = select_masks(masks, x)
        if mask is not None:
            rows = rows[torch.from_numpy(mask.real & ~mask.seen).to(rows.device)]
        if not len(rows):
            return
        rows = rows[~torch.from_numpy(mark_sinks(rows.norm(dim=1).cpu().numpy())).to(rows.device)]
        layer, start_A = self._layers[index], self._starts[index].float()
        A, B = (factors[ADAPTER].weight.detach().float() for factors in (layer.lora_A, layer.lora_B))
        # |B u|^2 = u^T B^T B u for u = A_0 x and u = (A - A_0) x: avoids forming B u.
        gram = B.T @ B
        squares = []
        for part in (start_A, A - start_A):
            u = rows @ part.T
            squares.append(max(float((u @ gram * u).sum()), 0.0))  # rounding may make a sum of squares negative
        B_part, A_part = self._squares[index]
        self._squares[index] = B_part + squares[0], A_part + squares[1]


@contextmanager
def _adapted(model: torch.nn.Module, config: LoraConfig) -> Iterator[list[LoraLayer]]:
    """Add an adapter to a model, yield its layers, and remove it.

    Raises:
      InputError: If PEFT refuses the configuration for this model.
    """
    try:
        # PEFT writes to the configuration that it receives, so it receives a copy.
        wrapped = with_peft(model, copy.deepcopy(config), adapter_name=ADAPTER)
    except (ValueError, AttributeError) as error:
        raise InputError(f"config does not suit the model: {first_line(error)}") from error
    try:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A]
        if not layers:
            raise InputError("config must adapt a linear module, got target_modules without one")
        model.train()
        yield layers
    finally:
        remove_adapters(wrapped)


@contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    """Restore the state of a model on exit: modes, ``requires_grad``, hooks, buffers and random generators."""
    modes = [(module, module.training) for module in model.modules()]
    requirements = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # PEFT registers hooks for gradient checkpointing; transformers stores theirs in attributes.
    hooks = [(module, set(module._forward_hooks)) for module in model.modules()]
    # If PEFT refuses a configuration, layers that it has replaced already stay in the model.
    children = [(module, dict(module._modules)) for module in model.modules()]
    attributes = dict(vars(model))
    try:
        with ExitStack() as stack:
            # Buffers of modules in training mode are the ones that a forward pass may change.
            model.train()
            stack.enter_context(preserved_state(model))
            yield
    finally:
        # Remove what was added, and restore what was changed.
        for module, before_children in children:
            module._modules.update(before_children)
        for module, before in hooks:
            for key in set(module._forward_hooks) - before:
                del module._forward_hooks[key]
        vars(model).clear()
        vars(model).update(attributes)
        for parameter, requires_grad in requirements:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
