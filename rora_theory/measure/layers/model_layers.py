r"""The adapted layers of a real LLaMA model: inputs and full-weight gradients of one batch, and a first real step.

The gradient of a module's weight is :math:`G = \sum_t \delta_t x_t^\top` with x_t the module's input and
:math:`\delta_t = \partial L/\partial y_t` at its output. Both come from one backward pass: the output of every module
is perturbed by zeros, and the loss is differentiated in these. A Recording holds tokens x (p_in + p_out) numbers a
module; G, p_in x p_out, is made for one module at a time and never for all.
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

from rora_theory import adapters, llama
from rora_theory.adapters import LoraAdapter, LoraConfig
from rora_theory.advice.setting import Setting
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune.loss import cross_entropy
from rora_theory.finetune.step import batch_loss
from rora_theory.llama import LlamaConfig
from rora_theory.llama.model import Params
from rora_theory.optimizers import OptimizerName, make_optimizer


@dataclass(frozen=True, eq=False)
class Recording:
    """Inputs and output gradients of modules at a batch's tokens, on the host.

    Attributes:
      inputs: ``{module: [layers, tokens, p_in]}`` at the tokens that the model reads, without padding.
      deltas: ``{module: [layers, tokens, p_out]}``, dL/dy of the mean loss; empty where none was asked for.
      loss: mean over the batch's targets.
    """

    inputs: dict[str, np.ndarray]
    deltas: dict[str, np.ndarray]
    loss: float

    def gradient(self, module: str, layer: int) -> Float[np.ndarray, "p_out p_in"]:
        """G = dL/dm of one module's full weight, summed in float64."""
        delta = self.deltas[module][layer].astype(np.float64)
        return (delta.T @ self.inputs[module][layer].astype(np.float64)).astype(np.float32)


def record(
    params: Params, config: LlamaConfig, batch: Batch, modules: Sequence[str], *, gradients: bool = True
) -> Recording:
    """Run a batch through the base model, forward and (for ``gradients``) backward.

    Args:
      params, config: the model.
      batch: padded on the right; see `rora_theory.finetune.Batch`.
      modules: names of `rora_theory.llama.MODULES`.
      gradients: whether to record output gradients too.

    Raises:
      InputError: an unknown module, or a loss that is not finite.
    """
    zeros = {}
    if gradients:
        dtype = params["embed_tokens"].dtype
        for name in modules:
            shape = (config.num_hidden_layers, *batch.inputs.shape, config.module_shape(name)[0])
            zeros[name] = jnp.zeros(shape, dtype)
    loss, inputs, deltas = _record(params, zeros, batch, config=config, modules=tuple(modules))
    if not np.isfinite(float(loss)):
        raise InputError(f"the batch's loss is {float(loss)}; accepted are a model and a batch with a finite loss")
    real = real_tokens(batch)
    return Recording(
        {name: np.asarray(x)[:, real] for name, x in inputs.items()},
        {name: np.asarray(delta)[:, real] for name, delta in deltas.items()},
        float(loss),
    )


def real_tokens(batch: Batch) -> np.ndarray:
    """[B, S], True up to the last position of each row that has a target: beyond is padding."""
    rows, length = batch.inputs.shape
    weights, positions = np.asarray(batch.weights), batch.positions
    at = np.broadcast_to(np.arange(weights.shape[1]), weights.shape) if positions is None else np.asarray(positions)
    last = np.max(np.where(weights > 0, at, -1), axis=1)
    return np.arange(length)[None, :] <= last.reshape(rows, 1)


