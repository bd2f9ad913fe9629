"""The jitted training and validation steps: gradients in the adapter alone, the base frozen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rora_theory import adapters, llama
from rora_theory.adapters.base import TrainableAdapter
from rora_theory.data.batches import Batch
from rora_theory.finetune.config import FinetuneConfig
from rora_theory.finetune.loss import LOGITS_BYTES, cross_entropy
from rora_theory.llama import LlamaConfig

Params = Any
"""A pytree of arrays."""


class State(NamedTuple):
    """What a step changes. A pytree.

    Attributes:
      step: steps taken.
      params: the adapter's trainable arrays, float32.
      optimizer: optax's state.
      key: of the dropout; the key of step t is ``fold_in(key, t)``, so it never changes.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState
    key: PRNGKeyArray


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
      loss: mean over the batch's targets, before the update.
      grad_norm: norm of the gradient before clipping.
      learning_rate: of this step's update.
      targets: number of targets.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]


def schedule(config: FinetuneConfig, steps: int, peak: float | Array | None = None) -> optax.Schedule:
    r"""Return the learning rate of update t = 0, 1, ... as an optax schedule.

    The rate rises as ``peak * t / warmup``. After the warm-up it is constant, or decays to 0 at t = ``steps``, one
    after the last update: linearly, or as :math:`(1 + \cos(\pi u)) / 2` of the peak, u being the completed share of the
    decay. The first update's rate is 0, as in the published runs.

    Args:
      config: Fine-tuning configuration.
      steps: Number of optimizer steps of the whole run.
      peak: Learning rate at the end of the warm-up; None reads it from ``config``. It may be traced, so that it can be
        an argument of a compiled step.
    """
    peak = config.peak_learning_rate if peak is None else peak
    rise = optax.linear_schedule(0.0, peak, config.warmup)
    if config.schedule == "constant":
        rest = optax.constant_schedule(peak)  # an array too
    elif config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(1, steps - config.warmup))
    else:
        rest = optax.linear_schedule(peak, 0.0, max(1, steps - config.warmup))
    return optax.join_schedules([rise, rest], [config.warmup]) if config.warmup else rest


def finetune_optimizer(
    config: FinetuneConfig, steps: int, peak: float | Array | None = None
) -> optax.GradientTransformation:
    """Return the optimizer: clipping by the global norm, then AdamW with decoupled weight decay on `schedule`."""
    rate = schedule(config, steps, peak)
    chain = [
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, *config.betas, eps=config.epsilon, weight_decay=config.weight_decay),
    ]
    if config.lr_multiplier_A != 1:
        # AdamW's update is proportional to the rate, its weight decay included, so scaling the update is a parameter
        # group with a learning rate of its own.
        chain.append(optax.masked(optax.scale(config.lr_multiplier_A), _is_lora_A))
    return optax.chain(*chain)


def _is_lora_A(params: Params) -> Params:
    """Return a mask over the trainable parameters that is true for the leaves of lora_A."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path[-1:]) == "['lora_A']", params)


def init_state(adapter: TrainableAdapter, transformation: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state before the first step; its arrays are the adapter's own copies, free to be donated."""
    params = jax.tree.map(jnp.copy, adapters.trainable(adapter))
    return State(jnp.zeros((), jnp.int32), params, transformation.init(params), key)


def train_step(
    adapter: TrainableAdapter,
    llama_config: LlamaConfig,
    config: FinetuneConfig,
    steps: int,
    *,
    attention: str = "auto",
    logits_bytes: int = LOGITS_BYTES,
    state_shardings: Any = None,
) -> jax.stages.Wrapped:
    """The jitted function ``(state, base, batch) -> (state, metrics)``; it takes the old state's memory.

    The loss is the sum over the batch's targets divided by their number, also where the batch is worked in
    several parts: accumulation changes rounding and memory, nothing else.

    Args:
      adapter: gives the structure, the scaling and the application; its trainable arrays are not read.
      llama_config: the base's configuration.
      config: the run.
      steps: length of the learning-rate schedule.
      attention: implementation, see `rora_theory.llama.attention.choose_route`.
      logits_bytes: see `cross_entropy`.
      state_shardings: where the new state lies, see `rora_theory.finetune.sharding`; None is where the old one does
        on a single device.
    """
    take = _step(llama_config, config, steps, attention=attention, logits_bytes=logits_bytes)

    def step(state: State, base: Params, batch: Batch) -> tuple[State, StepMetrics]:
        return take(state, base, batch, adapter, None)

    return _jit(step, state_shardings)


def _jit(function: Callable[..., Any], state_shardings: Any = None) -> jax.stages.Wrapped:
    """Compiled a shape; the first argument's memory goes to the first result."""
    if state_shardings is None:
        return jax.jit(function, donate_argnums=0)
    return jax.jit(function, donate_argnums=0, out_shardings=(state_shardings, None))


