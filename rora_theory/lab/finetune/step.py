"""The jitted training and validation steps. Only the adapter is differentiated; the base model is frozen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rora_theory.lab import adapters, llama
from rora_theory.lab.adapters.base import TrainableAdapter
from rora_theory.lab.adapters.whole import WholeModel
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.finetune.loss import cross_entropy, cross_entropy_of_trained_head
from rora_theory.lab.llama import LlamaConfig
from rora_theory.optimizers import schedule_factor

Params = Any
"""A pytree of arrays."""


class State(NamedTuple):
    """Training state, a pytree that each step replaces.

    Attributes:
      step: Number of completed steps.
      params: Trainable arrays of the adapter, in float32.
      optimizer: State of the optax optimizer.
      key: Dropout key. It never changes: step t uses ``fold_in(key, t)``.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState
    key: PRNGKeyArray


class StepMetrics(NamedTuple):
    """Scalar metrics of one step, on the device.

    Attributes:
      loss: Mean loss over the batch's targets, before the update.
      grad_norm: Norm of the gradient before clipping.
      learning_rate: Learning rate of this step's update.
      targets: Number of target tokens in the batch.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]


def schedule(config: FinetuneConfig, steps: int, peak: float | Array | None = None) -> optax.Schedule:
    """Return the learning rate of update t = 0, 1, ... as an optax schedule, see `rora_theory.optimizers`.

    The first update's rate is 0 with a warm-up, as in the published runs.

    Args:
      steps: Number of optimizer steps of the whole run.
      peak: Learning rate at the end of the warm-up; None reads it from ``config``. It may be traced, so that it can be
        an argument of a compiled step.
    """
    peak = config.peak_learning_rate if peak is None else peak
    return lambda step: peak * schedule_factor(config.schedule, jnp.asarray(step), steps=steps, warmup=config.warmup)


def finetune_optimizer(
    config: FinetuneConfig, steps: int, peak: float | Array | None = None
) -> optax.GradientTransformation:
    """Return the optimizer: clipping by the global norm, then AdamW with decoupled weight decay on `schedule`.

    Args:
      steps: Number of optimizer steps of the whole run.
      peak: Learning rate at the end of the warm-up; None reads it from ``config``.
    """
    rate = schedule(config, steps, peak)
    chain = [
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, *config.betas, eps=config.epsilon, weight_decay=config.weight_decay),
    ]
    if config.lr_multiplier_A != 1:
        # AdamW's update, weight decay included, is proportional to the learning rate. Scaling the update of lora_A is
        # therefore the same as a separate learning rate for it.
        chain.append(optax.masked(optax.scale(config.lr_multiplier_A), _is_lora_A))
    return optax.chain(*chain)


def _is_lora_A(params: Params) -> Params:
    """Return a mask over the trainable parameters that is true for the leaves of lora_A."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path[-1:]) == "['lora_A']", params)


