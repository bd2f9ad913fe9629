r"""First steps from starts other than B = 0: A zero and B random, both random, PiSSA and OLoRA.

If the pairs (column k of B, row k of A) are independent and identically distributed, the change is a sum of r such
terms. Its mean square is :math:`\gamma^{2}(c\, r^2 + (m - c)\, r)` with c the square of a term's mean and m its mean
square: a signal term and a cross-talk term again (`start_terms`).

- **A = 0, B random**, SGD: :math:`w = -\eta\gamma^2 B B^\top G x'`. The cross-talk depends only on the outputs: with
  Gaussian B the terms are equal at r* = p_out + 1 for any data (`random_B_crossing`). The overlap of training and
  held-out tokens changes the size of a step and not its exponent.
- **Both random**: the layer starts at :math:`\gamma B_0 A_0 x'`, with rms :math:`\gamma s_A s_B \sqrt{r}\,|x'|`. Only
  ``alpha / sqrt(r)`` makes the start independent of the rank.
- **PiSSA** moves the top r singular directions of W into the factors and divides their singular values by gamma:
  :math:`\gamma B_0 A_0 = W_r` at any gamma. A_0 and B_0 are proportional to :math:`\gamma^{-1/2}`. The first step is
  proportional to :math:`\gamma^{1/2}` under Adam and :math:`\gamma` under SGD: half the powers from B = 0.
- **OLoRA** does not divide: :math:`\gamma B_0 A_0 = \gamma (Q R)_r` is subtracted from W, and the powers are those
  from B = 0.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.optimizers import OPTIMIZERS, Optimizer
from rora_theory.scaling import check_choice, check_integer, check_positive


class StartTerms(NamedTuple):
    r"""Contribution of one rank to the change of the first step, per unit of gamma; see `start_terms`.

    Attributes:
      coherent: Mean over tokens of :math:`\sum_i E[q_i]^2`.
      total: Mean over tokens of :math:`\sum_i E[q_i^2]`.
      forward: Mean over tokens of :math:`\sum_i E[(b_{ik}\, a_k \cdot x')^2]` before the step; 0 if a factor is 0.
      p_out: Number of outputs.
    """

    coherent: float
    total: float
    forward: float
    p_out: int

    def rms(self, rank: int, *, scaling: float) -> float:
        """Compute the root mean square of the change over draws, outputs and tokens."""
        check_integer("rank", rank)
        check_positive("scaling", scaling)
        square = rank * self.total + rank * (rank - 1.0) * self.coherent
        return scaling * math.sqrt(max(square, 0.0) / self.p_out)

    def start_rms(self, rank: int, *, scaling: float) -> float:
        """Compute the root mean square of the adapter's output before any step, a sum of r terms of mean 0."""
        check_integer("rank", rank)
        check_positive("scaling", scaling)
        return scaling * math.sqrt(rank * self.forward / self.p_out)


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
    forward = float(np.sum(np.sum(lora_B**2, axis=0) * old_Ax**2)) / rows
    tokens = len(x)
    return StartTerms(coherent / tokens, total / tokens, forward / tokens, len(grad))


def random_B_crossing(p_out: int, kurtosis: float = 3.0) -> float:
    r"""Compute the rank at which the terms in r and r^2 are equal from A = 0 under SGD.

    The crossing rank is :math:`r^* = p_{out} + k - 2`, because

    .. math:: E|w|^2 = \eta^2 \gamma^4 s_2^2\, r (r + p_{out} + k - 2)\, |G x'|^2

    Args:
      p_out: Number of outputs, 1 or more.
      kurtosis: Kurtosis k of B's entries.

    Returns:
      The crossing rank.

    Raises:
      InputError: If p_out is below 1.
    """
    check_integer("p_out", p_out)
    return p_out + kurtosis - 2


def pissa_factors(
    weight: Float[np.ndarray, "p_out p_in"], *, rank: int, scaling: float
) -> tuple[Float[np.ndarray, "r p_in"], Float[np.ndarray, "p_out r"]]:
    r"""Compute PiSSA's A_0 and B_0, the top r singular directions with :math:`\sqrt{\sigma / \gamma}` in each factor.

    The frozen weight is the remainder, :math:`W - \gamma B_0 A_0`.

    Args:
      weight: Pretrained weight W.
      rank: Rank r of the adapter, at most the smaller side of the weight.
      scaling: Scaling factor gamma, above 0.

    Returns:
      The factors A_0 and B_0.

    Raises:
      InputError: If the rank or the scaling is out of range.

    References:
      Meng et al., "PiSSA" (2024), as implemented in PEFT.
    """
    U, singular_values, Vt = np.linalg.svd(_valid_weight(weight, rank, scaling), full_matrices=False)
    root = np.sqrt(singular_values[:rank] / scaling)
    return root[:, None] * Vt[:rank], U[:, :rank] * root


def olora_factors(
    weight: Float[np.ndarray, "p_out p_in"], *, rank: int, scaling: float
) -> tuple[Float[np.ndarray, "r p_in"], Float[np.ndarray, "p_out r"]]:
    r"""Compute OLoRA's A_0 and B_0, the first r rows of R and columns of Q in W = Q R.

    The factors do not depend on gamma. The frozen weight is :math:`W - \gamma B_0 A_0`.

    Args:
      weight: Pretrained weight W.
      rank: Rank r of the adapter, at most the smaller side of the weight.
      scaling: Scaling factor gamma, above 0.

    Returns:
      The factors A_0 and B_0.

    Raises:
      InputError: If the rank or the scaling is out of range.

    References:
      Büyükakyüz, "OLoRA" (2024), as implemented in PEFT.
    """
    Q, R = np.linalg.qr(_valid_weight(weight, rank, scaling))
    return R[:rank], Q[:, :rank]


def start_powers(start: str, *, optimizer: Optimizer) -> float:
    """Return the power of gamma in the first step's size at a fixed rank, to first order in the rate.

    Args:
      start: Initialisation of the factors: ``"default"`` (B = 0, or A = 0), ``"olora"`` or ``"pissa"``.
      optimizer: Optimizer of the step.

    Returns:
      The power of gamma.

    Raises:
      InputError: If the start or the optimizer is unknown.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    powers = {"default": 1.0, "olora": 1.0, "pissa": 0.5}
    check_choice("start", start, powers)
    return powers[start] * (2 if optimizer == "sgd" else 1)


def _valid_weight(weight: np.ndarray, rank: int, scaling: float) -> np.ndarray:
    """Return the weight in float64, or raise `InputError` if an argument is out of range."""
    weight = np.asarray(weight, np.float64)
    check_integer("rank", rank)
    check_positive("scaling", scaling)
    if weight.ndim != 2 or rank > min(weight.shape):
        raise InputError(f"rank must be at most the smaller side of the weight, got {rank} for shape {weight.shape}")
    return weight
