"""Rank coordinate check of a PEFT model: test whether its first steps depend on the rank.

The steps use the user's own optimizer:

    def make_model(rank):
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules="all-linear"))

    check = coordinate_check(make_model, batch, ranks=(2, 8, 32), held_out=held_out)
    print(check.sentence())
    check.assert_flat()

The draws of A are nested: the A of a smaller rank consists of the first rows of the A of a larger rank, so that the
noise of different ranks is shared. `rora_theory.measure.rank_check.rules` has the settings and verdicts of the check of
scaling rules, which the command ``coordinate_check`` runs.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import pandas as pd
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper

from rora_theory import inits, plots
from rora_theory.advice.adapter_config import init_of
from rora_theory.errors import InputError, shown
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure import hooks
from rora_theory.measure.batches import (
    Batch,
    Loss,
    check_batch,
    describe_positions,
    find_masks,
    has_other_positions,
    loss_function,
    move_batch,
    naming_failure,
    select_masks,
)
from rora_theory.measure.modules import (
    base_model,
    check_weights,
    preserved_state,
    remove_adapters,
    trainable_parameters,
    unwrap,
    with_autograd,
)
from rora_theory.measure.progress import progress_bar
from rora_theory.measure.rank_check.coordinate_table import (
    MODEL,
    BatchSplit,
    Coordinate,
    judge_model,
    rows_of_model,
    slope_rows,
    values_by_coordinate,
)
from rora_theory.measure.regimes import thin
from rora_theory.optimizers import MOMENTUM, WEIGHT_DECAY, OptimizerName
from rora_theory.scaling import check_instance, check_integer, check_positive
from rora_theory.stats.slopes import BAND
from rora_theory.validation.rules import check_list, check_steps, listed

if TYPE_CHECKING:
    import matplotlib.figure

logger = logging.getLogger(__name__)

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter], int], torch.optim.Optimizer]
"""Function of the trainable parameters and the rank that returns an optimizer."""

CONCLUSIONS = {
    "flat": ("do not depend on the rank", "Use the advice as it stands."),
    "grows with the rank": ("grow with the rank", "Lower alpha or the learning rate at higher ranks."),
    "shrinks with the rank": ("shrink with the rank", "Raise alpha or the learning rate at higher ranks."),
    "undecided": ("may or may not depend on the rank", "Repeat the check with more seeds."),
    "nothing moved": ("do not change its outputs", "Use float32 or a higher learning rate."),
}
"""Conclusion from each verdict about a setting that is used at several ranks, and what to do."""

MIXED = ("behave differently by step or split", "Compare the steps and splits in `slopes`.")
"""Conclusion from a verdict that names steps or splits, and what to do."""


def make_optimizer_of(name: OptimizerName, learning_rate: float) -> MakeOptimizer:
    """Return a function that creates PyTorch's optimizer with the settings of `optimizers.make_optimizer`."""
    if name == "adamw":
        return lambda parameters, _: torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    if name == "adam":
        return lambda parameters, _: torch.optim.Adam(parameters, lr=learning_rate)
    momentum = MOMENTUM if name == "momentum" else 0.0
    return lambda parameters, _: torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum)


