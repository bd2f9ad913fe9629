r"""First steps of other starts, optimizers and methods: random B, PiSSA, OLoRA, clipped SGD, Muon, DoRA's magnitude.

**Starts other than B = 0.** If the pairs (column k of B, row k of A) are independent and identically distributed, the
change is a sum of r such terms. Its mean square is :math:`\gamma^{2}(c\, r^2 + (m - c)\, r)` with c the square of a
term's mean and m its mean square: a signal term and a cross-talk term again (`start_terms`).

- *A = 0, B random*, SGD: :math:`w = -\eta\gamma^2 B B^\top G x'`, so that
  :math:`E|w|^2 = \eta^2 \gamma^4 s_2^2\, r (r + p_{out} + k - 2)\, |G x'|^2` with k the kurtosis of B's entries. The
  crossing rank depends only on the outputs: r* = p_out + 1 for Gaussian B and any data.
- *PiSSA* moves the top r singular directions of W into the factors and divides their singular values by gamma:
  :math:`\gamma B_0 A_0 = W_r` at any gamma. A_0 and B_0 are proportional to :math:`\gamma^{-1/2}`. The first step is
  proportional to :math:`\gamma^{1/2}` under Adam and :math:`\gamma` under SGD: half the powers from B = 0.
- *OLoRA* does not divide: :math:`\gamma B_0 A_0 = \gamma (Q R)_r` is subtracted from W, and the powers are those from
  B = 0.

**Other steps from B = 0.**

- *Clipping by the global norm* divides SGD's step by a norm that is proportional to gamma. The clipped step is
  proportional to gamma to the power 1. Since :math:`|G A^\top| \propto \sqrt r`, its exponents in the rank decrease by
  one half. It is flat at kappa = 1/2 in the signal regime (as without clipping) and at kappa = 0 in the cross-talk
  regime. Adam's first step does not depend on clipping.
- *Muon* moves B by the orthogonal factor of :math:`G A^\top`. Its columns are orthonormal if r is at most the rank of
  G, so that :math:`|w| = \eta\gamma |A x'|` exactly, for any data: ``alpha / sqrt(r)`` is flat in both regimes. Muon's
  usual factor :math:`\sqrt{\max(1, p_{out}/r)}` makes a constant gamma flat instead.
- *Lion* and signSGD take Adam's first step (`moments`); for later steps see `constant_gradient.distances` with
  ``decay=None``.
- *LoRA+* multiplies B's learning rate, and with it the size of the first step. A moves later.
- *A warm-up with first rate 0* changes nothing in the first step. The second step follows these laws.
- *DoRA* initially has LoRA's gradients without the component along W (one direction of p_in). It also moves its
  magnitude by an amount that depends on neither gamma nor the rank, which bounds every exponent (`dora_first_step`).

References:
  Meng et al., "PiSSA" (2024); Büyükakyüz, "OLoRA" (2024).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.inits import Init, entries
from rora_theory.laws.moments import FirstStepMoments, first_step_moments
from rora_theory.optimizers import OPTIMIZERS, Optimizer
from rora_theory.scaling import check_choice, check_integer, check_positive


class StartTerms(NamedTuple):
    r"""Contribution of one rank to the change of the first step, per unit of gamma; see `start_terms`.

    Attributes:
      coherent: Mean over tokens of :math:`\sum_i E[q_i]^2`.
      total: Mean over tokens of :math:`\sum_i E[q_i^2]`.
      p_out: Number of outputs.
    """

    coherent: float
    total: float
    p_out: int

    def rms(self, rank: int, *, scaling: float) -> float:
        """Compute the root mean square of the change over draws, outputs and tokens."""
        check_integer("rank", rank)
        check_positive("scaling", scaling)
        square = rank * self.total + rank * (rank - 1.0) * self.coherent
        return scaling * math.sqrt(max(square, 0.0) / self.p_out)


def start_terms(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "tokens p_in"],
    lora_A: Float[np.ndarray, "rows p_in"],
    lora_B: Float[np.ndarray, "p_out rows"],
    *,
    learning_rate: float,
    optimizer: Optimizer = "adam",
    scaling: float = 1.0,
) -> StartTerms:
    r"""Estimate the terms of a first step from sampled factors, either of which may be zero.

    .. math:: q_k = (b_k + \delta b_k)(a_k + \delta a_k) \cdot x' - b_k\, a_k \cdot x'

    The optimizer moves both factors along :math:`\gamma G a_k` and :math:`\gamma b_k^\top G`: by their signs under Adam
    (epsilon 0), and in proportion to them under SGD, so that gamma matters. Pairs of different ranks give an unbiased
    estimate of :math:`E[q]^2`.

    Args:
      grad: Gradient G of the loss with respect to the full weight.
      x: Inputs x' at which the layer is evaluated.
      lora_A: Rows of A, drawn from its initial distribution; two or more.
      lora_B: Columns of B, drawn from its initial distribution; as many as rows of A.
      learning_rate: Learning rate eta, above 0.
      optimizer: Optimizer of the step.
      scaling: Scaling factor gamma, which enters SGD's step.

    Returns:
      The terms of one rank.

    Raises:
      InputError: If the shapes don't match, there are fewer than two rows, or an argument is out of range.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_positive("learning_rate", learning_rate)
    check_positive("scaling", scaling)
    grad, x, lora_A, lora_B = (np.asarray(array, np.float64) for array in (grad, x, lora_A, lora_B))
    rows = len(lora_A)
    if grad.shape[1:] != lora_A.shape[1:] or x.shape[1:] != lora_A.shape[1:] or lora_B.shape != (len(grad), rows):
        raise InputError(
            "grad, x, lora_A and lora_B must have shapes [p_out, p_in], [tokens, p_in], [rows, p_in] and "
            f"[p_out, rows], got {grad.shape}, {x.shape}, {lora_A.shape} and {lora_B.shape}"
        )
    if rows < 2:
        raise InputError(f"lora_A must have at least 2 rows, got {rows}")
    # The optimizer's step on both factors.
    step_B, step_A = grad @ lora_A.T, lora_B.T @ grad
    if optimizer == "adam":
        step_B, step_A = np.sign(step_B), np.sign(step_A)
    else:
        step_B, step_A = scaling * step_B, scaling * step_A
    new_B, new_A = lora_B - learning_rate * step_B, lora_A - learning_rate * step_A
    # Projections of the inputs on the rows of A after and before the step, [tokens, rows].
    new_Ax, old_Ax = x @ new_A.T, x @ lora_A.T
    # |q|^2 = |new_b (new_a x) - old_b (old_a x)|^2, summed over outputs, expanded so that only norms and products of
    # columns of B are needed.
    squares = (
        np.sum(new_B**2, axis=0) * new_Ax**2
        - 2 * np.sum(new_B * lora_B, axis=0) * new_Ax * old_Ax
        + np.sum(lora_B**2, axis=0) * old_Ax**2
    )
    total = float(np.sum(squares)) / rows
    # E[q]^2 from the products of different rows: the square of the sum over rows, without the squares of single rows.
    q_sums = new_Ax @ new_B.T - old_Ax @ lora_B.T  # [tokens, p_out]
    coherent = (float(np.sum(q_sums**2)) - rows * total) / (rows * (rows - 1.0))
    tokens = len(x)
    return StartTerms(coherent / tokens, total / tokens, len(grad))


