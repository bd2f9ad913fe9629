r"""The displacement law: how the best learning rate under Adam moves with the gain once training has progressed.

Let b be the root-mean-square displacement of the entries of B from 0, and :math:`a = \lambda b` that of the entries of
A from their start. The change of the layer is :math:`\gamma (B A_0 + B (A - A_0))`: its B part and its A part. With p
and q the coherence of the two parts, and the gain :math:`G = \gamma r` (scaling times rank),

.. math:: \text{B part} = G p b, \qquad \text{A part} = G q a b, \qquad
          \rho = \frac{\text{A part}}{\text{B part}} = \frac{q a}{p}, \qquad W = G p b (1 + \rho)

Eliminating b gives

.. math:: \rho (1 + \rho) = \frac{K}{G}, \qquad K = \frac{\lambda q W}{p^2}

K depends on the model, its data and the progress of the run, but not on G. It is measured at any G as
:math:`G \rho (1 + \rho)`.

The best rate preserves the effective step rather than the change. One step of size eta moves every entry of B by eta
and every entry of A by lambda eta, so the change moves by

.. math:: \eta \left( \frac{\partial W}{\partial b} + \lambda \frac{\partial W}{\partial a} \right)
          = \eta\, G p\, (1 + 2 \rho)

if the steps of both factors are coherent, and by :math:`\eta\, G p\, (1 + \rho)` if only B's steps are. Hence

.. math:: \eta^* G (1 + c \rho) = h, \qquad 1 \le c \le 2

with h independent of G. The exponent of the best rate in G is -1 where G >> K and -1/2 where G << K.

The constant-gradient law (`rora_theory.laws.constant_gradient`) counts every step as displacement instead. It serves
as the alternative hypothesis: fine-tuning runs of SmolLM2-135M contradict it.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_between, check_not_negative, check_positive

COHERENCE_RANGE = (1.0, 2.0)
"""Range of c: 1 if only B's steps are coherent, 2 if both factors' steps are."""


def has_displacement_ratio(gain: float, displacement_constant: float) -> bool:
    """Return whether `displacement_ratio` can be computed: 4 K / G must not overflow."""
    return math.isfinite(4 * (displacement_constant / gain))


def displacement_ratio(gain: float, *, displacement_constant: float) -> float:
    r"""Compute the ratio of the A part to the B part of the change at a given gain.

    The positive root of :math:`\rho (1 + \rho) = K / G`.

    Args:
      gain: G, scaling times rank, above 0.
      displacement_constant: K, 0 or more.

    Returns:
      The ratio rho, 0 or more.

    Raises:
      InputError: If an argument is out of range.

    Examples:
      >>> displacement_ratio(64.0, displacement_constant=128.0)
      1.0
    """
    check_positive("gain", gain)
    check_not_negative("displacement_constant", displacement_constant)
    if not has_displacement_ratio(gain, displacement_constant):
        raise InputError(
            f"gain must be larger for displacement_constant {displacement_constant:g}, got {gain!r}: their "
            "ratio is not representable as a float"
        )
    ratio = displacement_constant / gain
    # The root of rho^2 + rho - ratio, in a form without the difference that cancels at small ratios.
    return 2 * ratio / (1 + math.sqrt(1 + 4 * ratio))


def measured_constant(gain: float, ratios: Sequence[float] | Float[np.ndarray, " modules"]) -> float:
    r"""Compute K from the ratios of a run's modules at one G.

    The median ratio over modules is used as rho in :math:`K = G \rho (1 + \rho)`. The run's learning rate should not
    exceed the best one; above it K grows with the rate.

    Args:
      gain: G, scaling times rank, in training, above 0.
      ratios: Root mean square of the A part of the change divided by that of the B part, for each adapted module.

    Returns:
      The displacement constant K.

    Raises:
      InputError: If there is no ratio, or one is negative or not finite.

    Examples:
      >>> measured_constant(64.0, [0.5, 1.0, 4.0])
      128.0
    """
    check_positive("gain", gain)
    values = np.asarray(ratios, np.float64)
    if not values.size or not np.isfinite(values).all() or values.min() < 0:
        raise InputError(f"ratios must be one or more finite numbers of at least 0, got {values.tolist()}")
    median = float(np.median(values))
    return gain * median * (1 + median)


def best_rate_factor(
    old_gain: float, new_gain: float, *, displacement_constant: float, coherence: float = 1.0
) -> float:
    r"""Compute the factor by which the best learning rate changes when G changes.

    .. math:: \frac{\eta'}{\eta} = \frac{G (1 + c \rho)}{G' (1 + c \rho')}

    Args:
      old_gain: G at which the rate was tuned, above 0.
      new_gain: G of the new setting, above 0.
      displacement_constant: K, 0 or more.
      coherence: c, from 1 to 2.

    Returns:
      The new best rate divided by the old one, at the same number of steps.

    Raises:
      InputError: If an argument is out of range.

    Examples:
      ``use_rslora`` at rank 128 with alpha 64 unchanged raises G from 64 to 724:

      >>> round(1 / best_rate_factor(64.0, 724.0, displacement_constant=130.0), 1)
      6.5
    """
    check_between("coherence", coherence, *COHERENCE_RANGE)
    old, new = (
        gain * (1 + coherence * displacement_ratio(gain, displacement_constant=displacement_constant))
        for gain in (old_gain, new_gain)
    )
    return old / new


def best_rate_exponent(
    old_gain: float, new_gain: float, *, displacement_constant: float, coherence: float = 1.0
) -> float:
    r"""Compute the mean exponent of the best learning rate between two values of G.

    .. math:: -1 + \frac{\ln [(1 + c \rho) / (1 + c \rho')]}{\ln (G' / G)}

    Args:
      old_gain: First value of G, above 0.
      new_gain: Second value of G, different from the first.
      displacement_constant: K, 0 or more.
      coherence: c, from 1 to 2.

    Returns:
      The exponent, between -1 (G far above K) and -1/2 (G far below K).

    Raises:
      InputError: If an argument is out of range or the two gains are equal.

    Examples:
      >>> round(best_rate_exponent(64.0, 724.0, displacement_constant=130.0), 2)
      -0.77
    """
    if old_gain == new_gain:
        raise InputError(f"new_gain must differ from old_gain, got {new_gain!r} for both")
    factor = best_rate_factor(old_gain, new_gain, displacement_constant=displacement_constant, coherence=coherence)
    return math.log(factor) / math.log(new_gain / old_gain)