@dataclass(frozen=True)
class _Perturbed:
    """The base model with numbers added to its modules' outputs: an `rora_theory.llama.Adapter`."""

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
    def loss(added: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        hidden, inputs = llama.hidden_states(params, batch.inputs, config, _Perturbed(added), capture=modules)
        if batch.positions is not None:
            hidden = jnp.take_along_axis(hidden, batch.positions[..., None], axis=1)
        head = llama.output_matrix(params, config)
        summed = cross_entropy(hidden, head, batch.targets, batch.weights)
        return summed / jnp.maximum(jnp.sum(batch.weights), 1), inputs

    if not zeros:
        return *loss(zeros), {}
    (value, inputs), deltas = jax.value_and_grad(loss, has_aux=True)(zeros)
    return value, inputs, deltas


_hidden = jax.jit(llama.hidden_states, static_argnames=("config", "capture"))
"""Compiled once for all steps of a model."""


def lora_of(
    setting: Setting, target_modules: Sequence[str] | str, alpha_pattern: Mapping[str, float] | None = None
) -> LoraConfig:
    """The adapter of a setting; of the pattern, where alphas differ by module, see `LoraConfig`."""
    return LoraConfig(
        rank=setting.rank,
        alpha=setting.alpha,
        rule=setting.rule,
        target_modules=target_modules,
        init=setting.init,  # type: ignore[arg-type]  # refused there where an adapter has no such one
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
    """One update of an adapter on the batch's mean loss, by automatic differentiation.

    Returns:
      the stepped adapter, the optimizer's new state, and the gradients that made the step.
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
    r"""Of a module in each layer, sums of squares over the tokens that count and entries. A pytree.

    Attributes:
      output: of :math:`\gamma B A x`.
      inner: of A x.
      delta: of :math:`\gamma B A`, its Frobenius norm's square.
    """

    output: Float[Array, " layers"]
    inner: Float[Array, " layers"]
    delta: Float[Array, " layers"]


def read_step(
    adapter: LoraAdapter,
    inputs: dict[str, Float[Array, "layers b s _i"]],
    square_sum: Callable[[Float[Array, "b s _n"]], Float[Array, ""]],
) -> dict[str, StepSquares]:
    """What an adapter adds at a batch, by module.

    Args:
      adapter: stepped.
      inputs: x of every adapted module.
      square_sum: sum of squares over entries and over the tokens that count.
    """

    def one(layer: tuple[dict[str, Array], Float[Array, "b s i"]]) -> StepSquares:
        tensors, x = layer
        lora_A, lora_B, scaling = tensors["lora_A"], tensors["lora_B"], tensors["scaling"]
        inner = jnp.einsum("bsi,ri->bsr", x.astype(jnp.float32), lora_A)
        output = scaling * jnp.einsum("bsr,or->bso", inner, lora_B)
        # |B A|_F^2 = <B^T B, A A^T>: B A is never formed.
        delta = scaling**2 * jnp.sum((lora_B.T @ lora_B) * (lora_A @ lora_A.T))
        return StepSquares(square_sum(output), square_sum(inner), delta)

    return {name: jax.lax.map(one, (tensors, inputs[name])) for name, tensors in adapter.layers().items()}


@dataclass(frozen=True)
class Change:
    """What one optimizer step of all adapters changed, read at other tokens.

    Attributes:
      modules: ``{module: [layers]}``, rms over outputs and tokens of w = gamma B A x', x' the base model's inputs.
      hidden: rms of the change of the final hidden states, all modules stepped together.
      logits: of the logits.
    """

    modules: dict[str, np.ndarray]
    hidden: float
    logits: float


class RealStep:
    """First optimizer steps of a whole model's adapters: the training loss differentiated, nothing assumed.

    Args:
      params, config: the base model.
      train: the batch that gives the step.
      held_out: the batch at which its effect is read.
      target_modules: what is adapted, see `LoraConfig`.
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
        names = tuple(target.module for target in lora_of(Setting(1, 1.0, 1.0), target_modules).targets(config))
        self._before = _hidden(params, self._held_out.inputs, config=config, capture=names)

    def change(self, setting: Setting, key: PRNGKeyArray, alpha_pattern: dict[str, float] | None = None) -> Change:
        """The change that one step from B = 0 makes, for one draw of A.

        Args:
          setting: rank, alpha, rule, rate, optimizer and init.
          key: of A.
          alpha_pattern: as PEFT's, where alphas differ by module.

        Raises:
          InputError: a pattern that matches nothing, a rank above a module's size, an init that adapters don't have.
        """
        config = lora_of(setting, self._targets, alpha_pattern)
        adapter = adapters.init(key, config, self._config, self._params)
        kind = (setting.rank, setting.optimizer)
        if kind not in self._compiled:  # alpha and rate are arguments of the compiled step, not part of it
            self._compiled[kind] = jax.jit(partial(self._step, template=adapter, trainer=setting.optimizer))
        found = self._compiled[kind](
            adapter.params, adapter.scaling, jnp.float32(setting.learning_rate), self._params, self._before
        )
        modules, hidden, logits = jax.tree.map(np.asarray, found)
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
        trainer: OptimizerName,
    ) -> tuple[dict[str, Array], Array, Array]:
        adapter = replace(template, params=tensors, scaling=scaling)
        transformation = make_optimizer(trainer, learning_rate)
        stepped, _, _ = take_step(
            adapter,
            transformation.init(tensors),
            base,
            self._train,
            config=self._config,
            transformation=transformation,
        )
        hidden, inputs = before
        after = llama.hidden_states(base, self._held_out.inputs, self._config, stepped)
        moved = after.astype(jnp.float32) - hidden.astype(jnp.float32)
        modules = {}
        for name, own in read_step(stepped, inputs, self._square_sum).items():
            modules[name] = jnp.sqrt(own.output / self._entries(stepped.params[name]["lora_B"].shape[1]))
        # The unembedding is linear: the change of the logits is the unembedding of the change.
        return modules, self._rms(moved), self._rms(llama.unembed(base, moved, self._config))

    def _square_sum(self, values: Float[Array, "b s n"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(self._real[..., None], jnp.square(values), jnp.zeros((), jnp.float32)))

    def _entries(self, width: int) -> Float[Array, ""]:
        """How many numbers of the real tokens, ``width`` each."""
        return jnp.sum(self._real).astype(jnp.float32) * width

    def _rms(self, values: Float[Array, "b s n"]) -> Float[Array, ""]:
        """Root mean square over the real tokens and the last axis."""
        return jnp.sqrt(self._square_sum(values) / self._entries(values.shape[-1]))
