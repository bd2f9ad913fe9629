"""The cost of a choice: held-out loss at a policy's learning rate, minus the lowest measured loss.

A policy maps the learning rate tuned in one setting to the rate to use in another. Its regret is
interpolated on the measured curve of the other setting, so that policies can be compared at rates that were not run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from rora_theory.stats.estimate import Estimate
from rora_theory.stats.rate_curves import Curve, estimate

Policy = Callable[[float], float]
"""Maps the learning rate tuned in the old setting to the learning rate of the new one."""

SHIFTS = 16
"""Number of rates on each side of the tuned one at which a regret is computed for its range."""


@dataclass(frozen=True)
class Regret:
    """The cost of a policy's learning rate in one setting.

    Attributes:
      learning_rate: Learning rate given by the policy from the tuned optimum.
      nats: Regret in nats per token. Its error is over seeds and held-out records, paired; its bound is how far
        the true minimum may lie below the lowest measured loss.
      low: Smallest regret over the 95% interval of the tuned optimum, in nats per token.
      high: Largest regret over the 95% interval of the tuned optimum, in nats per token.
      lowest_loss: Lowest measured held-out loss of the new setting, in nats per token, averaged over seeds.
      is_lower_bound: Whether the rate lies outside the measured rates, or next to one that diverged, so that the
        regret is at least `nats`.
    """

    learning_rate: float
    nats: Estimate
    low: float
    high: float
    lowest_loss: float
    is_lower_bound: bool

    @property
    def per_cent(self) -> float:
        """Regret as a percentage of the lowest loss."""
        return 100 * self.nats.value / self.lowest_loss

    def row(self) -> dict[str, Any]:
        """Return the regret as columns of a table: the rate, the regret with its error, range and bounds.

        Returns:
          ``learning_rate``; ``regret`` in nats per token with ``standard_error``, 95% ``half_width`` and
          ``error_over``; ``low`` and ``high``; ``per_cent``; ``lowest_loss``; and ``is_lower_bound``.
        """
        half_width = self.nats.half_width()
        return {
            "learning_rate": self.learning_rate,
            "regret": self.nats.value,
            "standard_error": self.nats.known_error,
            "half_width": half_width if math.isfinite(half_width) else None,
            "error_over": self.nats.over,
            "low": self.low,
            "high": self.high,
            "per_cent": self.per_cent,
            "lowest_loss": self.lowest_loss,
            "is_lower_bound": self.is_lower_bound,
        }


def regrets_at(
    curve: Curve, learning_rates: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Compute the regret of learning rates above 0, as the mean over seeds.

    The reference is one rate for all seeds, the measured one with the lowest mean loss, so that the noise of single
    seeds doesn't count as regret.

    Returns:
      The regret at each rate in nats per token, and whether it is a lower bound, see `Curve.losses_at`.
    """
    losses, is_lower_bound = curve.losses_at(learning_rates)
    return np.mean(losses - curve.losses[:, [curve.lowest]], axis=0), is_lower_bound


def regret(tuned: Curve, target: Curve, policy: Policy) -> Regret:
    """Compute the regret of a policy that carries a tuned learning rate to another setting.

    The tuned rate is the geometric mean of the seeds' best rates; its uncertainty is reported as the range of the
    regret, not as part of the error. The lowest loss is that of `regrets_at`.

    Args:
      tuned: Loss against learning rate in the setting where the rate was tuned.
      target: Loss against learning rate in the setting that the policy carries it to.
      policy: Maps the tuned learning rate to the new one.

    Returns:
      The regret.
    """
    optimum = tuned.log2_optimum
    # An unknown error gives no range.
    half_width = optimum.half_width() if math.isfinite(optimum.half_width()) else 0.0
    # Rates of the policy over the confidence interval of the tuned optimum, with that of the optimum in the middle.
    shifts = np.linspace(-half_width, half_width, 2 * SHIFTS + 1)
    learning_rates = np.array([policy(float(2 ** (optimum.value + shift))) for shift in shifts])

    # The reference is one rate for all seeds and for all resamples of the records.
    lowest = target.lowest

    def seed_regrets(curve: Curve) -> Float[np.ndarray, " seeds"]:
        return curve.losses_at(learning_rates[[SHIFTS]])[0][:, 0] - curve.losses[:, lowest]

    over_interval, is_lower_bound = regrets_at(target, learning_rates)
    nats = estimate(seed_regrets, target)
    # For a single seed `estimate` averages over resampled records. Report the measured value instead.
    nats = replace(nats, value=float(over_interval[SHIFTS]), bound=target.grid_error)
    return Regret(
        float(learning_rates[SHIFTS]),
        nats,
        low=float(np.min(over_interval)),
        high=float(np.max(over_interval)),
        lowest_loss=float(np.mean(target.losses[:, lowest])),
        is_lower_bound=bool(is_lower_bound[SHIFTS]),
    )
