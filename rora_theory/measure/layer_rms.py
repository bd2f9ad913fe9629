"""The rms of a first step in a real layer, its data held fixed: measured from drawn adapters, and by the law."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from rora_theory.inits import Init
from rora_theory.measure import layer_data
from rora_theory.measure.layer_data import SPLITS, Layer
from rora_theory.stats.estimate import Estimate, root
from rora_theory.stats.moments import Moments
from rora_theory.theory import laws

EPSILON = 1e-8
"""Adam's epsilon, PyTorch's and optax's default."""

_LEAST_DRAWS = 64
"""Adapters before a standard error is trusted to end a run."""

Step = tuple[laws.Optimizer, float]
"""Optimizer and scaling gamma."""


def stream_key(seed: int, name: str) -> PRNGKeyArray:
    """The key of the stream of adapters with this name."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest[:4], "little"))


def measured(
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
      rank, steps, learning_rate, init, epsilon: see `layer_data.mean_squares`.
      relative_error: adapters are drawn until every rms has this relative standard error or less.
      draws: draw exactly as many adapters instead.
    """
    columns = len(steps) * len(SPLITS)
    stream = layer_data.mean_squares(
        layer, key, rank=rank, steps=steps, learning_rate=learning_rate, init=init, epsilon=epsilon
    )
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


def exact(
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


class Crossing(NamedTuple):
    """A layer's crossing rank (signal and cross-talk summed over tokens), and its quartiles over tokens."""

    crossing_rank: float
    lower_quartile: float
    median: float
    upper_quartile: float


def crossing(layer: Layer, split: str, optimizer: laws.Optimizer) -> Crossing:
    """The crossing rank of a layer on the tokens of a split."""
    x = layer.inputs[split]
    ranks = laws.crossing_rank(layer.grad, x, optimizer=optimizer)
    weight = np.sum(np.float64(x) ** 2, axis=1)
    offset = 0.0 if optimizer == "sgd" else 1.0
    total = offset + float(np.sum(weight) / np.sum(weight / (ranks - offset)))
    low, middle, high = (float(value) for value in np.quantile(ranks, [0.25, 0.5, 0.75]))
    return Crossing(total, low, middle, high)
