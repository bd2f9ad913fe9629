r"""Which regime a layer is in: signal, cross-talk and their crossing rank from its gradient and inputs.

`Terms` are the terms of the first step's law for one layer's full-weight gradient G and inputs x': its crossing rank
and its root mean square at any rank. `rora_theory.measure.layers.drawn_steps` judges them by adapters really stepped;
`rora_theory.measure.layers.model_layers` takes such layers from a LLaMA model, `rora_theory.measure.torch` from
PyTorch's.

A rank-r step from B = 0 is a sum over the rows of A of r terms, independent and equal in law: its mean square is
:math:`r\,E[t^2] + r(r-1)\,E[t]^2` of a one-row step t. So one evaluation of `laws.first_step_moments` at rank 1 gives
every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from rora_theory import inits
from rora_theory.errors import InputError
from rora_theory.optimizers import EPSILON
from rora_theory.theory import laws, sign_expectation
from rora_theory.theory.laws import Optimizer


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


class FastTerms:
    """The terms of a layer from products in float32 that all optimizers and inits share.

    Sums over outputs are taken in float64. E[sign(g . a) a] of uniform entries is that of
    `sign_expectation.uniform_fast`, and exact in rows that it does not serve.

    Args:
      grad, x: As `terms` takes them.

    Raises:
      InputError: A value that is not finite.
    """

    def __init__(self, grad: Float[np.ndarray, "p_out p_in"], x: Float[np.ndarray, "tokens p_in"]) -> None:
        self._grad, self._x = np.asarray(grad, np.float32), np.asarray(x, np.float32)
        if not (np.isfinite(self._grad).all() and np.isfinite(self._x).all()):
            raise InputError("grad or x holds a value that is not a finite float32; accepted are finite numbers")
        # Rows of length 1: their squares are numbers in float32, whatever the gradient's size is.
        largest = np.max(np.abs(self._grad), axis=1, initial=0.0)
        self._unit = self._grad / np.where(largest > 0, largest, 1.0)[:, None]
        lengths = np.sqrt(np.einsum("ij,ij->i", self._unit, self._unit))
        self._unit /= np.where(lengths > 0, lengths, 1.0)[:, None]
        self._norms = largest.astype(np.float64) * lengths
        self._squares = np.sum(self._x.astype(np.float64) ** 2, axis=1)

    def terms(self, optimizer: Optimizer, init: inits.Init) -> Terms:
        """The terms of one optimizer and init, as `terms` gives them."""
        if init == "rademacher":  # ties and enumerated rows
            return terms(self._grad, self._x, optimizer=optimizer, init=init)
        law = inits.entries(init, rank=1, p_in=self._grad.shape[1])
        tiny = np.finfo(np.float64).tiny
        if optimizer == "sgd":
            size = float(np.sum(self._norms**2))
            noise, signal = size * self._squares, np.sum((self._along * self._norms) ** 2, axis=1)
            ranks = noise / np.maximum(signal, tiny)
            first = law.variance**2 * signal
            fourth = self._x.astype(np.float64) ** 2 @ self._columns
            second = law.variance**2 * (2 * signal + noise + (law.kurtosis - 3) * fourth)
        else:
            noise, signal = np.count_nonzero(self._norms) * self._squares, np.sum(self._along**2, axis=1)
            ranks = 1 + np.pi / 2 * noise / np.maximum(signal, tiny)
            first = 2 / np.pi * signal if law.is_normal else self._uniform
            first = law.variance * first
            second = law.variance * noise
        return Terms(self._grad, self._x, optimizer, init, ranks, noise, first, second)

    @cached_property
    def _along(self) -> Float[np.ndarray, "tokens p_out"]:
        return (self._x @ self._unit.T).astype(np.float64)

    @cached_property
    def _columns(self) -> Float[np.ndarray, " p_in"]:
        """Sums over outputs of the gradient's squares."""
        return self._norms**2 @ (self._unit**2)

    @cached_property
    def _uniform(self) -> Float[np.ndarray, " tokens"]:
        """Sums over outputs of (m . x)^2, m = E[sign(g . a) a] of uniform entries of variance 1."""
        done, direction = sign_expectation.uniform_fast(self._unit)
        left = ~done & (self._norms > 0)
        if left.any():
            direction[left] = laws.sign_direction(self._unit[left].astype(np.float64), "uniform")
        return np.sum((self._x @ direction.T).astype(np.float64) ** 2, axis=1)


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
