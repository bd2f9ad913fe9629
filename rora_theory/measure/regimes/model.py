"""Regime of every linear module of a PyTorch model, measured from a training batch and a held-out batch.

    measured = regime(model, batch, held_out, target_modules=["q_proj", "v_proj"])
    measured.crossings.query("optimizer == 'adam' and split == 'heldout'")[["module", "crossing_rank", "linear_term"]]
    config, learning_rate, advice = measured.transfer(Setting(16, 32, 2e-4), rank=128)

The measurement trains nothing and leaves the model unchanged.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from peft import LoraConfig

from rora_theory import inits
from rora_theory.advice.modules import AlphaGrouping
from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import Advice, transfer
from rora_theory.errors import InputError, shown
from rora_theory.inits import Init
from rora_theory.laws.random import seeds
from rora_theory.measure import hooks
from rora_theory.measure.batches import (
    Batch,
    Loss,
    MasksByShape,
    TokenMasks,
    check_batch,
    describe_positions,
    find_masks,
    has_other_positions,
    is_flattened,
    loss_function,
    move_batch,
    select_masks,
)
from rora_theory.measure.modules import (
    adapted_targets,
    base_model,
    check_weights,
    is_prompt_learning,
    layer_index,
    linear_size,
    preserved_state,
    select_modules,
    task_type,
    unwrap,
    with_autograd,
    without_adapters,
)
from rora_theory.measure.progress import progress_bar
from rora_theory.measure.regimes import module_regime, thin
from rora_theory.measure.regimes.layer import Layer, Split
from rora_theory.measure.regimes.module_regime import Regime, RegimeConfig, RegimeRows
from rora_theory.measure.tokens import choose_tokens
from rora_theory.optimizers import FAMILY, Optimizer
from rora_theory.scaling import Rule, check_choice, check_instance

DEFAULT = RegimeConfig(ranks=(8, 128), rows=0)
"""Default configuration, which trains no adapters.

