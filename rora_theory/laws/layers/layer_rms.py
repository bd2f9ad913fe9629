"""Root mean square of a first step in a real layer with fixed data, measured from drawn adapters and by the law."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits, laws
from rora_theory.inits import Init
from rora_theory.laws.first_step import take_first_step
from rora_theory.laws.layers.layer_data import SPLITS, Layer
from rora_theory.laws.random.draws import draw_A
from rora_theory.optimizers import EPSILON, Optimizer, make_optimizer
from rora_theory.stats.estimate import Estimate, square_root
from rora_theory.stats.moments import Moments

_BLOCK_ROWS = 4096
"""Number of rows of A in a block, over all its adapters; a block has at least one adapter."""

_MIN_DRAWS = 64
"""Number of adapters before the standard error is accurate enough to stop."""

Step = tuple[Optimizer, float]
"""Optimizer and scaling gamma of a first step."""


def mean_squares(
    layer: Layer,
    key: PRNGKeyArray,
    *,
    rank: int,
    steps: Sequence[tuple[Optimizer, float]],
    learning_rate: float,
    init: inits.Init,
    epsilon: float,
) -> Iterator[Float[np.ndarray, "adapters steps splits"]]:
    """Draw adapters, step them with optax, and compute the mean of w_i^2 over tokens and outputs of each.

    The gradient of each adapter comes from automatic differentiation of the loss <G, dM>.

    Args:
      layer: Gradient and inputs.
      key: Key of the stream; block i draws from ``fold_in(key, i)``.
      rank: Rank of the adapters.
      steps: Optimizer and scaling gamma of each first step, all from the same A.
      learning_rate: Learning rate of the step.
      init: Initialisation of A.
      epsilon: Adam's epsilon.

    Yields:
      Blocks of adapters without end.
    """
    # Copy the data to the device once. The scalings are dynamic arguments, so that other scalings reuse the program.
    adapters = max(1, _BLOCK_ROWS // rank)
    data = jax.device_put((layer.grad, tuple(layer.inputs[split] for split in SPLITS)))
    scalings = tuple(jnp.float32(scaling) for _, scaling in steps)
    names = tuple(name for name, _ in steps)
    block = 0
    # Dispatch the next block before waiting for the current one, so that the device is never idle.
    current = None
    while True:
        following = _step_by_autodiff(
            jax.random.fold_in(key, block),
            *data,
            scalings,
            jnp.float32(learning_rate),
            names=names,
            rank=rank,
            adapters=adapters,
            init=init,
            epsilon=epsilon,
        )
        if current is not None:
            yield np.asarray(current, np.float64)
        current, block = following, block + 1


@partial(jax.jit, static_argnames=("names", "rank", "adapters", "init", "epsilon"))
def _step_by_autodiff(
    key: PRNGKeyArray,
    grad: Array,
    inputs: tuple[Array, ...],
    scalings: tuple[Array, ...],
    learning_rate: Array,
    *,
    names: tuple[Optimizer, ...],
    rank: int,
    adapters: int,
    init: inits.Init,
    epsilon: float,
) -> Float[Array, "adapters steps splits"]:
    """Draw adapters and step each by automatic differentiation, without a shortcut that the law shares."""
    p_out, p_in = grad.shape
    optimizers = {name: make_optimizer(name, learning_rate, epsilon=epsilon) for name in set(names)}

    def step_adapter(adapter_key: PRNGKeyArray) -> Array:
        lora_A = draw_A(adapter_key, init, rank=rank, p_in=p_in)
        by_step = []
        for name, scaling in zip(names, scalings, strict=True):
            # The loss <G, dM> has G as its gradient in the full weight.
            step = take_first_step(
                lambda dm: dm.inner(grad), lora_A, p_out=p_out, scaling=scaling, optimizer=optimizers[name]
            )
            # The change at a token is B times the scaled A x.
            inner = [step.scaling * jnp.einsum("ti,ri->tr", x, step.lora_A) for x in inputs]
            by_step.append(jnp.stack([mean_square(step.lora_B, product) for product in inner]))
        return jnp.stack(by_step)

    return jax.vmap(step_adapter)(jax.random.split(key, adapters))


def mean_square(lora_B: Float[Array, "p_out r"], inner: Float[Array, "tokens r"]) -> Float[Array, ""]:
    """Compute the mean of w_i^2 over tokens and outputs, w = B (gamma A x).

    Args:
      lora_B: Factor B after the step.
      inner: gamma A x of every token.

    Returns:
      The mean square as a scalar.
    """
    (p_out, rank), tokens = lora_B.shape, inner.shape[0]
    # At a low rank the Gram matrices of B and of gamma A x cost less than w itself.
    if rank * (tokens + p_out) >= tokens * p_out:
        return jnp.mean(jnp.einsum("or,tr->to", lora_B, inner) ** 2)
    # |w|^2 summed over tokens is tr(B^T B (A x)^T (A x)), with two matrices of shape [r, r].
    grams = jnp.vdot(jnp.einsum("tr,ts->rs", inner, inner), jnp.einsum("or,os->rs", lora_B, lora_B))
    return grams / (tokens * p_out)


def measured_rms(
    layer: Layer,
    key: PRNGKeyArray,
    *,
    rank: int,
    steps: Sequence[Step],
    learning_rate: float,
    init: Init,
    relative_error: float,
    draws: int | None = None,
    epsilon: float = EPSILON,
) -> tuple[list[Estimate], int]:
    """Measure the rms of w_i over drawn adapters, tokens and outputs.

    Args:
      layer: Gradient and inputs.
      key: Key of the stream of adapters.
      rank: Rank of the adapters.
      steps: Optimizer and scaling gamma of each first step.
      learning_rate: Learning rate of the step.
      init: Initialisation of A.
      relative_error: Relative standard error of every rms at which to stop.
      draws: Exact number of adapters to draw instead; None draws to ``relative_error``.
      epsilon: Adam's epsilon.

    Returns:
      The rms for each step and, within a step, each of `SPLITS`, and the number of adapters.
    """
    columns = len(steps) * len(SPLITS)
    stream = mean_squares(layer, key, rank=rank, steps=steps, learning_rate=learning_rate, init=init, epsilon=epsilon)
    moments = [Moments()] * columns
    for block in stream:
        squares = block.reshape(len(block), columns)  # a column for each step and split
        # With a fixed number of adapters, use only the first ones of the last block.
        if draws is not None:
            squares = squares[: draws - moments[0].count]
        moments = [total.add(squares[:, column]) for column, total in enumerate(moments)]
        if draws is not None and moments[0].count >= draws:
            break
        # The relative error of a root is half that of the mean square.
        largest_error = max(total.mean.error / total.mean.value for total in moments) / 2
        if draws is None and moments[0].count >= _MIN_DRAWS and largest_error <= relative_error:
            break
    return [square_root(total.mean) for total in moments], moments[0].count


def exact_rms(
    layer: Layer, step: Step, *, rank: int, learning_rate: float, init: Init, epsilon: float = EPSILON
) -> list[float]:
    """Compute the law's rms of w for each of `SPLITS`."""
    optimizer, scaling = step
    law = laws.first_step_moments(
        layer.grad,
        np.concatenate([layer.inputs[split] for split in SPLITS]),
        rank=rank,
        scaling=scaling,
        learning_rate=learning_rate,
        optimizer=optimizer,
        init=init,
        epsilon=epsilon,
    )
    # Divide the moments of all tokens into those of the splits.
    ends = np.cumsum([len(layer.inputs[split]) for split in SPLITS])[:-1]
    return [math.sqrt(float(np.mean(part))) for part in np.split(law.second_moment, ends)]


class CrossingRanks(NamedTuple):
    """Crossing rank of a layer.

    Attributes:
      crossing_rank: Rank at which signal and cross-talk, summed over tokens, are equal.
      lower_quartile: Lower quartile of the tokens' crossing ranks.
      median: Median of the tokens' crossing ranks.
      upper_quartile: Upper quartile of the tokens' crossing ranks.
    """

    crossing_rank: float
    lower_quartile: float
    median: float
    upper_quartile: float


def crossing(layer: Layer, split: str, optimizer: Optimizer) -> CrossingRanks:
    """Compute the crossing rank of a layer at the tokens of a split."""
    x = layer.inputs[split]
    ranks = laws.crossing_rank(layer.grad, x, optimizer=optimizer)
    # Cross-talk is proportional to |x|^2, and the signal to |x|^2 / (r* - offset): sum both over tokens.
    input_squares = np.sum(np.float64(x) ** 2, axis=1)
    offset = 0.0 if optimizer == "sgd" else 1.0
    pooled = offset + float(np.sum(input_squares) / np.sum(input_squares / (ranks - offset)))
    low, middle, high = (float(value) for value in np.quantile(ranks, [0.25, 0.5, 0.75]))
    return CrossingRanks(pooled, low, middle, high)
