r"""Signal, cross-talk and crossing rank of one layer, from its gradient and inputs.

`Terms` are the terms of the first step's law for a layer's full-weight gradient G and inputs x'. They give the crossing
rank, and the root mean square of the change at any rank. `rora_theory.measure.regimes.drawn_steps` tests them with
adapters that are drawn and stepped. `rora_theory.measure.regime` applies them to the modules of a PyTorch model.

A step of rank r from B = 0 is a sum of r independent, identically distributed terms, one for each row of A. Its mean
square is :math:`r\,E[t^2] + r(r-1)\,E[t]^2`, where t is the step of rank 1. One evaluation of
`laws.first_step_moments` at rank 1 therefore gives every rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from rora_theory import inits, laws
from rora_theory.errors import InputError
from rora_theory.laws import sign_expectation
from rora_theory.laws.constant_gradient import MatrixProduct
from rora_theory.optimizers import EPSILON, Optimizer, scaling_power

BLOCK_ENTRIES, MIN_BLOCK_ROWS = 1 << 18, 32
"""Number of entries of the gradient that `FastTerms` reads at a time, and minimum number of rows."""


@dataclass(frozen=True)
class Crossing:
    r"""Crossing of signal and cross-talk at tokens of one layer.

    Attributes:
      signal: Mean over tokens of :math:`|G x'|^2`; under Adam of :math:`\sum_i (\hat g_i \cdot x')^2` with the
        normalised rows of G.
      cross_talk: Mean over tokens of :math:`|G|_F^2 |x'|^2`; under Adam of :math:`p_{out} |x'|^2`, with the number of
        rows that have a gradient for p_out.
      rank: Crossing rank r* of all tokens together, from summed signal and cross-talk.
      quartiles: Quartiles of r* over tokens.
      linear_term: Linear term c of all tokens together, which `advice.transfer` uses.
    """

    signal: float
    cross_talk: float
    rank: float
    quartiles: tuple[float, float, float]
    linear_term: float


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of a layer's first-step law at tokens, see `compute_terms`.

    Attributes:
      grad: Full-weight gradient G.
      x: Inputs at the tokens.
      optimizer: Optimizer of the step.
      init: Initialisation of A.
      crossing_ranks: Crossing rank r* at each token.
      cross_talk: Cross-talk at each token, see `Crossing`.
      squared_mean: Sum over outputs of E[t]^2 at each token, where t is the step of rank 1, gamma 1, rate 1 and
        epsilon 0.
      mean_square: Sum over outputs of E[t^2] at each token.
    """

    grad: Float[np.ndarray, "p_out p_in"]
    x: Float[np.ndarray, "tokens p_in"]
    optimizer: Optimizer
    init: inits.Init
    crossing_ranks: Float[np.ndarray, " tokens"]
    cross_talk: Float[np.ndarray, " tokens"]
    squared_mean: Float[np.ndarray, " tokens"]
    mean_square: Float[np.ndarray, " tokens"]

    def crossing(self, tokens: slice = slice(None)) -> Crossing:
        """Compute signal, cross-talk, crossing rank and linear term of a slice of the tokens."""
        ranks, cross_talk = self.crossing_ranks[tokens], self.cross_talk[tokens]
        # At each token r* is cross_talk / signal under SGD, and 1 + (pi/2) cross_talk / signal under Adam: solve for
        # the signal.
        offset, factor = (0.0, 1.0) if self.optimizer == "sgd" else (1.0, np.pi / 2)
        has_input = cross_talk > 0  # a token whose input is 0 has no signal, and no crossing rank
        signal = factor * cross_talk / np.where(has_input, ranks - offset, 1.0)
        # The same relation, with sums over tokens, gives the crossing rank of all tokens together.
        pooled = offset + factor * float(np.sum(cross_talk) / np.sum(signal))
        # Quartiles by linear interpolation, for which `np.quantile` takes ten times as long.
        known_ranks = np.sort(ranks[has_input]) if has_input.any() else np.array([math.nan])
        order = np.arange(len(known_ranks))
        low, middle, high = np.interp(np.array([0.25, 0.5, 0.75]) * order[-1], order, known_ranks).tolist()
        # The mean square r E[t^2] + r (r - 1) E[t]^2 is proportional to r^2 + c r with c = E[t^2] / E[t]^2 - 1.
        linear_term = float(np.sum(self.mean_square[tokens]) / np.sum(self.squared_mean[tokens])) - 1
        return Crossing(float(np.mean(signal)), float(np.mean(cross_talk)), pooled, (low, middle, high), linear_term)

    def rms(
        self, ranks: Sequence[int], scalings: Sequence[float], *, learning_rate: float, epsilon: float = EPSILON
    ) -> Float[np.ndarray, "ranks tokens"]:
        """Compute the root mean square of the change w over adapters and outputs, for several ranks.

        The result equals that of `laws.first_step_moments` at each rank, up to rounding, for SGD and at epsilon 0.
        Adam's epsilon is neglected if it changes no token's rms by more than 1e-4 at the rank where it matters most.

        Args:
          ranks: Rank r of each adapter.
          scalings: Scaling gamma of each adapter.

        Returns:
          The root mean square at each rank and token.
        """
        p_out, p_in = self.grad.shape
        # The step depends only on the product of gamma and A's standard deviation, which may depend on the rank. The
        # terms are those of rank 1: express a deviation at another rank by a scaling of the one at rank 1.
        rank_one_deviation = inits.entries(self.init, rank=1, p_in=p_in).deviation
        effective_scalings = [
            scaling * inits.entries(self.init, rank=rank, p_in=p_in).deviation / rank_one_deviation
            for rank, scaling in zip(ranks, scalings, strict=True)
        ]
        power = scaling_power(self.optimizer)

        def moments_with_epsilon(scaling: float) -> tuple[np.ndarray, np.ndarray]:
            squared_mean, mean_square = _rank_one_moments(
                self.grad, self.x, self.optimizer, self.init, scaling, epsilon
            )
            return squared_mean / scaling**2, mean_square / scaling**2

        # Epsilon matters most for the smallest gradient of B. Include it only if it changes a mean square there.
        needs_epsilon = False
        if self.optimizer == "adam" and epsilon > 0:
            smallest = moments_with_epsilon(min(effective_scalings))
            needs_epsilon = any(
                np.any(np.abs(moment - limit) > 2e-4 * limit)
                for moment, limit in zip(smallest, (self.squared_mean, self.mean_square), strict=True)
            )
        rms = []
        for rank, scaling in zip(ranks, effective_scalings, strict=True):
            squared_mean, mean_square = self.squared_mean, self.mean_square
            if needs_epsilon:
                squared_mean, mean_square = moments_with_epsilon(scaling)
            # The mean square is quadratic in the rank: r pairs of a row with itself, r (r - 1) of different rows.
            rank_terms = rank * mean_square + rank * (rank - 1.0) * squared_mean
            square = (learning_rate * scaling**power) ** 2 * rank_terms
            rms.append(np.sqrt(square / p_out))
        return np.array(rms)