With ``exact`` it predicts the size of the step at two ranks only, because Adam's epsilon requires an integral for each.
"""

RETURN_TYPE_PREFIX = "returns a"
"""Beginning of the reason in `TorchRegime.left_out` for a module that does not return a tensor."""


class Transferred(NamedTuple):
    """Configuration and learning rate for training at another rank.

    Attributes:
      config: PEFT's ``LoraConfig``.
      learning_rate: Learning rate for it.
      advice: Advice that both come from; ``advice.sentence()`` states for how many steps it holds.
    """

    config: LoraConfig
    learning_rate: float
    advice: Advice


@dataclass(frozen=True, eq=False)
class TorchRegime(Regime):
    """Result of `regime`: the frames of `Regime`, with the model's settings for PEFT.

    Attributes:
      target_modules: Target modules for PEFT's ``LoraConfig``.
      task_type: Task type for PEFT's ``LoraConfig``.
      left_out: Reason for each module that was not measured: no held-out token or no gradient reached it, it does not
        return a tensor (``"returns a tuple"``), so that neither this law nor PEFT's LoRA covers it, or it reads other
        positions than the batch's tokens (``"reads 3 x 512 positions, ..."``), such as padding that the model adds.
      unmasked: Modules that receive tokens in an unknown order (experts, patches of images, flattened tokens before the
        first input of shape [sequence, batch]), so that padding and seen tokens could not be left out.
    """

    target_modules: str | list[str]
    task_type: str | None
    left_out: dict[str, str]
    unmasked: tuple[str, ...]

    def linear_terms(
        self,
        optimizer: Optimizer = "adam",
        init: Init = "kaiming_uniform",
        split: Split = "heldout",
    ) -> dict[str, float]:
        """Return the linear term of every module, which `rora_theory.advice.transfer` needs.

        Raises:
          InputError: If nothing was measured for this optimizer and initialisation.
        """
        rows = self.crossings_of(optimizer, init, split)
        return dict(zip(rows["module"], rows["linear_term"].astype(float), strict=True))

    def crossing_distance_at(self, rank: int, init: Init = "kaiming_uniform") -> float:
        """Return the crossing distance under Adam at the measured rank nearest to ``rank``.

        It is the geometric mean over modules at the held-out tokens.

        Raises:
          InputError: If no crossing distance was measured for this initialisation.
        """
        rows = self.crossing_distances[
            (self.crossing_distances["init"] == init) & (self.crossing_distances["split"] == "heldout")
        ]
        if rows.empty:
            raise InputError(
                f"no crossing distance was measured for init {shown(init)}. "
                "Add it to inits of the RegimeConfig, and adam to optimizers."
            )
        nearest = min(rows["rank"].unique(), key=lambda measured_rank: abs(np.log(measured_rank / rank)))
        return float(geometric_mean(rows.loc[rows["rank"] == nearest, "crossing_distance"]))

    def transfer(
        self,
        setting: Setting,
        rank: int = 128,
        *,
        regime: Literal["measured", "signal"] = "signal",
        rule: Rule | None = None,
        alpha: float | None = None,
        steps: int | None = None,
        to_steps: int | None = None,
        per: AlphaGrouping = "type",
        split: Split = "heldout",
    ) -> Transferred:
        """Transfer a tuned setting to another rank of this model.

        Args:
          setting: Tuned setting.
          rank: New rank.
          regime: Quantity to preserve. ``"signal"`` preserves the whole model's change, in which cross-talk averages
            out over modules, and covers later steps; `coordinate_check` tests it. ``"measured"`` preserves the root
            mean square of each module's first step.
          rule: Scaling rule of the new setting, see `rora_theory.transfer`.
          alpha: Alpha of the new setting, see `rora_theory.transfer`.
          steps: Number of steps for which the learning rate was tuned, see `rora_theory.transfer`.
          to_steps: Number of steps of the new run; None is ``steps``.
          per: Grouping of the modules that share an alpha.
          split: Split whose linear terms the regime ``"measured"`` uses.

        Returns:
          PEFT's configuration, the learning rate and the advice.

        Raises:
          InputError: If the optimizer or initialisation was not measured, or if `rora_theory.transfer` refuses an
            argument.
        """
        check_instance("setting", setting, Setting, "a Setting")
        # Linear terms are those of the optimizer's family: AdamW has Adam's first step.
        family = FAMILY[setting.optimizer]
        terms = self.linear_terms(family, setting.init, split)
        preserved: Any = terms if regime == "measured" else regime
        advice = transfer(setting, rank, preserved, rule=rule, alpha=alpha, steps=steps, to_steps=to_steps)
        # PEFT can't adapt a module that does not return a tensor.
        unsupported = [name for name, reason in self.left_out.items() if reason.startswith(RETURN_TYPE_PREFIX)]
        config: Any = LoraConfig(
            task_type=self.task_type,
            target_modules=self.target_modules,
            exclude_modules=unsupported or None,
            **advice.lora_arguments(per),
        )
        return Transferred(config, advice.learning_rate, advice)


def regime(
    model: torch.nn.Module,
    batch: Batch,
    held_out: Batch,
    target_modules: Sequence[str] | str | None = None,
    loss: Loss | None = None,
    config: RegimeConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    adapters: Literal["off", "on"] = "off",
    progress: bool = False,
) -> TorchRegime:
    """Measure the regime of every target module, in the model's own process, dtype and device.

    A forward pass of ``held_out`` samples ``config.tokens`` inputs of every module. A forward and a backward pass of
    ``batch`` compute the gradients of the modules one after the other. Each is reduced to its figures on the host at
    once, to the accuracy of `Regime.errors`, or in float64 with ``config.exact``. Compared with a fine-tuning step,
    the device needs memory for one more gradient and one more input. The passes run in the model's own mode (training
    or evaluation). The random generators and the model's buffers are restored afterwards.

    If the result rests on too few tokens or layers, a warning and the frames' ``attrs`` say so, see
    `rora_theory.measure.regimes.thin`.

    Modules that share a weight have a G each, because PEFT gives each an adapter of its own. In a quantised model G is
    that of the quantised weights and activations, which 8 bits change by several percent.

    Args:
      model: Any PyTorch model: bare, in `DistributedDataParallel`, spread by ``device_map``, with gradient
        checkpointing, in 16 bits, or quantised by bitsandbytes. The base model of a PEFT model is measured.
      batch: Batch that yields the gradient, with labels.
      held_out: Batch of other records. Inputs are sampled at its tokens, without those that repeat the beginning of a
        record of ``batch`` (see `rora_theory.measure.tokens`) unless ``config.mask`` is false.
      target_modules: Target modules in PEFT's format. None selects those that PEFT already adapts, or every linear
        module but the head.
      loss: Function of the model and a batch; None is ``model(**batch).loss``.
      config: Settings of the measurement; None is `DEFAULT`. With ``rows`` above 0, adapters are also trained for one
        step, which needs JAX.
      layers: Indices of the layers to measure (the first number in a module's name); a few layers are a sample of the
        model that takes less time. None measures all.
      adapters: ``"off"`` to measure the base model; ``"on"`` to measure the adapted model, as at a later step of a
        run. The law then describes a fresh adapter added to the adapted model.
      progress: Whether to show transformers' progress bar.

    Returns:
      The measured regime.

    Raises:
      InputError: If an argument is of another type, a target module does not exist, a batch has no labels, the loss is
        not finite, no held-out token is left, the two batches call the modules differently often, ``adapters`` is
        ``"on"`` for a learned prompt, or weights were created within ``torch.inference_mode``.
    """
    # Validate the arguments before any pass of the model.
    check_instance("model", model, torch.nn.Module, "a torch.nn.Module")
    config = DEFAULT if config is None else config
    check_instance("config", config, RegimeConfig, "a RegimeConfig")
    check_choice("adapters", adapters, ("off", "on"))
    compute_loss = loss_function(loss)
    for name, value in (("batch", batch), ("held_out", held_out)):
        check_batch(name, value)
    model = unwrap(model)
    base = base_model(model)
    check_weights(base, offloaded=True)
    modules = select_modules(base, target_modules, layers)
    # A learned prompt lies outside the base model: without it, the base model runs.
    if is_prompt_learning(model):
        if adapters == "on":
            raise InputError("adapters must be 'off' for a model with a learned prompt, got 'on'")
        model = base
    # The progress bar counts weights, because the work on a module is proportional to them.
    sizes = {name: linear_size(module) for name, module in modules.items()}
    bar = progress_bar(
        sum(sizes.values()), description=f"Measuring {len(modules)} modules", unit=" weights", shown=progress
    )
    with bar, with_autograd(), preserved_state(model), ExitStack() as stack:
        if adapters == "off":
            stack.enter_context(without_adapters(model))
        batch, held_out = move_batch(batch, base), move_batch(held_out, base)
        # Forward pass of the held-out batch: sample inputs of every module.
        sampler = _InputSampler(config, find_masks(base, held_out, batch), config.mask)
        held_out_loss, unsupported = hooks.read_modules(
            modules, lambda: float(compute_loss(model, held_out)), sampler.add
        )
        sampler.finish()
        # List the modules that the pass did not reach, and fail if none is left.
        reached = {name: module for name, module in modules.items() if name in sampler.calls}
        left_out = {name: "no held-out token" for name in modules if name not in reached}
        left_out |= {
            name: f"{RETURN_TYPE_PREFIX} {output}" for name, output in unsupported.items() if name not in reached
        }
        for name in sampler.misplaced_modules():
            left_out[name] = describe_positions(sampler.misplaced[name])
            del reached[name]
        if not reached and (unsupported or sampler.misplaced):
            name, reason = next((name, left_out[name]) for name in (*unsupported, *sampler.misplaced))
            raise InputError(f"none of {len(modules)} target modules can be measured; {name}: {reason}")
        # Forward and backward pass of the batch: reduce each module's gradient as soon as it is complete.
        training_masks = find_masks(base, batch)
        training_masks.is_sequence_first = sampler.masks.is_sequence_first
        reducer = _GradientReducer(config, training_masks, sampler)

        def on_gradient(name: str, grad: torch.Tensor, inputs: list[hooks.Inputs]) -> None:
            reducer.add(name, grad, inputs)
            bar.update(sizes[name])

        training_loss = hooks.backward(model, reached, lambda: compute_loss(model, batch), sampler.calls, on_gradient)
    left_out |= {name: "no gradient" for name in reached if name not in reducer.rows} | reducer.left_out
    if not reducer.rows:
        raise InputError(
            f"no gradient reaches any of {len(reached)} target modules. Choose target_modules that the loss depends on."
        )
    # Gradients arrive in the order of the backward pass: restore the model's order.
    measured = Regime.from_rows(
        [reducer.rows[name] for name in modules if name in reducer.rows], training_loss, held_out_loss
    )
    # Warn if the result rests on too few tokens or layers.
    all_modules = modules if layers is None else select_modules(base, target_modules)
    warnings = thin.regime_warnings(measured.crossings, len({layer_index(name) for name in all_modules}))
    thin.warn(measured.files().values(), warnings)
    targets = adapted_targets(model) if target_modules is None else target_modules
    return TorchRegime(
        **vars(measured),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task_type(base),
        left_out=left_out,
        unmasked=tuple(name for name in modules if name in sampler.unmasked and name not in left_out),
    )


class _InputSampler:
    """Uniform sample of each module's inputs at the unmasked tokens, over all calls of the module in a pass.

    Attributes:
      inputs: Sampled inputs by module.
      counts: Numbers of tokens by module and kind, see `choose_tokens`.
      calls: Number of calls by module.
      unmasked: Modules with inputs of a shape for which no masks are known, or flattened in an unknown order.
      misplaced: Leading shape of an input that has other positions than the batch's tokens, by module.
      masks: Masks of the batch's tokens.
    """

    def __init__(self, config: RegimeConfig, masks: MasksByShape, mask: bool) -> None:
        self._config, self.masks, self._mask = config, masks, mask
        self.inputs: dict[str, np.ndarray] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.calls: dict[str, int] = {}
        self.unmasked: set[str] = set()
        self.misplaced: dict[str, tuple[int, ...]] = {}
        self._masked: set[str] = set()
        self._keys: dict[str, np.ndarray] = {}
        self._flattened: set[str] = set()  # modules for whose inputs the order [batch, sequence] was assumed

    def add(self, name: str, x: hooks.Inputs) -> None:
        """Sample a module's input in one call and merge it with the sample of earlier calls."""
        if not x.shape[:-1].numel():
            return
        masks, call = select_masks(self.masks, x), self.calls.get(name, 0)
        if masks is not None:
            self._masked.add(name)
        elif has_other_positions(self.masks, x):
            self.misplaced[name] = tuple(x.shape[:-1])
        if masks is None:
            self.unmasked.add(name)
        elif not self.masks.is_sequence_first and is_flattened(self.masks, x):
            self._flattened.add(name)
        rows, keys, counts = self._sample(name, x, masks, call)
        if call:
            # Keep the smallest keys over all calls, which makes every token equally likely to be sampled.
            rows, keys = np.concatenate([self.inputs[name], rows]), np.concatenate([self._keys[name], keys])
            smallest = np.sort(np.argsort(keys)[: self._config.tokens])
            rows, keys = rows[smallest], keys[smallest]
            # Add the numbers of tokens over calls.
            counts = {kind: number + self.counts[name][kind] for kind, number in counts.items()} | {"read": len(rows)}
        self.inputs[name], self._keys[name], self.counts[name], self.calls[name] = rows, keys, counts, call + 1

    def misplaced_modules(self) -> list[str]:
        """Return the modules none of whose inputs had the batch's tokens."""
        return [name for name in self.misplaced if name not in self._masked]

    def finish(self) -> None:
        """Report masks of a wrong order, and move all samples to a temporary file.

        Samples of all modules would take memory at the moment when the following training pass takes most, the more so
        because each was allocated between temporary tensors and divides the memory that they leave. From the file, a
        sample is read when its module's gradient arrives.
        """
        # A later input of shape [sequence, batch] showed that the assumed order may be wrong.
        if self.masks.is_sequence_first:
            self.unmasked |= self._flattened
        if self.inputs:
            with TemporaryFile() as file:
                for rows in self.inputs.values():
                    file.write(rows.tobytes())
                file.flush()
                # The map keeps the closed file until the last sample is gone. Mode "c" because PyTorch warns about
                # arrays that are not writable.
                block = np.asarray(np.memmap(file, np.float32, "c"))
            parts = np.split(block, np.cumsum([rows.size for rows in self.inputs.values()])[:-1])
            samples = zip(self.inputs.items(), parts, strict=True)
            self.inputs = {name: part.reshape(rows.shape) for (name, rows), part in samples}

    def _sample(
        self, name: str, x: hooks.Inputs, masks: TokenMasks | None, call: int
    ) -> tuple[Float[np.ndarray, "read p_in"], Float[np.ndarray, " read"], dict[str, int]]:
        """Choose tokens of one call among those that are real, not seen in training and no attention sinks.

        Returns:
          The inputs at the chosen tokens, their keys (see `_sample_keys`), and the numbers of tokens by kind.
        """
        x, seed = x.reshape(-1, x.shape[-1]), self._config.seed
        if masks is None:
            masks = TokenMasks(np.ones(len(x), bool), np.zeros(len(x), bool))
        real = np.flatnonzero(masks.real)
        norms = torch.linalg.vector_norm(x.float(), dim=1).cpu().numpy()[real]
        seen = masks.seen[real] if self._mask else None
        token_seed = [seed, call] if call else seed
        chosen_tokens = choose_tokens(norms, seen, count=self._config.tokens, seed=token_seed, name=name)
        indices = torch.from_numpy(real[chosen_tokens.indices]).to(x.device)
        keys = _sample_keys(chosen_tokens.counts, [seed, call, 1])
        return _to_host(x[indices]), keys, chosen_tokens.counts


class _GradientReducer:
    """Reduction of each module's gradient to rows of the frames.

    Attributes:
      rows: Rows by module.
      left_out: Reason for each module that reads other positions than the batch's tokens.
    """

    def __init__(self, config: RegimeConfig, masks: MasksByShape, held_out: _InputSampler) -> None:
        self._config, self._masks, self._held_out = config, masks, held_out
        self.rows: dict[str, RegimeRows] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, grad: torch.Tensor, calls: list[hooks.Inputs]) -> None:
        """Measure a module from its gradient and its training inputs, call by call; skip a zero gradient."""
        config, index = self._config, layer_index(name)
        if _is_zero(grad):
            return
        # Sample the training inputs in the same way as the held-out inputs.
        training = _InputSampler(config, self._masks, mask=False)
        for x in calls:
            training.add(name, x)
        if training.misplaced_modules():
            self.left_out[name] = describe_positions(training.misplaced[name])
            return
        inputs = {"train": training.inputs[name], "heldout": self._held_out.inputs[name]}
        layer = Layer(name, _to_host(grad), inputs)
        # Train adapters for one step, if requested; this imports JAX.
        stepped: dict[tuple, dict[str, Any]] = {}
        if config.rows:
            from rora_theory.measure.regimes import drawn_steps

            stepped = drawn_steps.measure_adapters(config, layer)

        # Evaluate the law.
        counts = {"train": training.counts[name], "heldout": self._held_out.counts[name]}
        draw_rows = partial(_draw_distance_rows, config, layer)
        self.rows[name] = module_regime.measure_module(config, layer, index, draw_rows, stepped, counts, _multiply)