class SharedSteps:
    """Training steps compiled once for all runs that differ in the scaling, the learning rate and the seed alone.

    A step of `train_step` holds these as constants. Here they are arguments: LoRA and RoRA of one rank, at any alpha
    and rate, run the same compiled step.
    """

    def __init__(self) -> None:
        self._made: dict[str, jax.stages.Wrapped] = {}

    def train_step(
        self,
        adapter: TrainableAdapter,
        llama_config: LlamaConfig,
        config: FinetuneConfig,
        steps: int,
        *,
        attention: str = "auto",
        logits_bytes: int = LOGITS_BYTES,
    ) -> Callable[[State, Params, Batch], tuple[State, StepMetrics]]:
        """``(state, base, batch) -> (state, metrics)`` of one device; arguments as `train_step`."""
        scaling: dict[str, Any] = {"rule": "lora", "alpha": 1.0, "alpha_pattern": {}}
        plain = replace(config, lr=1.0, seed=0, **(scaling if config.method in ("lora", "dora") else {}))
        nothing = jax.tree.map(lambda _: None, adapters.trainable(adapter))
        fixed, structure = jax.tree.flatten(adapters.replace(adapter, nothing))
        # The adapter may be of other settings than the run's, which its structure holds: all but the scaling counts.
        own = adapter.config
        own = replace(own, **scaling) if isinstance(own, adapters.LoraConfig) else own
        key = repr((plain, own, llama_config, steps, attention, logits_bytes, type(adapter), len(fixed)))
        if key not in self._made:
            take = _step(llama_config, plain, steps, attention=attention, logits_bytes=logits_bytes)

            def shared(state: State, base: Params, batch: Batch, fixed: list[Array], peak: Array) -> Any:
                return take(state, base, batch, jax.tree.unflatten(structure, fixed), peak)

            self._made[key] = _jit(shared)
        function, peak = self._made[key], jnp.float32(config.peak_learning_rate)
        return lambda state, base, batch: function(state, base, batch, fixed, peak)

    @property
    def compilations(self) -> int:
        """Programs compiled so far, each for one shape of batch and one rank."""
        return sum(function._cache_size() for function in self._made.values())  # type: ignore[attr-defined]


def _step(
    llama_config: LlamaConfig, config: FinetuneConfig, steps: int, *, attention: str, logits_bytes: int
) -> Callable[[State, Params, Batch, TrainableAdapter, Array | None], tuple[State, StepMetrics]]:
    """One step, to be compiled: ``(state, base, batch, adapter, peak)``, where the adapter's trainable arrays are not
    read, and ``peak`` is the learning rate at the end of the warm-up, None the configuration's.
    """

    def part_loss(
        params: Params, base: Params, adapter: TrainableAdapter, part: Batch, total: Array, key: Array | None
    ) -> Array:
        summed = batch_loss(
            base,
            part,
            llama_config,
            adapters.replace(adapter, params),
            key=key,
            remat=config.remat,
            attention=attention,
            logits_bytes=logits_bytes,
        )
        return summed / total

    def gradient(state: State, base: Params, adapter: TrainableAdapter, batch: Batch) -> tuple[Array, Params, Array]:
        total = jnp.maximum(jnp.sum(batch.weights), 1)
        key = jax.random.fold_in(state.key, state.step) if config.dropout else None
        value_and_grad = jax.value_and_grad(part_loss)
        if config.accumulation == 1:
            return *value_and_grad(state.params, base, adapter, batch, total, key), total

        def add(sums: tuple[Array, Params], xs: tuple[Batch, Array]) -> tuple[tuple[Array, Params], None]:
            part, index = xs
            part_key = None if key is None else jax.random.fold_in(key, index)
            found = value_and_grad(state.params, base, adapter, part, total, part_key)
            return jax.tree.map(jnp.add, sums, found), None

        parts = jax.tree.map(lambda a: a.reshape(-1, config.accumulation, *a.shape[1:]).swapaxes(0, 1), batch)
        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        sums, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(config.accumulation)))
        return *sums, total

    def step(
        state: State, base: Params, batch: Batch, adapter: TrainableAdapter, peak: Array | None
    ) -> tuple[State, StepMetrics]:
        loss, grads, total = gradient(state, base, adapter, batch)
        transformation, rate = finetune_optimizer(config, steps, peak), schedule(config, steps, peak)
        # Optax leans on type promotion; this package's own code passes under the strict rules too.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = transformation.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics = StepMetrics(loss, optax.tree.norm(grads), jnp.float32(rate(state.step)), total)
        return State(state.step + 1, params, moments, state.key), metrics

    return step


def eval_step(
    adapter: TrainableAdapter,
    llama_config: LlamaConfig,
    *,
    attention: str = "auto",
    logits_bytes: int = LOGITS_BYTES,
) -> jax.stages.Wrapped:
    """The jitted function ``(params, base, batch) -> (summed loss, number of targets)``, without dropout."""

    def evaluate(params: Params, base: Params, batch: Batch) -> tuple[Array, Array]:
        adapted = adapters.replace(adapter, params)
        summed = batch_loss(base, batch, llama_config, adapted, attention=attention, logits_bytes=logits_bytes)
        return summed, jnp.sum(batch.weights)

    return jax.jit(evaluate)


def batch_loss(
    base: Params,
    batch: Batch,
    llama_config: LlamaConfig,
    adapter: TrainableAdapter,
    *,
    key: PRNGKeyArray | None = None,
    remat: bool | str = False,
    attention: str = "auto",
    logits_bytes: int = LOGITS_BYTES,
) -> Float[Array, ""]:
    """Cross-entropy summed over a batch's targets. Differentiable in the adapter; the base gets no gradient.

    Batches are padded on the right, where causal attention does not look: no mask is needed.
    """
    # Weights enter as constants of the gradient, so that no backward product is made for them.
    base = jax.lax.stop_gradient(base)
    hidden = llama.hidden_states(base, batch.inputs, llama_config, adapter, key=key, remat=remat, attention=attention)
    if batch.positions is not None:
        hidden = jnp.take_along_axis(hidden, batch.positions[..., None], axis=1)
    head = llama.output_matrix(base, llama_config)
    return cross_entropy(hidden, head, batch.targets, batch.weights, logits_bytes=logits_bytes)
