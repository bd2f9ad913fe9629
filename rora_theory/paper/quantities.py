"""Mean, second moment, variance and norm of the paper's w: simulated, from the exact law, and as printed."""

import math
from typing import Any, Literal, get_args

import numpy as np

from rora_theory import laws
from rora_theory.laws.sampling import RandomStep, StreamMoments
from rora_theory.paper import equations
from rora_theory.stats.estimate import Estimate, square_root

Quantity = Literal["mean", "second_moment", "variance", "norm"]
"""E[w_i], E[w_i^2], Var[w_i], and the root mean square of |w|_2 over draws."""

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def exact(setting: RandomStep) -> dict[Quantity, float]:
    """Compute the quantities by the exact law, for delta_i = 1."""
    law = laws.random_input_moments(
        rank=setting.rank,
        p_in=setting.p_in,
        scaling=setting.scaling,
        overlap=setting.overlap,
        learning_rate=setting.learning_rate,
        optimizer=setting.optimizer,
        init=setting.init,
    )
    second = float(law.second_moment[0])
    return {
        "mean": float(law.mean[0]),
        "second_moment": second,
        "variance": float(law.variance[0]),
        "norm": math.sqrt(setting.p_out * second),
    }


def printed(setting: RandomStep) -> dict[Quantity, float] | dict[Quantity, None]:
    """Compute the quantities by the paper's Eq. 6, 9 and 11, for delta_i = 1.

    They are None for Adam, which the paper's Eq. 3 excludes.
    """
    if setting.optimizer != "sgd":
        return dict.fromkeys(QUANTITIES)
    step: dict[str, Any] = {"rank": setting.rank, "p_in": setting.p_in}
    step |= {"scaling": setting.scaling, "learning_rate": setting.learning_rate}
    variance = equations.eq9_variance(1.0, **step)
    figures: dict[Quantity, float] = {
        "mean": equations.eq6_mean(1.0, **step) + 0.0,  # so that -0.0 is written as 0.0
        "second_moment": variance,
        "variance": variance,
        "norm": float(equations.eq11_norm(np.ones(setting.p_out), **step)),
    }
    return figures


def quantity_estimate(moments: StreamMoments, quantity: Quantity, *, step: float = 1.0) -> Estimate:
    """Return a simulated quantity of ``step`` times the simulated w.

    Args:
      moments: Moments of the simulated w and its norm.
      quantity: Quantity to estimate.
      step: Factor of w: a power of the scaling times the learning rate.

    Returns:
      The estimate.
    """
    estimates = {
        "mean": (moments.first.mean, 1),
        "second_moment": (moments.first.second_moment, 2),
        "variance": (moments.first.variance, 2),
        "norm": (square_root(moments.norm2.mean), 1),
    }
    simulated, power = estimates[quantity]
    return simulated.times(step**power)
