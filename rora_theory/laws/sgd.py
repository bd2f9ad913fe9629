r"""Laws of SGD after the first step: the change of a layer after many steps at a constant gradient.

SGD is linear in the factors: with :math:`G = U \Sigma V^\top` each singular direction evolves independently. The change
after t steps equals a first step with another gradient and another input (`sgd_equivalent`), so that
`rora_theory.laws.moments.first_step_moments` computes its exact moments.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.laws.constant_gradient import RateExponents
from rora_theory.scaling import check_between, check_positive


def sgd_rate_exponents(growth: float) -> RateExponents:
    r"""Compute SGD's exponents of the rate that preserves the change in one singular direction of the gradient.

    With :math:`\tau = \gamma \sigma \sum \eta`, small steps and the signal regime, the change is
    :math:`\propto \gamma r \sinh(2\tau)` (`sgd_equivalent`: :math:`\sigma_t c_t = \sinh(2\tau) / 2`). A constant change
    requires, with :math:`q = 2\tau \coth 2\tau`,

    .. math:: \frac{d \log \eta^*}{d \log \gamma} = -1 - \frac1q, \qquad
              \frac{d \log \eta^*}{d \log r} = -\frac1q

    The exponents are -2 and -1 at the first step (q = 1). They are -1 and 0 in a long run, in which both factors grow
    as :math:`e^\tau` and only the product of gamma and the rate matters, at any rank.

    Args:
      growth: Growth tau, 0 or more, or infinity.

    Returns:
      The exponents in gamma and in the rank.

    Raises:
      InputError: If the growth is below 0 or not a number.

    Examples:
      >>> sgd_rate_exponents(0.0), sgd_rate_exponents(math.inf)
      (RateExponents(scaling=-2.0, rank=-1.0), RateExponents(scaling=-1.0, rank=0.0))
    """
    check_between("growth", growth, 0)
    inverse = math.tanh(2 * growth) / (2 * growth) if growth else 1.0
    return RateExponents(-1 - inverse, -inverse or 0.0)


def sgd_equivalent(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rates: Sequence[float] | Float[np.ndarray, " steps"],
    scaling: float,
    momentum: float = 0.0,
) -> tuple[Float[np.ndarray, "p_out p_in"], Float[np.ndarray, "*tokens p_in"]]:
    r"""Return the gradient and inputs of an SGD *first* step at rate 1 that equals many steps at the constant G.

    In a singular direction of G, with :math:`h = \gamma \eta \sigma`, a step maps (b, a) to (b - h a, a - h b). After t
    steps from b = 0, :math:`b_t = -\sigma_t\, a_0` and :math:`a_t = c_t\, a_0`; at a constant rate

    .. math:: \sigma_t = \tfrac12 [(1 + h)^t - (1 - h)^t], \qquad c_t = \tfrac12 [(1 + h)^t + (1 - h)^t]

    The change is :math:`w = -\gamma\, U \sigma_t V^\top W (V c_t V^\top) x'` with :math:`W = A_0^\top A_0`. It equals
    SGD's first step with G replaced by :math:`U \sigma_t V^\top / \gamma` and x' by :math:`V c_t V^\top x'`. The motion
    of A matters once :math:`\gamma \eta t \sigma_1` is near 1, at any rank.

    Args:
      grad: Constant gradient G of the full weight.
      x: Inputs x' at which the layer is evaluated.
      rates: Learning rate of each step.
      scaling: Scaling factor gamma, above 0.
      momentum: Heavy-ball momentum in PyTorch's convention, at least 0 and below 1.

    Returns:
      Gradient and inputs for `rora_theory.laws.moments.first_step_moments` at the same scaling and ``learning_rate=1``.

    Raises:
      InputError: If an argument is out of range.
    """
    check_positive("scaling", scaling)
    rates = np.asarray(rates, np.float64)
    if rates.ndim != 1 or not len(rates) or not (np.isfinite(rates).all() and (rates >= 0).all()):
        raise InputError(
            f"rates must have one finite rate of at least 0 per step, and at least one step, got shape {rates.shape}"
        )
    check_between("momentum", momentum, 0, 1, closed="left")
    grad, x = np.asarray(grad, np.float64), np.asarray(x, np.float64)
    U, singular_values, Vt = np.linalg.svd(grad, full_matrices=False)
    # Every singular direction evolves by itself: b from 0 and a from 1, relative to a_0.
    b, a = np.zeros_like(singular_values), np.ones_like(singular_values)
    velocity_b, velocity_a = np.zeros_like(singular_values), np.zeros_like(singular_values)
    for rate in rates.tolist():
        # Heavy-ball steps: the gradient of B is proportional to a, and that of A to b.
        velocity_b = momentum * velocity_b + scaling * singular_values * a
        velocity_a = momentum * velocity_a + scaling * singular_values * b
        b, a = b - rate * velocity_b, a - rate * velocity_a
    # U sigma_t V^T / gamma, and x' with its components along V multiplied by c_t.
    return (U * (-b / scaling)) @ Vt, x + ((x @ Vt.T) * (a - 1)) @ Vt
