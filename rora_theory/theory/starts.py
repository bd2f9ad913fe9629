r"""First steps from other starts than B = 0: A zero and B random, both random, PiSSA and OLoRA.

Where the factors' ranks are independent and equal in law (column k of B and row k of A), the change is a sum of r such
terms whatever the start, so that its mean square is :math:`\gamma^{2}(c\, r^2 + (m - c)\, r)` with c the square of a
term's mean and m its mean square: signal and cross-talk again, `start_terms`.

- **A = 0, B random**, SGD: :math:`w = -\eta\gamma^2 B B^\top G x'`, whose cross-talk knows the outputs alone: with
  Gaussian B the terms cross at r* = p_out + 1 whatever the data (`random_B_crossing`). Inputs play no part, so that
  overlap of training and held-out tokens changes the size of a step and not its exponent.
- **Both random**: the layer starts at :math:`\gamma B_0 A_0 x'`, of rms :math:`\gamma s_A s_B \sqrt{r}\,|x'|`:
  only ``alpha / sqrt(r)`` keeps the start.
- **PiSSA** puts the top r singular directions of W into the factors and divides their singular values by gamma:
  :math:`\gamma B_0 A_0 = W_r` at any gamma. So A_0 and B_0 go as :math:`\gamma^{-1/2}`, and the first step as
  :math:`\gamma^{1/2}` under Adam and :math:`\gamma` under SGD: half the powers that B = 0 has.
- **OLoRA** does not divide: :math:`\gamma B_0 A_0 = \gamma (Q R)_r` is taken off W, and the powers are those of B = 0.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_positive, check_rank
from rora_theory.theory.laws import Optimizer, check_optimizer


class StartTerms(NamedTuple):
    r"""A rank's term in the change of the first step, per unit of gamma; see `start_terms`.

    Attributes:
      coherent: :math:`\sum_i E[q_i]^2`, a mean over tokens.
      total: :math:`\sum_i E[q_i^2]`.
      forward: :math:`\sum_i E[(b_{ik}\, a_k \cdot x')^2]`, of the layer at the start; 0 where a factor is.
      p_out: outputs.
    """

    coherent: float
    total: float
    forward: float
    p_out: int

    def rms(self, rank: int, *, scaling: float) -> float:
        """Root mean square of the change over draws, outputs and tokens."""
        check_rank(rank)
        check_positive("scaling", scaling)
        square = rank * self.total + rank * (rank - 1.0) * self.coherent
        return scaling * math.sqrt(max(square, 0.0) / self.p_out)

    def start_rms(self, rank: int, *, scaling: float) -> float:
        """Root mean square of what the adapter adds before any step: terms of mean 0, so that only r counts."""
        check_rank(rank)
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
    r"""The terms of a first step from drawn factors, either of which may be zero.

    .. math:: q_k = (b_k + \delta b_k)(a_k + \delta a_k) \cdot x' - b_k\, a_k \cdot x'

    with both factors moved by the optimizer's step on :math:`\gamma G a_k` and :math:`\gamma b_k^\top G`: their signs
    under Adam (epsilon 0), themselves under SGD, where gamma therefore matters. :math:`E[q]^2` is estimated without
    bias from pairs of different ranks.

    Args:
      grad: G.
      x: inputs x' at which the layer is read.
      lora_A, lora_B: rows of A and columns of B, drawn as they start; two or more.
      learning_rate: eta > 0.
      optimizer: whose step.
      scaling: gamma, which SGD's step has in it.

    Raises:
      InputError: shapes that don't match, fewer than two rows, or an argument out of range.
    """
    check_optimizer(optimizer)
    check_positive("learning_rate", learning_rate)
    check_positive("scaling", scaling)
    grad, x, lora_A, lora_B = (np.asarray(each, np.float64) for each in (grad, x, lora_A, lora_B))
    rows = len(lora_A)
    if grad.shape[1:] != lora_A.shape[1:] or x.shape[1:] != lora_A.shape[1:] or lora_B.shape != (len(grad), rows):
        raise InputError(
            f"grad has shape {grad.shape}, x {x.shape}, lora_A {lora_A.shape} and lora_B {lora_B.shape}; accepted are "
            "[p_out, p_in], [tokens, p_in], [rows, p_in] and [p_out, rows]"
        )
    if rows < 2:
        raise InputError(f"lora_A has {rows} rows; accepted are 2 or more")
    to_B, to_A = grad @ lora_A.T, lora_B.T @ grad
    if optimizer == "adam":
        to_B, to_A = np.sign(to_B), np.sign(to_A)
    else:
        to_B, to_A = scaling * to_B, scaling * to_A
    new_B, new_A = lora_B - learning_rate * to_B, lora_A - learning_rate * to_A
    read, start = x @ new_A.T, x @ lora_A.T  # [tokens, rows]
    squares = (
        np.sum(new_B**2, axis=0) * read**2
        - 2 * np.sum(new_B * lora_B, axis=0) * read * start
        + np.sum(lora_B**2, axis=0) * start**2
    )
    total = float(np.sum(squares)) / rows
    sums = read @ new_B.T - start @ lora_B.T
    coherent = (float(np.sum(sums**2)) - rows * total) / (rows * (rows - 1.0))
    forward = float(np.sum(np.sum(lora_B**2, axis=0) * start**2)) / rows
    tokens = len(x)
    return StartTerms(coherent / tokens, total / tokens, forward / tokens, len(grad))


def random_B_crossing(p_out: int, kurtosis: float = 3.0) -> float:
    r"""The rank at which the terms in r and r^2 are equal from A = 0 under SGD: :math:`r^* = p_{out} + k - 2`.

    .. math:: E|w|^2 = \eta^2 \gamma^4 s_2^2\, r (r + p_{out} + k - 2)\, |G x'|^2

    Args:
      p_out: outputs, 1 or more.
      kurtosis: k of B's entries.

    Raises:
      InputError: a p_out below 1.
    """
    check_rank(p_out)
    return p_out + kurtosis - 2


def pissa_factors(
    weight: Float[np.ndarray, "p_out p_in"], *, rank: int, scaling: float
) -> tuple[Float[np.ndarray, "r p_in"], Float[np.ndarray, "p_out r"]]:
    r"""PiSSA's A_0 and B_0: the top r singular directions, each factor with :math:`\sqrt{\sigma / \gamma}`.

    The frozen weight is what is left, :math:`W - \gamma B_0 A_0` (Meng et al. 2024, as PEFT has it).

    Raises:
      InputError: a rank above the weight's, or a scaling out of range.
    """
    left, values, right = np.linalg.svd(_checked(weight, rank, scaling), full_matrices=False)
    root = np.sqrt(values[:rank] / scaling)
    return root[:, None] * right[:rank], left[:, :rank] * root


def olora_factors(
    weight: Float[np.ndarray, "p_out p_in"], *, rank: int, scaling: float
) -> tuple[Float[np.ndarray, "r p_in"], Float[np.ndarray, "p_out r"]]:
    r"""OLoRA's A_0 and B_0: the first r rows of R and columns of Q of W = Q R, whatever gamma.

    The frozen weight is :math:`W - \gamma B_0 A_0` (Büyükakyüz 2024, as PEFT has it).

    Raises:
      InputError: a rank above the weight's, or a scaling out of range.
    """
    Q, R = np.linalg.qr(_checked(weight, rank, scaling))
    return R[:rank], Q[:, :rank]


def start_powers(start: str, *, optimizer: Optimizer) -> float:
    """The power of gamma in the first step's size at a fixed rank, second order in the rate left out.

    Args:
      start: ``"default"`` (B = 0, or A = 0), ``"olora"`` or ``"pissa"``.
      optimizer: whose step.

    Raises:
      InputError: a start without a law here.
    """
    check_optimizer(optimizer)
    powers = {"default": 1.0, "olora": 1.0, "pissa": 0.5}
    if start not in powers:
        raise InputError(f"start is {start!r}; accepted are {', '.join(powers)}: others have no law here")
    return powers[start] * (2 if optimizer == "sgd" else 1)


def _checked(weight: np.ndarray, rank: int, scaling: float) -> np.ndarray:
    weight = np.asarray(weight, np.float64)
    check_rank(rank)
    check_positive("scaling", scaling)
    if weight.ndim != 2 or rank > min(weight.shape):
        raise InputError(f"rank is {rank} for a weight of shape {weight.shape}; accepted are 1 to its smaller side")
    return weight