@dataclass(frozen=True, eq=False)
class TorchCheck:
    """Result of `coordinate_check`.

    Attributes:
      sizes: Sizes as a tidy frame with a row for each rank, seed and coordinate. ``hidden`` and ``logits`` are the root
        mean square of the change of the final hidden states (the output head's inputs) and of the logits. ``output`` is
        the root mean square of gamma B A x of each kind of module. ``loss`` is the loss.
      slopes: Frame with a row for each coordinate: log-log slope against the rank, its error and verdict.
      verdict: Verdict on the whole model, its hidden states and logits: ``"flat"``, ``"grows with the rank"``, ...
      scope: Sentence with the model, ranks, steps and draws that the verdict rests on.
      band: Largest absolute slope that counts as flat.
    """

    sizes: pd.DataFrame
    slopes: pd.DataFrame
    verdict: str
    scope: str
    band: float

    def sentence(self) -> str:
        """Return the verdict on the whole model and what to do. `scope` states the model, optimizer and batches."""
        conclusion, action = CONCLUSIONS.get(self.verdict, MIXED)
        ranks, steps, seeds = (self.sizes[name] for name in ("rank", "step", "seed"))
        return (
            f"The first steps of the whole model {conclusion} (verdict: {self.verdict}; ranks {ranks.min()} to "
            f"{ranks.max()}, steps up to {steps.max()}, {seeds.nunique()} draws). {action}"
        )

    def plot(self) -> "matplotlib.figure.Figure":
        """Plot the change of the model's outputs against the rank, and its slopes against the step.

        See `rora_theory.plots.plot_check`. Save the figure with ``check.plot().savefig("check.png")``.
        """
        return plots.plot_check(self.sizes, self.slopes, self.band)

    def assert_flat(self) -> None:
        """Assert that the changes of hidden states and logits do not depend on the rank, for use in test suites.

        Raises:
          AssertionError: If a slope at any of the steps and splits is outside the band, or if the seeds leave it
            undecided. The message states each such slope.
        """
        if self.verdict != "flat":
            slopes = [
                f"{row['quantity']} of the model on {row['split']} at step {row['step']} is not flat but "
                f"{row['verdict']}: slope {row.get('slope', nan):+.3f} ± {row.get('half_width', nan):.3f}"
                for row in rows_of_model(self.slopes.to_dict("records"))
                if row["verdict"] != "flat"
            ]
            raise AssertionError("\n".join([self.sentence(), *slopes]))


