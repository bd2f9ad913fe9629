r"""Inputs and full-weight gradients of the modules of a LLaMA model at one batch, and real first steps.

The gradient of a module's weight is :math:`G = \sum_t \delta_t x_t^\top`, where :math:`x_t` is the module's input and
:math:`\delta_t = \partial L/\partial y_t` the gradient at its output. Both come from one backward pass: zeros are added
to the output of every module, and the loss is differentiated with respect to them. A `Recording` holds
tokens x (p_in + p_out) numbers for each module. G, which has p_in x p_out, is computed for one module at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.advice.setting import Setting
from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraAdapter, LoraConfig
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune.loss import cross_entropy
from rora_theory.lab.finetune.step import batch_loss
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.model import Params
from rora_theory.optimizers import OptimizerName, make_optimizer


@dataclass(frozen=True, eq=False)
class Recording:
    """Inputs and output gradients of modules at a batch's tokens, on the host.

    Attributes:
      inputs: Inputs ``{module: [layers, tokens, p_in]}`` at the tokens that are not padding.
      deltas: Gradients dL/dy of the mean loss, ``{module: [layers, tokens, p_out]}``; empty if they were not recorded.
      loss: Mean loss over the batch's targets.
    """

    inputs: dict[str, np.ndarray]
    deltas: dict[str, np.ndarray]
    loss: float

    def gradient(self, module: str, layer: int) -> Float[np.ndarray, "p_out p_in"]:
        """Compute the gradient G = dL/dm of a module's full weight m, accumulated in float64."""
        delta = self.deltas[module][layer].astype(np.float64)
        return (delta.T @ self.inputs[module][layer].astype(np.float64)).astype(np.float32)


def record(
    params: Params, config: LlamaConfig, batch: Batch, modules: Sequence[str], *, gradients: bool = True
) -> Recording:
    """Run a batch through the base model and record what its modules receive.

    Args:
      params: Weights of the model.
      config: Configuration of the model.
      batch: Batch, padded on the right, see `rora_theory.lab.finetune.Batch`.
      modules: Names from `rora_theory.lab.llama.MODULES`.
      gradients: Whether to run a backward pass too and record output gradients.

    Returns:
      The inputs, output gradients and loss.

    Raises:
      InputError: If a module is unknown or the loss is not finite.
    """
    # Zeros to add to the modules' outputs: the loss is differentiated with respect to them.
    zeros = {}
    if gradients:
        dtype = params["embed_tokens"].dtype
        for name in modules:
            shape = (config.num_hidden_layers, *batch.inputs.shape, config.module_shape(name)[0])
            zeros[name] = jnp.zeros(shape, dtype)
    loss, inputs, deltas = _record(params, zeros, batch, config=config, modules=tuple(modules))
    if not np.isfinite(float(loss)):
        raise InputError(f"the loss of the batch must be finite, got {float(loss)}. Check the model and the batch.")
    # Remove the positions of padding.
    real = real_tokens(batch)
    return Recording(
        {name: np.asarray(x)[:, real] for name, x in inputs.items()},
        {name: np.asarray(delta)[:, real] for name, delta in deltas.items()},
        float(loss),
    )


def real_tokens(batch: Batch) -> np.ndarray:
    """Return a mask [B, S] that is True up to the last position of each row that has a target."""
    rows, length = batch.inputs.shape
    weights, positions = np.asarray(batch.weights), batch.positions
    # Targets may be stored for chosen positions only.
    if positions is None:
        target_positions = np.broadcast_to(np.arange(weights.shape[1]), weights.shape)
    else:
        target_positions = np.asarray(positions)
    last = np.max(np.where(weights > 0, target_positions, -1), axis=1)
    return np.arange(length)[None, :] <= last.reshape(rows, 1)


@dataclass(frozen=True)
class _Perturbed:
    """Adapter (`rora_theory.lab.llama.Adapter`) that adds given arrays to the outputs of modules."""

    added: dict[str, Array]

    def layers(self) -> dict[str, Array]:
        return self.added

    def linear(
        self,
        name: str,
        x: Array,
        weight: Array,
        bias: Array | None,
        layer: dict[str, Array],
        *,
        key: PRNGKeyArray | None,  # noqa: ARG002
    ) -> Array:
        y = llama.linear(x, weight, bias)
        return y + layer[name] if name in layer else y

    def prefix(self, layer: Any) -> None:  # noqa: ARG002
        return None


