"""The rms of a first step in a real layer, its data held fixed: measured from drawn adapters, and by the law."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits
from rora_theory.inits import Init
from rora_theory.measure.layers.layer_data import SPLITS, Layer
from rora_theory.optimizers import EPSILON, make_optimizer
from rora_theory.random.draws import draw_A
from rora_theory.stats.estimate import Estimate, root
from rora_theory.stats.moments import Moments
from rora_theory.theory import first_step, laws
from rora_theory.theory.laws import Optimizer

_DRAW_ROWS = 4096
"""Rows of A that a block draws (all its adapters together), at least one adapter."""

_LEAST_DRAWS = 64
"""Adapters before a standard error is trusted to end a run."""

Step = tuple[laws.Optimizer, float]
"""Optimizer and scaling gamma."""


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
    """Without end, blocks of adapters: the mean of w_i^2 over tokens and outputs after one step of each adapter.

    Every adapter is drawn, its loss <G, dM> differentiated, stepped with optax and read at the layer's inputs.

    Args:
      layer: gradient and inputs.
      key: of the stream; block i draws from ``fold_in(key, i)``.
      rank: of the adapters.
      steps: optimizer and scaling gamma of each first step that is taken from one drawn A.
      learning_rate, init, epsilon: of the step.
    """
    adapters = max(1, _DRAW_ROWS // rank)
    data = jax.device_put((layer.grad, tuple(layer.inputs[split] for split in SPLITS)))
    scalings = tuple(jnp.float32(scaling) for _, scaling in steps)
    names = tuple(name for name, _ in steps)
    block = 0
    ahead = None
    while True:
        following = _block(
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
        if ahead is not None:
            yield np.asarray(ahead, np.float64)
        ahead, block = following, block + 1


@partial(jax.jit, static_argnames=("names", "rank", "adapters", "init", "epsilon"))
def _block(
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
    p_out, p_in = grad.shape
    optimizers = {name: make_optimizer(name, learning_rate, epsilon=epsilon) for name in set(names)}

    def one(adapter_key: PRNGKeyArray) -> Array:
        lora_A = draw_A(adapter_key, init, rank=rank, p_in=p_in)
        found = []
        for name, scaling in zip(names, scalings, strict=True):
            step = first_step.run(
                lambda dm: dm.inner(grad), lora_A, p_out=p_out, scaling=scaling, optimizer=optimizers[name]
            )
            found.append(jnp.stack([_mean_square(step, x) for x in inputs]))
        return jnp.stack(found)

    return jax.vmap(one)(jax.random.split(key, adapters))


def _mean_square(step: first_step.Increment, x: Float[Array, "tokens p_in"]) -> Float[Array, ""]:
    """Mean of w_i^2 over tokens and outputs, w = gamma B A x.

    At a low rank sum w^2 = gamma^2 <(A X^T)(A X^T)^T, B^T B> costs less than w itself, which is tokens x p_out numbers.
    """
    (tokens, p_out), rank = (x.shape[0], step.lora_B.shape[0]), step.lora_A.shape[0]
    if rank * (tokens + p_out) >= tokens * p_out:
        return jnp.mean(step(x) ** 2)
    inner = jnp.einsum("ti,ri->tr", x, step.lora_A)
    grams = jnp.vdot(jnp.einsum("tr,ts->rs", inner, inner), jnp.einsum("or,os->rs", step.lora_B, step.lora_B))
    return step.scaling**2 * grams / (tokens * p_out)


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
    """Rms of w_i over adapters, tokens and outputs, for each step and, within it, each of `SPLITS`; adapters drawn.

    Args:
      layer: gradient and inputs.
      key: of the stream of adapters.
      rank, steps, learning_rate, init, epsilon: see `mean_squares`.
      relative_error: adapters are drawn until every rms has this relative standard error or less.
      draws: draw exactly as many adapters instead.
    """
    columns = len(steps) * len(SPLITS)
    stream = mean_squares(layer, key, rank=rank, steps=steps, learning_rate=learning_rate, init=init, epsilon=epsilon)
    moments = [Moments()] * columns
    for block in stream:
        flat = block.reshape(len(block), columns)
        if draws is not None:
            flat = flat[: draws - moments[0].count]
        moments = [total.add(flat[:, column]) for column, total in enumerate(moments)]
        if draws is not None and moments[0].count >= draws:
            break
        worst = max(total.mean.error / total.mean.value for total in moments) / 2
        if draws is None and moments[0].count >= _LEAST_DRAWS and worst <= relative_error:
            break
    return [root(total.mean) for total in moments], moments[0].count


def exact_rms(
    layer: Layer, step: Step, *, rank: int, learning_rate: float, init: Init, epsilon: float = EPSILON
) -> list[float]:
    """The law's rms of w for each of `SPLITS`."""
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
    ends = np.cumsum([len(layer.inputs[split]) for split in SPLITS])[:-1]
    return [math.sqrt(float(np.mean(part))) for part in np.split(law.second_moment, ends)]


class CrossingRanks(NamedTuple):
    """A layer's crossing rank (signal and cross-talk summed over tokens), and its quartiles over tokens."""

    crossing_rank: float
    lower_quartile: float
    median: float
    upper_quartile: float


def crossing(layer: Layer, split: str, optimizer: laws.Optimizer) -> CrossingRanks:
    """The crossing rank of a layer on the tokens of a split."""
    x = layer.inputs[split]
    ranks = laws.crossing_rank(layer.grad, x, optimizer=optimizer)
    weight = np.sum(np.float64(x) ** 2, axis=1)
    offset = 0.0 if optimizer == "sgd" else 1.0
    total = offset + float(np.sum(weight) / np.sum(weight / (ranks - offset)))
    low, middle, high = (float(value) for value in np.quantile(ranks, [0.25, 0.5, 0.75]))
    return CrossingRanks(total, low, middle, high)
