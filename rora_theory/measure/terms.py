r"""Which regime a layer is in: signal, cross-talk and their crossing rank from its gradient and inputs, and the judge.

`Terms` are the terms of the first step's law for one layer's full-weight gradient G and inputs x': its crossing rank
and its root mean square at any rank. `steps` are adapters really drawn, stepped and read, which know no law.
`rora_theory.measure.model_layers` takes such layers from a LLaMA model.

A rank-r step from B = 0 is a sum over the rows of A of r terms, independent and equal in law: its mean square is
:math:`r\,E[t^2] + r(r-1)\,E[t]^2` of a one-row step t. So one evaluation of `laws.first_step_moments` at rank 1 gives
every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits
from rora_theory.draws import draw_A
from rora_theory.measure.layer_data import Layer
from rora_theory.theory import first_step, laws
from rora_theory.theory.laws import Optimizer

EPSILON = 1e-8
"""Adam's epsilon, PyTorch's and optax's default."""


@dataclass(frozen=True)
class Crossing:
    r"""Where signal and cross-talk cross, at some tokens of one layer.

    Attributes:
      signal: mean of :math:`|G x'|^2` over tokens; Adam: of :math:`\sum_i (\hat g_i \cdot x')^2`, its rows normalised.
      cross_talk: mean of :math:`|G|_F^2 |x'|^2`; Adam: of :math:`p_{out} |x'|^2`, its rows with a gradient alone.
      rank: r* of the tokens together, signal and cross-talk summed.
      quartiles: of r* over tokens.
      linear_term: c of `advice.transfer`, of the tokens together under the law of A: what carries a setting.
    """

    signal: float
    cross_talk: float
    rank: float
    quartiles: tuple[float, float, float]
    linear_term: float


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of a layer's first-step law at some tokens, see `terms`.

    Attributes:
      grad, x, optimizer, init: what they are of.
      ranks: r* at each token.
      cross_talk: at each token, as `Crossing` has it.
      first, second: sums over outputs of E[t]^2 and E[t^2], t a step of rank 1, gamma 1, rate 1 and epsilon 0.
    """

    grad: Float[np.ndarray, "p_out p_in"]
    x: Float[np.ndarray, "tokens p_in"]
    optimizer: Optimizer
    init: inits.Init
    ranks: Float[np.ndarray, " tokens"]
    cross_talk: Float[np.ndarray, " tokens"]
    first: Float[np.ndarray, " tokens"]
    second: Float[np.ndarray, " tokens"]

    def crossing(self, tokens: slice = slice(None)) -> Crossing:
        """Signal, cross-talk, crossing rank and linear term of some of the tokens."""
        ranks, noise = self.ranks[tokens], self.cross_talk[tokens]
        # r* is noise / signal (SGD) or 1 + (pi/2) noise / signal (Adam) at each token.
        offset, factor = (0.0, 1.0) if self.optimizer == "sgd" else (1.0, np.pi / 2)
        signal = factor * noise / (ranks - offset)
        total = offset + factor * float(np.sum(noise) / np.sum(signal))
        low, middle, high = (float(value) for value in np.quantile(ranks, [0.25, 0.5, 0.75]))
        linear = float(np.sum(self.second[tokens]) / np.sum(self.first[tokens])) - 1
        return Crossing(float(np.mean(signal)), float(np.mean(noise)), total, (low, middle, high), linear)

    def rms(
        self, ranks: Sequence[int], scalings: Sequence[float], *, learning_rate: float, epsilon: float = EPSILON
    ) -> Float[np.ndarray, "ranks tokens"]:
        """Root mean square of w over adapters and outputs at each token: the law, for several ranks.

        What `laws.first_step_moments` gives rank by rank: to rounding for SGD and at epsilon 0. Adam's epsilon is left
        out where, at the rank at which it matters most, it changes no token's rms by more than 1e-4 of it.

        Args:
          ranks, scalings: r and gamma of each adapter.
          learning_rate, epsilon: of the step, as `laws.first_step_moments` takes them.
        """
        p_out, p_in = self.grad.shape
        unit = inits.entries(self.init, rank=1, p_in=p_in).deviation
        # An init whose deviation depends on the rank acts as gamma does: the step knows their product alone.
        strengths = [
            scaling * inits.entries(self.init, rank=rank, p_in=p_in).deviation / unit
            for rank, scaling in zip(ranks, scalings, strict=True)
        ]
        power = laws.scaling_power(self.optimizer)

        def smoothed(strength: float) -> tuple[np.ndarray, np.ndarray]:
            own = _one_row(self.grad, self.x, self.optimizer, self.init, strength, epsilon)
            return own[0] / strength**2, own[1] / strength**2

        exact = False
        if self.optimizer == "adam" and epsilon > 0:
            least = smoothed(min(strengths))
            exact = any(
                np.any(np.abs(own - plain) > 2e-4 * plain)
                for own, plain in zip(least, (self.first, self.second), strict=True)
            )
        found = []
        for rank, strength in zip(ranks, strengths, strict=True):
            first, second = smoothed(strength) if exact else (self.first, self.second)
            square = (learning_rate * strength**power) ** 2 * (rank * second + rank * (rank - 1.0) * first)
            found.append(np.sqrt(square / p_out))
        return np.array(found)


def terms(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "tokens p_in"],
    *,
    optimizer: Optimizer,
    init: inits.Init = "kaiming_uniform",
) -> Terms:
    """The terms of the first step's law (definitions of `laws.crossing_rank`).

    Args:
      grad, x: G, and inputs at which the stepped layer is read.
      optimizer, init: whose step, from which A.

    Raises:
      InputError: shapes that don't match, or a value that is not finite.
    """
    first, second = _one_row(grad, x, optimizer, init, 1.0, 0.0)
    ranks = laws.crossing_rank(grad, x, optimizer=optimizer)
    rows = np.sum(np.asarray(grad, np.float64) ** 2, axis=1)
    noise = np.sum(np.asarray(x, np.float64) ** 2, axis=1)
    noise = noise * (np.sum(rows) if optimizer == "sgd" else np.count_nonzero(rows))
    return Terms(grad, x, optimizer, init, ranks, noise, first, second)


def steps(
    layer: Layer,
    key: PRNGKeyArray,
    *,
    ranks: Sequence[int],
    scalings: Sequence[Sequence[float]],
    optimizers: Sequence[Optimizer],
    learning_rate: float,
    init: inits.Init,
    rows: int,
    epsilon: float = EPSILON,
) -> Iterator[list[Float[np.ndarray, "adapters rules optimizers splits"]]]:
    r"""Without end, adapters drawn, stepped with optax and read: the mean of w_i^2 over tokens and outputs of each.

    A block draws ``rows`` rows of A once and deals them out anew at every rank: rows // r adapters of rank r, each of
    independent rows. So :math:`\partial L/\partial B = \gamma G A^T`, the costly product, is made once for all ranks;
    adapters of different ranks share rows and are not independent of each other.

    Args:
      layer: gradient and inputs.
      key: of the stream; block i draws from ``fold_in(key, i)``.
      ranks: at most ``rows`` each.
      scalings: gamma of each rank, under one or more rules.
      optimizers: whose first step is taken, each from the same gradient.
      learning_rate, init, epsilon: of the step.
      rows: of A in a block.

    Yields:
      for each rank an array; splits are the keys of ``layer.inputs`` in their order.
    """
    data = jax.device_put((layer.grad, tuple(layer.inputs.values())))
    gammas = tuple(tuple(jnp.float32(scaling) for scaling in each) for each in scalings)
    block = 0
    while True:
        found = _block(
            jax.random.fold_in(key, block),
            *data,
            gammas,
            jnp.float32(learning_rate),
            ranks=tuple(ranks),
            optimizers=tuple(optimizers),
            init=init,
            rows=rows,
            epsilon=epsilon,
        )
        yield [np.asarray(each, np.float64) for each in found]
        block += 1


def _one_row(
    grad: np.ndarray, x: np.ndarray, optimizer: Optimizer, init: inits.Init, scaling: float, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over outputs of E[t]^2 and E[t^2] of a step of rank 1 and rate 1, at each token."""
    law = laws.first_step_moments(
        grad,
        x,
        rank=1,
        scaling=scaling,
        optimizer=optimizer,
        init=init,
        epsilon=epsilon if optimizer == "adam" else 0.0,
    )
    return np.sum(law.mean**2, axis=-1), np.sum(law.second_moment, axis=-1)