def coordinate_check(
    make_model: Callable[[int], torch.nn.Module],
    batch: Batch | Sequence[Batch],
    ranks: Sequence[int] = (2, 8, 32, 128),
    *,
    held_out: Batch | None = None,
    learning_rate: float = 1e-4,
    make_optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    steps: Sequence[int] = (1, 2, 5, 10),
    seeds: int = 3,
    band: float = BAND,
    seed: int = 0,
    progress: bool = False,
) -> TorchCheck:
    """Train adapters of several ranks for a few steps and compare how much the model's outputs change.

    Outputs are measured in evaluation mode; steps run in the mode of the model. Use float32: in bfloat16 the changes
    of the first steps may be too small to measure.

    With R ranks and S seeds, the check takes R S ``max(steps)`` training steps. After each of ``steps`` it also takes a
    forward pass of the step's batch and one of ``held_out``. The base model's outputs, from which the changes are
    measured, take a forward pass of each of these batches; they are computed once if ``make_model`` uses one and the
    same base model, and R S times otherwise.

    Args:
      make_model: Function of a rank that returns a PEFT model with a fresh LoRA or rsLoRA adapter (B = 0) of that
        rank. A is drawn anew, nested over ranks, by the law that ``init_lora_weights`` names. The function may use the
        same base model each time, which saves forward passes: PEFT's layers are removed after each rank.
      batch: Batch of every step, or a sequence of batches that the steps cycle through, with labels.
      ranks: Two or more ranks.
      held_out: Batch that is never trained on, without the tokens that repeat the beginning of the first batch.
      learning_rate: Learning rate of AdamW in your training.
      make_optimizer: Function of the adapter's parameters and the rank that returns another optimizer, for which
        ``learning_rate`` has no effect. None is AdamW.
      loss: Function of the model and a batch; None is ``model(**batch).loss``.
      steps: Numbers of updates after which to measure, in ascending order.
      seeds: Number of draws of A; at least 2, which error bars need.
      band: Largest absolute slope that counts as flat.
      seed: Seed of all draws.
      progress: Whether to show transformers' progress bar of the training steps.

    Returns:
      The sizes, slopes and verdict.

    Raises:
      InputError: If a model has no fresh LoRA adapter of its rank, if no law is known for its initialisation, or if an
        argument is out of range.
    """
    # Validate before any model is made.
    check_instance("make_model", make_model, Callable, "a function")
    for option, integers in (("ranks", ranks), ("steps", steps)):
        if not isinstance(integers, Collection):
            raise InputError(f"{option} must be a sequence of integers, got {shown(integers)}")
    check_list("ranks", ranks, check_integer, fewest=2)
    for step in steps:
        check_integer("steps", step)
    check_steps(steps)
    check_integer("seeds", seeds, minimum=2)
    check_seed("seed", seed)
    ranks = tuple(sorted(ranks))
    batches = list(batch) if isinstance(batch, Iterable) and not isinstance(batch, Mapping) else [batch]
    if not batches:
        raise InputError("batch must have at least one batch, got none")
    for training_batch in batches:
        check_batch("batch", training_batch)
    if held_out is not None:
        check_batch("held_out", held_out)
    check_positive("band", band)
    compute_loss = loss_function(loss)
    if make_optimizer is not None:
        check_instance("make_optimizer", make_optimizer, Callable, "a function")
    check_positive("learning_rate", learning_rate)
    make_optimizer = make_optimizer or make_optimizer_of("adamw", learning_rate)
    rows: list[dict[str, Any]] = []
    optimizers: list[str] = []
    runs = [(draw, rank) for draw in range(seeds) for rank in ranks]
    total, description = len(runs) * max(steps), f"Checking {len(ranks)} ranks with {seeds} draws of A"
    first_steps = FirstSteps(batches, held_out, steps, loss=compute_loss)
    with with_autograd(), progress_bar(total, description=description, unit="step", shown=progress) as bar:
        for draw, rank in runs:
            model = make_model(rank)
            check_instance(f"make_model({rank})", model, torch.nn.Module, "a torch.nn.Module")
            model = unwrap(model)
            sizes_of_run = first_steps.measure(
                model, rank, [seed, draw], make_optimizer, on_step=bar.update, on_stage=bar.set_postfix_str
            )
            rows += [
                {"rank": rank, "seed": draw} | coordinate._asdict() | {"value": value}
                for coordinate, value in sizes_of_run
            ]
            optimizers.append(first_steps.optimizer)
            model_name = first_steps.model
    # Fit a slope against the rank for every coordinate.
    sizes = pd.DataFrame(rows)
    slopes = slope_rows(ranks, values_by_coordinate(sizes, ranks=ranks, seeds=range(seeds)), band=band)
    # Describe the scope of the verdict.
    step_text = f"{listed(steps)} step{'' if tuple(steps) == (1,) else 's'}"
    batch_text = f"{len(batches)} training batch{'' if len(batches) == 1 else 'es'}"
    optimizer_text = "; ".join(dict.fromkeys(optimizers))
    scope = (
        f"Measured on {model_name} at ranks {listed(ranks)}, after {step_text} of {optimizer_text}, "
        f"with {seeds} draws of A, {batch_text} and {'one' if held_out else 'no'} held-out batch. "
        f"A slope is flat if its 95% interval lies within ±{band:g}."
    )
    slope_frame = pd.DataFrame(slopes)
    thin.warn((sizes, slope_frame), thin.rank_warnings(ranks))
    return TorchCheck(sizes, slope_frame, judge_model(slopes), scope, band)


def module_name(model: torch.nn.Module, name: str) -> str:
    """Return the name of a layer of a PEFT model in its base model."""
    return name.removeprefix("base_model.model.") if hasattr(model, "get_base_model") else name


def _fresh_layers(model: torch.nn.Module, rank: int) -> dict[str, tuple[LoraLayer, str]]:
    """Return the LoRA layers of linear modules with the name of their active adapter.

    Raises:
      InputError: If there is none, if an adapter has another rank, or if its B is not zero.
    """
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not module.lora_A:
            continue
        # PEFT lists an adapter as active also in layers that it does not adapt.
        for adapter in module.active_adapters:
            if adapter not in module.lora_A:
                continue
            if isinstance(module, ParamWrapper):
                raise InputError(
                    f"make_model({rank}) must adapt linear modules, got experts in one parameter in {name}. Leave them "
                    "out by exclude_modules of the LoraConfig."
                )
            rows = len(module.lora_A[adapter].weight)
            if rows != rank:
                raise InputError(
                    f"make_model({rank}) must return adapters of rank {rank}, got rank {rows} in {name}. "
                    "Pass the argument on as LoraConfig(r=rank)."
                )
            # The law describes a first step from B = 0.
            if bool(module.lora_B[adapter].weight.any()):
                raise InputError(
                    f"make_model({rank}) must return a fresh adapter, got a B that is not zero in {name}. "
                    "Create the adapter with get_peft_model and do not train it."
                )
            layers[name] = (module, adapter)
    if not layers:
        raise InputError(f"make_model({rank}) must return a PEFT model with LoRA, got a model without LoRA layers")
    return layers


