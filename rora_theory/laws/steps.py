r"""First steps of other optimizers and methods from B = 0: clipped SGD, Muon, DoRA's magnitude.

- **Clipping by the global norm** divides SGD's step by a norm that is proportional to gamma. The clipped step is
  proportional to gamma to the power 1. Since :math:`|G A^\top| \propto \sqrt r`, its exponents in the rank decrease by
  one half. It is flat at kappa = 1/2 in the signal regime (as without clipping) and at kappa = 0 in the cross-talk
  regime. Adam's first step does not depend on clipping.
- **Muon** moves B by the orthogonal factor of :math:`G A^\top`. Its columns are orthonormal if r is at most the rank of
  G, so that :math:`|w| = \eta\gamma |A x'|` exactly, for any data: ``alpha / sqrt(r)`` is flat in both regimes. Muon's
  usual factor :math:`\sqrt{\max(1, p_{out}/r)}` makes a constant gamma flat instead.
- **Lion** and signSGD take Adam's first step (`laws`); for later steps see `horizon.distances` with ``decay=None``.
- **LoRA+** multiplies B's learning rate, and with it the size of the first step. A takes over later
  (`horizon.distances`).
- **A warm-up with first rate 0** changes nothing in the first step. The second step follows these laws.
- **DoRA** initially has LoRA's gradients without the component along W (one direction of p_in). It also moves its
  magnitude by an amount that depends on neither gamma nor the rank, which bounds every exponent (`dora_first_step`).
"""

import math

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.inits import Init, entries
from rora_theory.laws.moments import FirstStepMoments, first_step_moments
from rora_theory.optimizers import OPTIMIZERS, Optimizer
from rora_theory.scaling import check_choice, check_not_negative, check_positive


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
    r"""Compute the moments of SGD's first step with clipping by the global norm (PyTorch's ``clip_grad_norm_``).

    The norm at B = 0 is :math:`\gamma |G A^\top|_F`, with mean square :math:`\gamma^2 s_2 r |G|_F^2`. The computation
    replaces the norm by its root mean square. The norm is larger for an A that takes a larger step, so that the moments
    are too high by a relative error of the order of 1/r at most, and less if G has many directions.

    Args:
      grad: Gradient G of the loss with respect to the full weight.
      x: Inputs x' at which the updated layer is evaluated; leading axes are tokens.
      rank: Rank r of the adapter, 1 or more.
      scaling: Scaling factor gamma, above 0.
      max_norm: Maximum global norm of the gradient, above 0.
      learning_rate: Learning rate eta, above 0.
      init: Initialisation of A.
      other_squares: Sum of :math:`|G|_F^2 s_2` over the other adapted modules, for the same rank and scaling.

    Returns:
      The moments of the clipped step.

    Raises:
      InputError: If an argument is out of range.
    """
    check_positive("max_norm", max_norm)
    check_not_negative("other_squares", float(other_squares))
    unclipped = first_step_moments(grad, x, rank=rank, scaling=scaling, learning_rate=learning_rate, init=init)
    # Root mean square of the global norm over A, with the contributions of all adapted modules.
    squares = entries(init, rank=rank, p_in=grad.shape[1]).variance * float(np.sum(np.asarray(grad, np.float64) ** 2))
    norm = scaling * math.sqrt(rank * (squares + other_squares))
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