def clipped_sgd_moments(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rank: int,
    scaling: float,
    max_norm: float,
    learning_rate: float = 1.0,
    init: Init = "normal",
) -> FirstStepMoments:
    r"""Compute the moments of SGD's first step with clipping by the norm of one module's gradient.

    The norm at B = 0 is :math:`\gamma |G A^\top|_F`, with mean square :math:`\gamma^2 s_2 r |G|_F^2`. The computation
    replaces the norm by its root mean square. The norm is larger for an A that takes a larger step, so that the moments
    are too high by a relative error of the order of 1/r at most, and less if G has many directions.

    Args:
      grad: Gradient G of the loss with respect to the full weight.
      x: Inputs x' at which the updated layer is evaluated; leading axes are tokens.
      rank: Rank r of the adapter, 1 or more.
      scaling: Scaling factor gamma, above 0.
      max_norm: Maximum norm of the gradient, above 0.
      learning_rate: Learning rate eta, above 0.
      init: Initialisation of A.

    Returns:
      The moments of the clipped step.

    Raises:
      InputError: If an argument is out of range.
    """
    check_positive("max_norm", max_norm)
    unclipped = first_step_moments(grad, x, rank=rank, scaling=scaling, learning_rate=learning_rate, init=init)
    # Root mean square of the norm over A.
    squares = entries(init, rank=rank, p_in=grad.shape[1]).variance * float(np.sum(np.asarray(grad, np.float64) ** 2))
    norm = scaling * math.sqrt(rank * squares)
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    return FirstStepMoments(
        factor * unclipped.mean, factor**2 * unclipped.second_moment, factor**2 * unclipped.matrix_second_moment
    )