def _draw_nested(layers: Mapping[str, tuple[LoraLayer, str]], model: torch.nn.Module, seeds: list[int]) -> None:
    """Draw every A row by row from a generator that depends on the layer and the seeds, and not on the rank."""
    configs: Any = getattr(model, "peft_config", {})
    for index, (layer, adapter) in enumerate(layers.values()):
        init_name = configs[adapter].init_lora_weights if adapter in configs else True
        weight, random = layer.lora_A[adapter].weight, np.random.default_rng([*seeds, index])
        lora_A = inits.draw(random, init_of(init_name), rank=weight.shape[0], p_in=weight[0].numel())
        with torch.no_grad():
            weight.copy_(torch.from_numpy(lora_A).view_as(weight))


class _MaskedBatch:
    """Batch with the masks of the tokens at which outputs are measured.

    Raises:
      InputError: If every token of a held-out batch was seen in training.
    """

    def __init__(self, batch: Batch, model: torch.nn.Module, trained: Batch | None = None) -> None:
        self.batch = batch
        self._masks = find_masks(model, batch, trained)
        if not all((masks.real & ~masks.seen).any() for masks in self._masks.values()):
            raise InputError(
                "held_out has no token apart from those that repeat the beginning of a training record. "
                "Pass different records."
            )

    def has_other_positions(self, x: torch.Tensor) -> bool:
        """Return whether an input has other positions than the batch's tokens."""
        return has_other_positions(self._masks, x)

    def rms(self, x: torch.Tensor) -> float:
        """Return the root mean square over the unmasked tokens, or over all tokens if their masks are unknown."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        masks = select_masks(self._masks, x)
        if masks is not None:
            rows = rows[torch.from_numpy(masks.real & ~masks.seen).to(rows.device)]
        return float(rows.square().mean().sqrt())


@dataclass(frozen=True, eq=False)
class _Reference:
    """Batches on the device of a base model, and the outputs of the base model on those that are measured.

    Attributes:
      train: Batches of the steps.
      held_out: Batch that is never trained on.
      outputs: Outputs of the base model on every batch that is measured.
      base: Base model.
      versions: Weights of the base model, with the numbers of times that they were changed in place. Buffers are left
        out, because `preserved_state` restores them.
    """

    train: list[_MaskedBatch]
    held_out: _MaskedBatch | None
    outputs: dict[_MaskedBatch, dict[str, torch.Tensor]]
    base: ref[torch.nn.Module]
    versions: list[tuple[ref[torch.Tensor], int]]

    def is_of(self, model: torch.nn.Module, layers: Mapping[str, tuple[LoraLayer, str]]) -> bool:
        """Return whether a model with a fresh adapter has the same base model, unchanged."""
        weights = _base_weights(model, layers)
        if self.base() is not base_model(model) or len(weights) != len(self.versions):
            return False
        return all(
            version == weight._version and old() is weight
            for weight, (old, version) in zip(weights, self.versions, strict=True)
        )


def _base_weights(model: torch.nn.Module, layers: Mapping[str, tuple[LoraLayer, str]]) -> list[torch.Tensor]:
    """Return the parameters of a model apart from the A and B of its adapter."""
    adapter = {
        id(parameter)
        for layer, name in layers.values()
        for factor in (layer.lora_A[name], layer.lora_B[name])
        for parameter in factor.parameters()
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in adapter]


class FirstSteps:
    """Training of adapters for a few steps on the same batches, with measurements against the base model.

    Args:
      batches: Batches that the steps cycle through.
      held_out: Batch that is never trained on; None measures the training batches only.
      steps: Numbers of updates after which to measure, in ascending order.
      loss: Function of the model and a batch; None is ``model(**batch).loss``.
      label: Function of a module's name that returns its name in the coordinates. Modules of one name are measured
        together. The default is the last part of the name.

    Attributes:
      optimizer: Description of the optimizer of the latest run.
      model: Class and dtype of the base model of the latest run.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        held_out: Batch | None,
        steps: Sequence[int],
        *,
        loss: Loss | None = None,
        label: Callable[[str], str] = lambda name: name.rpartition(".")[2],
    ) -> None:
        self._batches, self._held_out, self._steps = batches, held_out, steps
        self._loss, self._label = loss_function(loss), label
        self._reference: _Reference | None = None
        self._left_out: set[str] = set()
        self.optimizer = self.model = ""

    def measure(
        self,
        model: torch.nn.Module,
        rank: int,
        seeds: list[int],
        make_optimizer: MakeOptimizer,
        on_step: Callable[[], Any] = lambda: None,
        on_stage: Callable[[str], Any] = lambda _: None,
    ) -> list[tuple[Coordinate, float]]:
        """Draw the A of a PEFT model's adapter, train the adapter, and measure its coordinates.

        PEFT's layers are removed from the model, and its state is restored, also if an error is raised.

        Args:
          model: PEFT model with a fresh adapter.
          rank: Rank of the adapter.
          seeds: Seeds of A, which is nested over ranks.
          make_optimizer: Function that returns the optimizer of the adapter's parameters at the rank.
          on_step: Function that is called after each step.
          on_stage: Function of a description of the work that begins.

        Returns:
          The coordinates with their sizes, which are not finite if training diverged.

        Raises:
          InputError: If the model has no fresh LoRA adapter of this rank, or ``make_optimizer`` returns no optimizer.
        """
        with with_autograd(), ExitStack() as stack:
            # The next rank can use the same base model, and so can the caller after an error.
            if hasattr(model, "unload"):
                stack.callback(remove_adapters, model)
            check_weights(model, offloaded=False)
            layers = _fresh_layers(model, rank)
            stack.enter_context(preserved_state(model))
            # Dropout masks depend on the seed alone: ranks share them.
            torch.manual_seed(sum(seeds))
            _draw_nested(layers, model, seeds)
            # Outputs of the base model, unless they are those of the run before.
            if self._reference is None or not self._reference.is_of(model, layers):
                on_stage(f"rank {rank}: outputs of the base model")
                self._reference = None  # frees the outputs of another base model first
                self._reference = self._compute_reference(model, layers)
            optimizer = make_optimizer(trainable_parameters(model), rank)
            if not hasattr(optimizer, "param_groups"):
                raise InputError(f"make_optimizer must return an optimizer of PyTorch, got {shown(optimizer)}")
            self.optimizer = _describe_optimizer(optimizer)
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            self.model = f"{type(base_model(model)).__name__} in {dtype}"
            return list(
                self._train(
                    model,
                    layers,
                    self._reference,
                    optimizer,
                    on_step,
                    lambda work: on_stage(f"rank {rank}: {work}"),
                )
            )

    def _compute_reference(self, model: torch.nn.Module, layers: Mapping[str, tuple[LoraLayer, str]]) -> _Reference:
        """Compute the outputs of the base model, while B is still 0, on the batches that are measured."""
        base = base_model(model)
        train = [_MaskedBatch(move_batch(batch, base), base) for batch in self._batches]
        new = None
        if self._held_out is not None:
            new = _MaskedBatch(move_batch(self._held_out, base), base, self._batches[0])
        measured = dict.fromkeys(train[(step - 1) % len(train)] for step in self._steps)
        if new is not None:
            measured[new] = None
        outputs = {masked: self._outputs(model, layers, masked)[0] for masked in measured}
        versions = [(ref(weight), weight._version) for weight in _base_weights(model, layers)]
        return _Reference(train, new, outputs, ref(base), versions)

    def _train(
        self,
        model: torch.nn.Module,
        layers: Mapping[str, tuple[LoraLayer, str]],
        reference: _Reference,
        optimizer: torch.optim.Optimizer,
        on_step: Callable[[], Any],
        on_stage: Callable[[str], Any],
    ) -> Iterator[tuple[Coordinate, float]]:
        """Train the adapter, and yield its coordinates with their sizes after each of the steps."""
        for step in range(1, max(self._steps) + 1):
            on_stage(f"training step {step} of {max(self._steps)}")
            # One training step on the step's batch: the steps cycle through the batches.
            trained = reference.train[(step - 1) % len(reference.train)]
            optimizer.zero_grad()
            loss = self._loss(model, trained.batch)
            with naming_failure("the backward pass"):
                loss.backward()
            optimizer.step()
            on_step()
            if step not in self._steps:
                continue
            # Sizes of the changes since the base model, on the batch just trained on and on the held-out batch.
            splits: dict[BatchSplit, _MaskedBatch | None] = {"train": trained, "held_out": reference.held_out}
            for split, masked in splits.items():
                if masked is None:
                    continue
                on_stage(f"{split.replace('_', '-')} outputs after step {step}")
                outputs, added, loss = self._outputs(model, layers, masked)
                for name, after in outputs.items():
                    change = after - reference.outputs[masked][name]
                    yield Coordinate(name, split, MODEL, step), masked.rms(change)
                for kind, sizes in added.items():
                    yield Coordinate("output", split, kind, step), float(np.sqrt(np.mean(np.square(sizes))))
                yield Coordinate("loss", split, MODEL, step), loss

    def _warn_once(self, kind: str, reason: str) -> None:
        if kind not in self._left_out:
            self._left_out.add(kind)
            logger.warning(f"the output of {kind} was not measured: it {reason}.")

    def _outputs(
        self, model: torch.nn.Module, layers: Mapping[str, tuple[LoraLayer, str]], masked: _MaskedBatch
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[float]], float]:
        """Run the model in evaluation mode on a batch.

        Returns:
          The final hidden states and logits; by label, the root mean square of each adapter's output; and the loss.
        """
        outputs: dict[str, torch.Tensor] = {}
        added: dict[str, list[float]] = {}

        def adapter_hook(kind: str, name: str, layer: LoraLayer, args: tuple, kwargs: dict[str, Any]) -> None:
            lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
            x = hooks.first_input(args, kwargs)
            if masked.has_other_positions(x):
                self._warn_once(kind, describe_positions(tuple(x.shape[:-1])))
                return
            output = lora_B(lora_A(x.to(lora_A.weight.dtype)))
            added.setdefault(kind, []).append(layer.scaling[name] * masked.rms(output))

        def head_hook(_: Any, args: tuple, output: torch.Tensor) -> None:
            outputs["hidden"], outputs["logits"] = args[0].detach().float(), output.detach().float()

        def model_hook(_: Any, __: Any, result: Any) -> None:
            logits = getattr(result, "logits", result)
            if isinstance(logits, torch.Tensor):
                outputs["logits"] = logits.detach().float()

        with ExitStack() as stack:
            stack.enter_context(_evaluation_mode(model))
            stack.enter_context(torch.no_grad())
            # B A x from the layer's own input: DoRA runs A and B on the identity matrix too.
            for name, (layer, adapter) in layers.items():
                hook = partial(adapter_hook, self._label(module_name(model, name)), adapter)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            # The head's input and output are the hidden states and the logits, whatever the loss function calls.
            get_head = getattr(base_model(model), "get_output_embeddings", None)
            head = get_head() if callable(get_head) else None
            # Without a head, the model's output has the logits.
            if head is None:
                stack.callback(model.register_forward_hook(model_hook).remove)
            else:
                stack.callback(head.register_forward_hook(head_hook).remove)
            loss = float(self._loss(model, masked.batch))
            # A loss function may call neither the head nor the model as a whole.
            if "logits" not in outputs:
                result = model(**masked.batch)
                if "logits" not in outputs:
                    outputs["logits"] = getattr(result, "logits", result).detach().float()
        return outputs, added, loss


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    rates = dict.fromkeys(f"{group['lr']:g}" for group in optimizer.param_groups)
    return f"{type(optimizer).__name__} at {' and '.join(rates)}"