@partial(jax.jit, static_argnames=("config", "modules"))
def _record(
    params: Params, zeros: dict[str, Array], batch: Batch, *, config: LlamaConfig, modules: tuple[str, ...]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    # The derivative in a value added to an output is the gradient of that output.
    def loss(added: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        hidden, inputs = llama.hidden_states(params, batch.inputs, config, _Perturbed(added), capture=modules)
        # The loss is over the few positions with a target.
        if batch.positions is not None:
            hidden = jnp.take_along_axis(hidden, batch.positions[..., None], axis=1)
        head = llama.output_matrix(params, config)
        summed = cross_entropy(hidden, head, batch.targets, batch.weights)
        return summed / jnp.maximum(jnp.sum(batch.weights), 1), inputs

    # Without zeros to differentiate in, a forward pass is enough.
    if not zeros:
        return *loss(zeros), {}
    (value, inputs), deltas = jax.value_and_grad(loss, has_aux=True)(zeros)
    return value, inputs, deltas


_hidden_states = jax.jit(llama.hidden_states, static_argnames=("config", "capture"))
"""Hidden states of the base model, compiled once for all instances of `RealStep`."""


def lora_config_for(
    setting: Setting, target_modules: Sequence[str] | str, alpha_pattern: Mapping[str, float] | None = None
) -> LoraConfig:
    """Return the adapter configuration of a setting.

    Args:
      setting: Rank, alpha, rule and initialisation.
      target_modules: Target modules, see `LoraConfig`.
      alpha_pattern: Alphas of modules that differ from the setting's, see `LoraConfig`.
    """
    return LoraConfig(
        rank=setting.rank,
        alpha=setting.alpha,
        rule=setting.rule,
        target_modules=target_modules,
        init=setting.init,  # type: ignore[arg-type]  # LoraConfig refuses an init that adapters do not support
        alpha_pattern=alpha_pattern or {},
    )


def take_step(
    adapter: LoraAdapter,
    state: optax.OptState,
    base: Params,
    batch: Batch,
    *,
    config: LlamaConfig,
    transformation: optax.GradientTransformation,
) -> tuple[LoraAdapter, optax.OptState, Params]:
    """Apply one update of an adapter on the batch's mean loss, by automatic differentiation.

    Args:
      adapter: Adapter to update.
      state: State of the optimizer.
      base: Weights of the base model.
      batch: Batch of the step.
      config: Configuration of the base model.
      transformation: Optimizer of the step.

    Returns:
      The updated adapter, the new state of the optimizer, and the gradients of the step.
    """

    def loss(params: Params) -> Float[Array, ""]:
        summed = batch_loss(base, batch, config, adapter.replace(params))
        return summed / jnp.maximum(jnp.sum(batch.weights), 1)

    gradients = jax.grad(loss)(adapter.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and its integer step count
        updates, state = transformation.update(gradients, state, adapter.params)
        params = optax.apply_updates(adapter.params, updates)
    return adapter.replace(params), state, gradients


class StepSquares(NamedTuple):
    r"""Sums of squares over entries and unmasked tokens for a module in each layer, as a pytree.

    Attributes:
      output: Sum of squares of :math:`\gamma B A x`.
      inner: Sum of squares of A x.
      delta: Squared Frobenius norm of :math:`\gamma B A`.
    """

    output: Float[Array, " layers"]
    inner: Float[Array, " layers"]
    delta: Float[Array, " layers"]


def measure_adapter(
    adapter: LoraAdapter,
    inputs: dict[str, Float[Array, "layers b s _i"]],
    square_sum: Callable[[Float[Array, "b s _n"]], Float[Array, ""]],
) -> dict[str, StepSquares]:
    """Compute the sizes of an adapter's output and of its weight change on a batch, by module.

    Args:
      adapter: Adapter to measure.
      inputs: Input x of every adapted module.
      square_sum: Function that sums squares over entries and unmasked tokens.

    Returns:
      The sums of squares in each layer, by module.
    """

    def measure_layer(layer: tuple[dict[str, Array], Float[Array, "b s i"]]) -> StepSquares:
        tensors, x = layer
        lora_A, lora_B, scaling = tensors["lora_A"], tensors["lora_B"], tensors["scaling"]
        inner = jnp.einsum("bsi,ri->bsr", x.astype(jnp.float32), lora_A)
        output = scaling * jnp.einsum("bsr,or->bso", inner, lora_B)
        # |B A|_F^2 = <B^T B, A A^T>: avoids forming B A.
        delta = scaling**2 * jnp.sum((lora_B.T @ lora_B) * (lora_A @ lora_A.T))
        return StepSquares(square_sum(output), square_sum(inner), delta)

    # One layer at a time, which bounds the memory of the outputs.
    return {name: jax.lax.map(measure_layer, (tensors, inputs[name])) for name, tensors in adapter.layers().items()}


@dataclass(frozen=True)
class Change:
    """Change of a model at the held-out tokens after one optimizer step of all adapters.

    Attributes:
      modules: Rms over outputs and tokens of w = gamma B A x', ``{module: [layers]}``, at the base model's inputs x'.
      hidden: Rms of the change of the final hidden states, with all modules adapted.
      logits: Rms of the change of the logits.
    """

    modules: dict[str, np.ndarray]
    hidden: float
    logits: float


class RealStep:
    """First optimizer steps of a whole model's adapters, from the gradient of the training loss.

    Args:
      params: Weights of the base model.
      config: Configuration of the base model.
      train: Batch of the step.
      held_out: Batch at which the change is measured.
      target_modules: Target modules, see `LoraConfig`.
    """

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        train: Batch,
        held_out: Batch,
        target_modules: Sequence[str] | str,
    ) -> None:
        self._params, self._config = params, config
        self._train, self._held_out = jax.tree.map(jnp.asarray, (train, held_out))
        self._targets = target_modules
        self._real = jnp.asarray(real_tokens(held_out))
        self._compiled: dict[tuple[int, OptimizerName], Callable] = {}
        targets = lora_config_for(Setting(1, 1.0, 1.0), target_modules).targets(config)
        names = tuple(target.module for target in targets)
        self._before = _hidden_states(params, self._held_out.inputs, config=config, capture=names)

    def change(self, setting: Setting, key: PRNGKeyArray, alpha_pattern: dict[str, float] | None = None) -> Change:
        """Compute the change after one step from B = 0, for one draw of A.

        Args:
          setting: Rank, alpha, rule, learning rate, optimizer and initialisation.
          key: Random key of A.
          alpha_pattern: Alphas of modules that differ from the setting's, in PEFT's format.

        Returns:
          The sizes of the change at the held-out tokens.

        Raises:
          InputError: If the pattern matches no module, the rank exceeds a module's size, or adapters do not support the
            initialisation.
        """
        config = lora_config_for(setting, self._targets, alpha_pattern)
        adapter = config.build(key, self._config, self._params)
        # Alpha and the learning rate are arguments of the compiled step: only ranks and optimizers recompile.
        step_key = (setting.rank, setting.optimizer)
        if step_key not in self._compiled:
            self._compiled[step_key] = jax.jit(partial(self._step, template=adapter, optimizer=setting.optimizer))
        change = self._compiled[step_key](
            adapter.params, adapter.scaling, jnp.float32(setting.learning_rate), self._params, self._before
        )
        modules, hidden, logits = jax.tree.map(np.asarray, change)
        return Change(modules, float(hidden), float(logits))

    def _step(
        self,
        tensors: Params,
        scaling: dict[str, Array],
        learning_rate: Array,
        base: Params,
        before: tuple[Array, dict[str, Array]],
        *,
        template: LoraAdapter,
        optimizer: OptimizerName,
    ) -> tuple[dict[str, Array], Array, Array]:
        # One training step.
        adapter = replace(template, params=tensors, scaling=scaling)
        transformation = make_optimizer(optimizer, learning_rate)
        stepped, _, _ = take_step(
            adapter,
            transformation.init(tensors),
            base,
            self._train,
            config=self._config,
            transformation=transformation,
        )
        # Change of the final hidden states at the held-out batch, and of each module's output at the base's inputs.
        hidden, inputs = before
        after = llama.hidden_states(base, self._held_out.inputs, self._config, stepped)
        change = after.astype(jnp.float32) - hidden.astype(jnp.float32)
        modules = {}
        for name, squares in measure_adapter(stepped, inputs, self._square_sum).items():
            modules[name] = jnp.sqrt(squares.output / self._entries(stepped.params[name]["lora_B"].shape[1]))
        # The unembedding is linear: the change of the logits is the unembedding of the change.
        return modules, self._rms(change), self._rms(llama.unembed(base, change, self._config))

    def _square_sum(self, values: Float[Array, "b s n"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(self._real[..., None], jnp.square(values), jnp.zeros((), jnp.float32)))

    def _entries(self, width: int) -> Float[Array, ""]:
        """Return the number of entries at the real tokens, ``width`` for each."""
        return jnp.sum(self._real).astype(jnp.float32) * width

    def _rms(self, values: Float[Array, "b s n"]) -> Float[Array, ""]:
        """Compute the root mean square over the real tokens and the last axis."""
        return jnp.sqrt(self._square_sum(values) / self._entries(values.shape[-1]))
