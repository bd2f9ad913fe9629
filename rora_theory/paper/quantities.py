"""Mean, second moment, variance and norm of the paper's w: simulated, by the exact law, and as printed."""

import math
from typing import Any, Literal, get_args

import numpy as np

from rora_theory.paper import equations
from rora_theory.stats.estimate import Estimate, root
from rora_theory.theory import laws
from rora_theory.theory.sampling import RandomStep, Sums

Quantity = Literal["mean", "second_moment", "variance", "norm"]
"""E[w_i], E[w_i^2], Var[w_i], and the root mean square of |w|_2 over draws."""

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def exact(setting: RandomStep) -> dict[Quantity, float]:
    """The exact law's figures, delta_i = 1."""
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
    """The paper's figures, Eq. 6, 9 and 11 at delta_i = 1; none for Adam, which its Eq. 3 excludes."""
    if setting.optimizer != "sgd":
        return dict.fromkeys(QUANTITIES)
    step: dict[str, Any] = {"rank": setting.rank, "p_in": setting.p_in}
    step |= {"scaling": setting.scaling, "learning_rate": setting.learning_rate}
    variance = equations.eq9_variance(1.0, **step)
    figures: dict[Quantity, float] = {
        "mean": equations.eq6_mean(1.0, **step) + 0.0,  # -0.0 is written as 0.0
        "second_moment": variance,
        "variance": variance,
        "norm": float(equations.eq11_norm(np.ones(setting.p_out), **step)),
    }
    return figures


def quantity_estimate(sums: Sums, quantity: Quantity, *, step: float = 1.0) -> Estimate:
    """One simulated figure, for w = ``step`` times the simulated one: its scaling's power and its rate."""
    found = {
        "mean": (sums.first.mean, 1),
        "second_moment": (sums.first.second_moment, 2),
        "variance": (sums.first.variance, 2),
        "norm": (root(sums.norm2.mean), 1),
    }
    simulated, power = found[quantity]
    return simulated.times(step**power)