def muon_second_moment(
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rank: int,
    scaling: float,
    learning_rate: float = 1.0,
    init: Init = "normal",
) -> Float[np.ndarray, "*tokens"]:
    r"""Compute :math:`E|w|_2^2 = \eta^2 \gamma^2 r s_2 |x'|^2` of Muon's first step.

    The value is exact for r up to the rank of G. At larger r only the component of A x' in the row space of
    :math:`G A^\top` matters, and the value is an upper bound.

    Args:
      x: Inputs x' at which the layer is evaluated.
      rank: Rank r of the adapter, 1 or more.
      scaling: Scaling factor gamma, above 0.
      learning_rate: Learning rate eta, above 0, without Muon's shape-dependent factor.
      init: Initialisation of A.

    Returns:
      The mean squared norm for each token.

    Raises:
      InputError: If an argument is out of range.
    """
    check_positive("scaling", scaling)
    check_positive("learning_rate", learning_rate)
    x = np.asarray(x, np.float64)
    variance = entries(init, rank=rank, p_in=x.shape[-1]).variance
    return np.asarray((learning_rate * scaling) ** 2 * rank * variance * np.sum(x**2, axis=-1))


def dora_first_step(
    weight: Float[np.ndarray, "p_out p_in"],
    grad: Float[np.ndarray, "p_out p_in"],
    change: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    learning_rate: float,
    optimizer: Optimizer = "adam",
) -> tuple[Float[np.ndarray, "*tokens p_out"], Float[np.ndarray, "*tokens p_out"]]:
    r"""Compute the change of DoRA's first step in direction and in magnitude, to first order in the rate.

    With rows :math:`u_i = W_i / |W_i|` and the change dM of LoRA's first step,

    .. math:: w_i = (dM_i - (dM_i \cdot u_i) u_i) \cdot x' \; - \; \eta f(g_i \cdot u_i)\, u_i \cdot x'

    Here f is the sign under Adam and the identity under SGD. The second part depends on neither gamma nor the rank.

    Args:
      weight: Frozen weight W, without rows of zeros.
      grad: Gradient G of the loss with respect to the full weight, before the step.
      change: Change dM of LoRA's first step.
      x: Inputs x' at which the layer is evaluated.
      learning_rate: Learning rate eta of the magnitude, above 0.
      optimizer: Optimizer of the step.

    Returns:
      The change through the direction, and the change through the magnitude.

    Raises:
      InputError: If W has a row of zeros or an argument is out of range.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_positive("learning_rate", learning_rate)
    weight, grad, change, x = (np.asarray(array, np.float64) for array in (weight, grad, change, x))
    norms = np.linalg.norm(weight, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise InputError(f"weight must not have rows of zeros, got {int(np.sum(norms == 0))}")
    unit = weight / norms
    # Gradient of the magnitude, and the optimizer's step on it.
    along = np.sum(grad * unit, axis=1)
    magnitude_step = learning_rate * (np.sign(along) if optimizer == "adam" else along)
    # The normalised direction has only the components of dM orthogonal to the rows of W.
    direction = x @ (change - np.sum(change * unit, axis=1, keepdims=True) * unit).T
    return direction, -(x @ unit.T) * magnitude_step