@partial(jax.jit, static_argnames=("ranks", "optimizers", "init", "rows", "epsilon"))
def _block(
    key: PRNGKeyArray,
    grad: Array,
    inputs: tuple[Array, ...],
    scalings: tuple[tuple[Array, ...], ...],
    learning_rate: Array,
    *,
    ranks: tuple[int, ...],
    optimizers: tuple[Optimizer, ...],
    init: inits.Init,
    rows: int,
    epsilon: float,
) -> list[Float[Array, "adapters rules optimizers splits"]]:
    p_out, p_in = grad.shape
    drawn = draw_A(key, init, rank=rows, p_in=p_in)
    deviation = inits.entries(init, rank=rows, p_in=p_in).deviation
    gradient = jnp.einsum("oi,ri->or", grad, drawn)  # of <G, B A> in B
    inner = [jnp.einsum("ti,ri->tr", x, drawn) for x in inputs]  # A x'
    found = []
    for rank, gammas in zip(ranks, scalings, strict=True):
        count = rows // rank
        used = count * rank
        relative = inits.entries(init, rank=rank, p_in=p_in).deviation / deviation
        by_rule = []
        for gamma in gammas:
            by_optimizer = []
            for name in optimizers:
                transformation = first_step.optimizer(name, learning_rate, epsilon=epsilon)
                slope = gamma * relative * gradient[:, :used]
                zero = jnp.zeros_like(slope)
                with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and its integer step count
                    lora_B, _ = transformation.update(slope, transformation.init(zero), zero)
                lora_B = lora_B.reshape(p_out, count, rank)
                read_at = [(gamma * relative * each[:, :used]).reshape(-1, count, rank) for each in inner]
                by_optimizer.append(jnp.stack([_mean_squares(lora_B, each) for each in read_at], axis=-1))
            by_rule.append(jnp.stack(by_optimizer, axis=1))
        found.append(jnp.stack(by_rule, axis=1))
    return found


def _mean_squares(
    lora_B: Float[Array, "p_out adapters r"], inner: Float[Array, "tokens adapters r"]
) -> Float[Array, " adapters"]:
    """Mean of w_i^2 over tokens and outputs, w = B (gamma A x'), of each adapter.

    At a low rank through the Gram matrices of B and of A x', as in `layer_data`.
    """
    p_out, _, rank = lora_B.shape
    tokens = inner.shape[0]
    if rank * (tokens + p_out) >= tokens * p_out:
        w = jnp.einsum("onr,tnr->not", lora_B, inner)
        return jnp.mean(w**2, axis=(1, 2))
    grams = jnp.einsum("onr,ons->nrs", lora_B, lora_B) * jnp.einsum("tnr,tns->nrs", inner, inner)
    return jnp.sum(grams, axis=(1, 2)) / (tokens * p_out)
