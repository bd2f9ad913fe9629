r"""First steps of other optimizers and methods from B = 0: a clipped gradient, Muon, DoRA's magnitude.

- **Clipping by the global norm** divides SGD's step by a norm that has gamma in it once: what is left goes as gamma to
  the power 1, and since :math:`|G A^\top| \propto \sqrt r` the exponents fall by one half: flat at kappa = 1/2 where
  the signal leads (as unclipped) and at kappa = 0 where cross-talk does. Adam's first step does not see it.
- **Muon** moves B by the orthogonal factor of :math:`G A^\top`. Its columns are orthonormal as long as r is at most the
  rank of G, so that :math:`|w| = \eta\gamma |A x'|` exactly, whatever the data: ``alpha / sqrt(r)`` is flat in
  both regimes. Its usual factor :math:`\sqrt{\max(1, p_{out}/r)}` makes constant gamma flat instead.
- **Lion** and signSGD take Adam's first step (`laws`), and later `horizon.distances` with ``decay=None``.
- **LoRA+** multiplies B's rate: the first step's size by as much, and A takes over later (`horizon.distances`).
- **A warm-up whose first rate is 0** moves nothing in its first step; the second is the first of these laws.
- **DoRA** at its start has LoRA's gradients, less the part of the change along W (one direction of p_in), and moves its
  magnitude by an amount that knows neither gamma nor the rank: a floor under every exponent (`dora_first_step`).
"""

import math

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.inits import Init, entries
from rora_theory.scaling import check_not_negative, check_positive
from rora_theory.theory.laws import FirstStepMoments, Optimizer, check_optimizer, first_step_moments


def clipped_sgd_moments(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rank: int,
    scaling: float,
    max_norm: float,
    learning_rate: float = 1.0,
    init: Init = "normal",
    other_squares: float = 0.0,
) -> FirstStepMoments:
    r"""Moments of SGD's first step with the gradient clipped to a global norm (PyTorch's ``clip_grad_norm_``).

    The norm at B = 0 is :math:`\gamma |G A^\top|_F`, of mean square :math:`\gamma^2 s_2 r |G|_F^2`. It is taken as its
    root mean square, though it is larger for an A that takes a larger step: the moments are too high by a share of
    the order of 1/r at most, and less where G has many directions.

    Args:
      grad, x, rank, scaling, learning_rate, init: as `laws.first_step_moments`.
      max_norm: the largest norm, > 0.
      other_squares: sum of :math:`|G|_F^2 s_2` over the other adapted modules, of the same rank and scaling.

    Raises:
      InputError: an argument out of range.
    """
    check_positive("max_norm", max_norm)
    check_not_negative("other_squares", float(other_squares))
    free = first_step_moments(grad, x, rank=rank, scaling=scaling, learning_rate=learning_rate, init=init)
    own = entries(init, rank=rank, p_in=grad.shape[1]).variance * float(np.sum(np.asarray(grad, np.float64) ** 2))
    norm = scaling * math.sqrt(rank * (own + other_squares))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    return FirstStepMoments(factor * free.mean, factor**2 * free.second_moment, factor**2 * free.matrix_second_moment)


def muon_second_moment(
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rank: int,
    scaling: float,
    learning_rate: float = 1.0,
    init: Init = "normal",
) -> Float[np.ndarray, "*tokens"]:
    r""":math:`E|w|_2^2 = \eta^2 \gamma^2 r s_2 |x'|^2` of Muon's first step, exact for r up to the rank of G.

    Above it only the part of A x' in the row space of :math:`G A^\top` counts, and the sum stays below this.

    Args:
      x: inputs x' at which the layer is read.
      rank, scaling, learning_rate, init: of the adapter and its step, without Muon's factor of the shape.

    Raises:
      InputError: an argument out of range.
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
    r"""What DoRA's first step changes, in its direction and in its magnitude, to first order in the rate.

    With rows :math:`u_i = W_i / |W_i|`, and dM the change that LoRA's first step makes:

    .. math:: w_i = (dM_i - (dM_i \cdot u_i) u_i) \cdot x' \; - \; \eta f(g_i \cdot u_i)\, u_i \cdot x'

    f the sign under Adam, the identity under SGD. The second part has neither gamma nor the rank in it.

    Args:
      weight: W, the frozen weight, no row of zeros.
      grad: G at the start.
      change: dM of LoRA's first step.
      x: inputs x' at which the layer is read.
      learning_rate: eta > 0, of the magnitude.
      optimizer: whose step.

    Returns:
      the direction's part and the magnitude's part.

    Raises:
      InputError: a row of zeros in W, or an argument out of range.
    """
    check_optimizer(optimizer)
    check_positive("learning_rate", learning_rate)
    weight, grad, change, x = (np.asarray(each, np.float64) for each in (weight, grad, change, x))
    norms = np.linalg.norm(weight, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise InputError("weight has a row of zeros; accepted is a weight whose rows have a direction")
    unit = weight / norms
    along = np.sum(grad * unit, axis=1)
    moved = learning_rate * (np.sign(along) if optimizer == "adam" else along)
    direction = x @ (change - np.sum(change * unit, axis=1, keepdims=True) * unit).T
    return direction, -(x @ unit.T) * moved