def init_state(adapter: TrainableAdapter, transformation: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """Return the state before the first step; its arrays are copies, so that they can be donated."""
    params = jax.tree.map(jnp.copy, adapter.params)
    return State(jnp.zeros((), jnp.int32), params, transformation.init(params), key)


def train_step(
    adapter: TrainableAdapter,
    llama_config: LlamaConfig,
    config: FinetuneConfig,
    steps: int,
    *,
    state_shardings: Any = None,
) -> jax.stages.Wrapped:
    """Return the jitted function ``(state, base, batch) -> (state, metrics)``, which donates the old state.

    The loss is the sum over the batch's targets divided by their number. Gradient accumulation computes the same loss:
    it changes rounding and memory only.

    Args:
      adapter: Adapter that provides the structure, the scaling and the forward pass; its trainable arrays are not read.
      steps: Number of optimizer steps in the learning-rate schedule.
      state_shardings: Shardings of the new state, see `lab.finetune.sharding`; None keeps it on the device of
        the old state.
    """
    update = _make_step(llama_config, config, steps)

    def step(state: State, base: Params, batch: Batch) -> tuple[State, StepMetrics]:
        return update(state, base, batch, adapter, None)

    return _jit(step, state_shardings)


def _jit(function: Callable[..., Any], state_shardings: Any = None) -> jax.stages.Wrapped:
    """Jit a step whose new state reuses the memory of the old one."""
    if state_shardings is None:
        return jax.jit(function, donate_argnums=0)
    return jax.jit(function, donate_argnums=0, out_shardings=(state_shardings, None))


class SharedSteps:
    """Cache of compiled training steps, shared by runs that differ only in scaling, learning rate and seed.

    The step of `train_step` holds these as constants. Here they are arguments: LoRA and RoRA of the same rank, at any
    alpha and learning rate, use the same compiled step.
    """

    def __init__(self) -> None:
        self._jitted: dict[str, jax.stages.Wrapped] = {}

    def train_step(
        self,
        adapter: TrainableAdapter,
        llama_config: LlamaConfig,
        config: FinetuneConfig,
        steps: int,
    ) -> Callable[[State, Params, Batch], tuple[State, StepMetrics]]:
        """Return the function ``(state, base, batch) -> (state, metrics)`` on a single device.

        Args:
          adapter: Adapter that provides the structure, the scaling and the forward pass.
          steps: Number of optimizer steps in the learning-rate schedule.
        """
        # The compiled step reads neither scaling, learning rate nor seed from its configuration.
        scaling: dict[str, Any] = {"rule": "lora", "alpha": 1.0, "alpha_pattern": {}}
        shared_config = replace(config, lr=1.0, seed=0, **(scaling if config.method in ("lora", "dora") else {}))
        # The adapter's arrays that are not trained, the scaling among them, become arguments of the step. With the
        # trained ones replaced by None, they are the only leaves of the tree.
        without_trained = adapter.replace(jax.tree.map(lambda _: None, adapter.params))
        untrained, structure = jax.tree.flatten(without_trained)
        # The adapter's settings may differ from the run's. They are part of the key, except for the scaling.
        adapter_config = adapter.config
        if isinstance(adapter_config, adapters.LoraConfig):
            adapter_config = replace(adapter_config, **scaling)
        key = repr((shared_config, adapter_config, llama_config, steps, type(adapter), len(untrained)))
        # Compile once for each key; scaling and peak rate are passed to every call.
        if key not in self._jitted:
            update = _make_step(llama_config, shared_config, steps)

            def shared_step(state: State, base: Params, batch: Batch, untrained: list[Array], peak: Array) -> Any:
                return update(state, base, batch, jax.tree.unflatten(structure, untrained), peak)

            self._jitted[key] = _jit(shared_step)
        jitted, peak = self._jitted[key], jnp.float32(config.peak_learning_rate)

        def step(state: State, base: Params, batch: Batch) -> tuple[State, StepMetrics]:
            new_state, metrics = jitted(state, base, batch, untrained, peak)
            return new_state, metrics

        return step

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far, one per batch shape and rank."""
        return sum(function._cache_size() for function in self._jitted.values())  # type: ignore[attr-defined]


def _make_step(
    llama_config: LlamaConfig, config: FinetuneConfig, steps: int
) -> Callable[[State, Params, Batch, TrainableAdapter, Array | None], tuple[State, StepMetrics]]:
    """Return the function ``(state, base, batch, adapter, peak) -> (state, metrics)``, which the caller compiles.

    The adapter's trainable arrays are not read. ``peak`` is the learning rate at the end of the warm-up; None reads it
    from ``config``.
    """

    def microbatch_loss(
        params: Params, base: Params, adapter: TrainableAdapter, microbatch: Batch, targets: Array, key: Array | None
    ) -> Array:
        loss_sum = batch_loss(base, microbatch, llama_config, adapter.replace(params), key=key, remat=config.remat)
        # Divided by the targets of the whole batch, so that losses and gradients of microbatches add up.
        return loss_sum / targets

    def gradient(state: State, base: Params, adapter: TrainableAdapter, batch: Batch) -> tuple[Array, Params, Array]:
        """Return the batch's loss, its gradient in the trainable parameters, and the number of targets."""
        # Number of targets: at least 1, so that a batch without targets has loss 0 and not NaN.
        targets = jnp.maximum(jnp.sum(batch.weights), 1)
        # The dropout key depends on the step alone, so a resumed run draws the same masks.
        key = jax.random.fold_in(state.key, state.step) if config.dropout else None
        value_and_grad = jax.value_and_grad(microbatch_loss)
        # Without accumulation, the batch is its own microbatch.
        if config.accumulation == 1:
            return *value_and_grad(state.params, base, adapter, batch, targets, key), targets

        def add(sums: tuple[Array, Params], xs: tuple[Batch, Array]) -> tuple[tuple[Array, Params], None]:
            microbatch, index = xs
            microbatch_key = None if key is None else jax.random.fold_in(key, index)
            loss_and_grads = value_and_grad(state.params, base, adapter, microbatch, targets, microbatch_key)
            return jax.tree.map(jnp.add, sums, loss_and_grads), None

        # Split the rows: [B, ...] becomes [accumulation, B / accumulation, ...]. Microbatch i takes every
        # accumulation-th row from row i on, so that rows which are split over devices stay on their devices.
        microbatches = jax.tree.map(lambda a: a.reshape(-1, config.accumulation, *a.shape[1:]).swapaxes(0, 1), batch)
        # Add up loss and gradient over the microbatches, so that only one microbatch's activations exist at a time.
        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        sums, _ = jax.lax.scan(add, zeros, (microbatches, jnp.arange(config.accumulation)))
        return *sums, targets

    def step(
        state: State, base: Params, batch: Batch, adapter: TrainableAdapter, peak: Array | None
    ) -> tuple[State, StepMetrics]:
        # Loss and gradient of the whole batch.
        loss, grads, targets = gradient(state, base, adapter, batch)
        # Clip the gradient, and update the parameters and AdamW's moments.
        transformation, learning_rate = finetune_optimizer(config, steps, peak), schedule(config, steps, peak)
        # Optax relies on type promotion, which a caller may have disabled with JAX's strict rules.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = transformation.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            # Reported values: the norm before clipping, and the rate of this update.
            grad_norm, rate = optax.tree.norm(grads), jnp.float32(learning_rate(state.step))
            metrics = StepMetrics(loss, grad_norm, rate, targets)
        return State(state.step + 1, params, moments, state.key), metrics

    return step


def eval_step(
    adapter: TrainableAdapter,
    llama_config: LlamaConfig,
) -> jax.stages.Wrapped:
    """Return the jitted function ``(params, base, batch) -> (summed loss, number of targets)``, without dropout.

    Args:
      adapter: Adapter that provides the structure, the scaling and the forward pass; its trainable arrays are not read.
    """

    def evaluate(params: Params, base: Params, batch: Batch) -> tuple[Array, Array]:
        adapted = adapter.replace(params)
        loss_sum = batch_loss(base, batch, llama_config, adapted)
        return loss_sum, jnp.sum(batch.weights)

    return jax.jit(evaluate)


def batch_loss(
    base: Params,
    batch: Batch,
    llama_config: LlamaConfig,
    adapter: TrainableAdapter,
    *,
    key: PRNGKeyArray | None = None,
    remat: bool | str = False,
) -> Float[Array, ""]:
    """Compute the cross-entropy summed over a batch's targets.

    It is differentiable in the adapter; the base gets no gradient. Batches are padded on the right. Causal attention
    never reads later positions, so the padding needs no mask.

    Args:
      key: Dropout key; None disables dropout.
      remat: Rematerialisation in the backward pass, see `rora_theory.lab.llama.hidden_states`.
    """
    # The base is a constant of the gradient, so the backward pass computes no product for its weights. A model that is
    # trained as a whole has no base.
    is_whole = isinstance(adapter, WholeModel)
    base = adapter.params if is_whole else jax.lax.stop_gradient(base)
    hidden = llama.hidden_states(base, batch.inputs, llama_config, adapter, key=key, remat=remat)
    # Keep the hidden states of target positions only: the logits are the largest array of the step.
    if batch.positions is not None:
        hidden = jnp.take_along_axis(hidden, batch.positions[..., None], axis=1)
    head = llama.output_matrix(base, llama_config)
    if is_whole:
        return cross_entropy_of_trained_head(hidden, head, batch.targets, batch.weights)
    return cross_entropy(hidden, head, batch.targets, batch.weights)