def _sample_keys(counts: Mapping[str, int], seed: list[int]) -> Float[np.ndarray, " read"]:
    """Draw keys for the tokens that `choose_tokens` sampled in one call.

    If every eligible token had a key from U(0, 1), a uniform sample would consist of the tokens with the smallest keys.
    These are such smallest keys, in random order. The tokens with the smallest keys over several calls are therefore a
    uniform sample of the tokens of all calls.
    """
    random = np.random.default_rng(seed)
    keys = random.random(counts["all"] - counts["seen"] - counts["sinks"])
    return random.permutation(np.sort(keys)[: counts["read"]])


def _draw_distance_rows(config: RegimeConfig, layer: Layer, init: Init) -> Float[np.ndarray, "rows p_in"]:
    # The name is that of the published runs, whose draws it reproduces.
    random = np.random.default_rng([config.seed, seeds.seed_from_name(f"{layer.name} {init} takeover")])
    return inits.draw(random, init, rank=config.distance_rows, p_in=layer.grad.shape[1])


def _multiply(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Multiply matrices by PyTorch, since the threads of NumPy's BLAS would compete with PyTorch's for the cores."""
    with torch.autocast("cpu", enabled=False):
        return (torch.from_numpy(first) @ torch.from_numpy(second)).numpy()


def _is_zero(matrix: torch.Tensor) -> bool:
    """Return whether all entries are 0. The smallest and the largest take an eighth of the time of `torch.any`."""
    return not matrix.numel() or all(float(extreme) == 0 for extreme in torch.aminmax(matrix))


def _to_host(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
