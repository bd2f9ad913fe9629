"""Batches of random tokens, and training steps on them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rora_theory.lab import adapters
from rora_theory.lab.adapters.lora import assemble_lora
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.llama import abstract_params


def batch(rows: int = 8, width: int = 16, seed: int = 0, vocabulary: int = 128) -> Batch:
    """Return rows of 5 to ``width`` random tokens, padded with zeros."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, vocabulary, (rows, width + 1)).astype(np.int32)
    weights = (np.arange(width) < random.integers(5, width + 1, (rows, 1))).astype(np.float32)
    mask = weights.astype(np.int32)
    return Batch(tokens[:, :-1] * mask, tokens[:, 1:] * mask, weights, None)


class Trained(NamedTuple):
    """Result of `train`.

    Attributes:
      metrics: Metrics of each step, as numbers.
      weights: Trained arrays after each step.
      adapter: Adapter before the first step.
      state: State after the last step, where the layout places it.
      base: Weights of the base model, where the layout places them.
      step: Compiled step.
    """

    metrics: list[steps.StepMetrics]
    weights: list[Any]
    adapter: Any
    state: steps.State
    base: Any
    step: Any

    @property
    def losses(self) -> list[float]:
        """Return the loss of each step."""
        return [metrics.loss for metrics in self.metrics]

    @property
    def norms(self) -> list[float]:
        """Return the gradient norm of each step."""
        return [metrics.grad_norm for metrics in self.metrics]


def start(params: Any, model: Any, config: Any, *, noise: float = 0.0) -> Any:
    """Return a fresh adapter, with noise where no gradient may be zero although lora_B starts at zero."""
    fresh = config.adapter().build(jax.random.key(1), model, params)
    key = jax.random.key(2)
    noisy = jax.tree.map(lambda a: a + noise * jax.random.normal(key, a.shape), fresh.params)
    return fresh.replace(noisy)


def trace(model: Any, config: Any, width: int, layout: Any = None) -> Any:
    """Return the traced step of a run on abstract arrays, which take no memory.

    Args:
      model: Configuration of the base model.
      config: Fine-tuning configuration.
      width: Number of positions per row.
      layout: Layout over several devices; None is one device.
    """
    base = abstract_params(model, jnp.dtype(config.dtype), config.quantization)
    key = jax.random.key(0)
    dense = abstract_params(model, jnp.dtype(config.dtype))
    shapes = jax.eval_shape(lambda base: config.adapter().build(key, model, base), dense)
    adapter = shapes
    if isinstance(shapes, adapters.LoraAdapter):  # the scaling factors stay concrete numbers
        adapter = assemble_lora(shapes.config, shapes.targets, shapes.params)
    optimizer = steps.finetune_optimizer(config, 1)
    state = jax.eval_shape(lambda params: steps.init_state(adapter.replace(params), optimizer, key), adapter.params)
    integers = jax.ShapeDtypeStruct((config.batch_size, width), jnp.int32)
    batch = Batch(integers, integers, jax.ShapeDtypeStruct(integers.shape, jnp.float32), None)
    shardings = None
    if layout is not None:
        shardings = layout.shardings(state)
        base = _with_shardings(base, layout.shardings(base))
        state = _with_shardings(state, shardings)
        batch = _with_shardings(batch, jax.tree.map(lambda _: layout.rows, batch))
    return steps.train_step(adapter, model, config, 1, state_shardings=shardings).trace(state, base, batch)


def lower(model: Any, config: Any, width: int, layout: Any = None) -> Any:
    """Return the lowered step of `trace`."""
    return trace(model, config, width, layout).lower()


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def train(
    params: Any,
    model: Any,
    config: Any,
    batches: list[Batch],
    layout: Any = None,
    *,
    adapter: Any = None,
    schedule: int | None = None,
) -> Trained:
    """Take a step on each batch.

    Args:
      params: Weights of the base model.
      model: Configuration of the base model.
      config: Fine-tuning configuration.
      batches: Batch of each step.
      layout: Layout over several devices; None trains on one.
      adapter: Adapter to train; None starts a fresh one.
      schedule: Number of steps of the learning-rate schedule; None takes that of the batches.
    """
    base, total = params if layout is None else layout.place(params), schedule or len(batches)
    adapter = start(base, model, config) if adapter is None else adapter
    state = steps.init_state(adapter, steps.finetune_optimizer(config, total), jax.random.key(3))
    place, shardings = lambda batch: batch, None
    if layout is not None:
        shardings, place, state = layout.shardings(state), layout.batch, layout.place(state)
    step = steps.train_step(adapter, model, config, total, state_shardings=shardings)
    metrics, weights = [], []
    for item in batches:
        before = state
        state, measured = step(state, base, place(item))
        assert all(a.is_deleted() for a in jax.tree.leaves((before.params, before.optimizer))), "memory is reused"
        metrics.append(jax.tree.map(float, measured))
        weights.append(jax.tree.map(np.array, state.params))  # copies: a view would keep the memory from reuse
    assert not any(a.is_deleted() for a in jax.tree.leaves((adapter.params, base))), "the arguments stay"
    return Trained(metrics, weights, adapter, state, base, step)