def compute_terms(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "tokens p_in"],
    *,
    optimizer: Optimizer,
    init: inits.Init = "kaiming_uniform",
) -> Terms:
    """Compute the terms of the first step's law, as defined in `laws.crossing_rank`.

    Args:
      x: Inputs at which the change is evaluated.

    Returns:
      The terms at each token.

    Raises:
      InputError: If shapes do not match or a value is not finite.
    """
    squared_mean, mean_square = _rank_one_moments(grad, x, optimizer, init, 1.0, 0.0)
    crossing_ranks = laws.crossing_rank(grad, x, optimizer=optimizer)
    # |G|_F^2 |x'|^2 under SGD; under Adam every row with a gradient counts as a unit vector.
    row_squares = np.sum(np.asarray(grad, np.float64) ** 2, axis=1)
    input_squares = np.sum(np.asarray(x, np.float64) ** 2, axis=1)
    cross_talk = input_squares * (np.sum(row_squares) if optimizer == "sgd" else np.count_nonzero(row_squares))
    return Terms(grad, x, optimizer, init, crossing_ranks, cross_talk, squared_mean, mean_square)


class FastTerms:
    """Terms of a layer from float32 products that all optimizers and initialisations share.

    The gradient is read in blocks of rows, so that no copy of it is in memory. Sums over blocks are accumulated in
    float64. For uniform entries, E[sign(g . a) a] comes from `sign_expectation.uniform_fast`.

    Args:
      x: Inputs at which the change is evaluated.
      multiply: Product of two float32 matrices.

    Raises:
      InputError: If a value is not finite.
    """

    def __init__(
        self,
        grad: Float[np.ndarray, "p_out p_in"],
        x: Float[np.ndarray, "tokens p_in"],
        multiply: MatrixProduct = np.matmul,
    ) -> None:
        self._grad, self._x, self._multiply = np.asarray(grad, np.float32), np.asarray(x, np.float32), multiply
        # Largest entry of each row; it is not finite if one of its entries is not.
        self._largest = np.maximum(np.max(self._grad, axis=1, initial=0.0), -np.min(self._grad, axis=1, initial=0.0))
        if not (np.isfinite(self._largest).all() and np.isfinite(self._x).all()):
            raise InputError("grad and x must be finite in float32, got a value that is not")
        self._input_squares = np.einsum("ij,ij->i", self._x, self._x, dtype=np.float64)
        # Norms of the rows relative to the largest entry of all, so that their squares do not overflow.
        self._largest_entry = float(np.max(self._largest, initial=0.0)) or 1.0
        # Sums over the rows of G of (g . x)^2 and (g . x)^2 / (g . g) at each token, of g_j^2, and of g . g.
        self._signal_sgd, self._signal_adam = np.zeros((2, len(self._x)))
        self._column_squares = np.zeros(self._grad.shape[1])
        self._grad_square, self._nonzero_rows = 0.0, int(np.count_nonzero(self._largest))
        for unit, norms in self._unit_blocks():
            weights = norms**2
            along = self._multiply(unit, self._x.T)
            np.square(along, out=along)
            self._signal_adam += np.einsum("ij->j", along)
            self._signal_sgd += np.einsum("i,ij->j", weights, along)
            self._column_squares += self._multiply(weights[None, :], np.square(unit))[0]
            self._grad_square += float(np.sum(weights, dtype=np.float64))

    def terms(self, optimizer: Optimizer, init: inits.Init) -> Terms:
        """Compute the terms for one optimizer and initialisation, see `compute_terms`."""
        # Signs of Rademacher rows can tie, which only the exact law treats.
        if init == "rademacher":
            return compute_terms(self._grad, self._x, optimizer=optimizer, init=init)
        law = inits.entries(init, rank=1, p_in=self._grad.shape[1])
        tiny = np.finfo(np.float64).tiny
        if optimizer == "sgd":
            # The step is a quadratic form in a row of A: its second moment has a term in the kurtosis.
            # Restore the scale of the gradient, by whose largest entry the sums are divided.
            scale_square = self._largest_entry**2
            cross_talk = scale_square * self._grad_square * self._input_squares
            signal = scale_square * self._signal_sgd
            crossing_ranks = cross_talk / np.maximum(signal, tiny)
            squared_mean = law.variance**2 * signal
            excess = (law.kurtosis - 3) * scale_square * self._fourth_moments
            mean_square = law.variance**2 * (2 * signal + cross_talk + excess)
        else:
            # In the sign limit the step is sign(g . a) a . x, whose squared mean is 2/pi of the signal for normal
            # entries.
            cross_talk, signal = self._nonzero_rows * self._input_squares, self._signal_adam
            crossing_ranks = 1 + np.pi / 2 * cross_talk / np.maximum(signal, tiny)
            squared_mean = law.variance * (2 / np.pi * signal if law.is_normal else self._uniform_signal)
            mean_square = law.variance * cross_talk
        return Terms(self._grad, self._x, optimizer, init, crossing_ranks, cross_talk, squared_mean, mean_square)

    @cached_property
    def _fourth_moments(self) -> Float[np.ndarray, " tokens"]:
        """Sums over outputs and inputs of (g_j x_j)^2."""
        return np.einsum("ij,j->i", np.square(self._x), self._column_squares)

    @cached_property
    def _uniform_signal(self) -> Float[np.ndarray, " tokens"]:
        """Sums over outputs of (m . x)^2, where m = E[sign(g . a) a] for uniform entries of variance 1."""
        sums = np.zeros(len(self._x))
        for unit, _ in self._unit_blocks():
            along = self._multiply(sign_expectation.uniform_fast(unit), self._x.T)
            sums += np.einsum("ij,ij->j", along, along)
        return sums

    def _unit_blocks(self) -> Iterator[tuple[Float[np.ndarray, "rows p_in"], Float[np.ndarray, " rows"]]]:
        """Yield the rows of G in blocks, divided by their norms, and the norms relative to G's largest entry."""
        size = max(MIN_BLOCK_ROWS, BLOCK_ENTRIES // max(1, self._grad.shape[1]))
        for start in range(0, len(self._grad), size):
            rows = slice(start, start + size)
            # Divide by the largest entry first, so that squares neither overflow nor underflow in float32.
            largest = self._largest[rows]
            unit = self._grad[rows] / np.where(largest > 0, largest, 1.0)[:, None]
            lengths = np.sqrt(np.einsum("ij,ij->i", unit, unit))
            unit /= np.where(lengths > 0, lengths, 1.0)[:, None]
            yield unit, largest / np.float32(self._largest_entry) * lengths


def _rank_one_moments(
    grad: np.ndarray, x: np.ndarray, optimizer: Optimizer, init: inits.Init, scaling: float, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the sums over outputs of E[t]^2 and E[t^2] at each token, for a step t of rank 1 and rate 1."""
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
