"""Best learning rate of a planned run, as public sweeps lead to expect: a rate that needs no model and no data.

The best rates of public models by size (`rora_theory.evidence.starting_rates`) are transferred to the planned scaling,
rank, batch, number of steps and schedule by the law of the advice (`rora_theory.advice.best_rate`). The result is a
distribution of the best rate, and what it costs to train at its median, or at three rates around it.
"""

import math
from dataclasses import dataclass
from typing import Any

from rora_theory.advice.best_rate import QUANTILE, RateRange, Run, best_rate_change
from rora_theory.evidence.starting_rates import models, starting_rate

CURVATURE = 0.042
"""Median curvature c of our curves of SmolLM2-135M after 64 steps, in nats per token: a rate twice too high or low
costs 0.010. Gemma 3 270M has a little more."""

PUBLIC_CURVATURE = 0.009
"""Median curvature of the public sweeps of larger models, in nats per token."""

REFERENCE = Run(rank=16, gain=32.0, steps=780, schedule="cosine", batch_size=128)
"""Run to which the public sweeps' best rates belong. Their linear decay counts as the cosine that was measured here."""

LOG_STEP = math.log(2)
"""Natural logarithm of the ratio of adjacent rates of `RateBelief.three_rates`."""


@dataclass(frozen=True)
class RateBelief:
    r"""Distribution of the best learning rate of a run, normal in its logarithm.

    Expected regrets assume that the held-out loss is a parabola in the logarithm x of the rate,
    :math:`\tfrac{c}{2} (x - x^*)^2` above its minimum at :math:`x^*`, with the curvature c of a small model
    (`CURVATURE`). Regrets are proportional to it. The median of larger models has a fifth of it (`PUBLIC_CURVATURE`).

    Attributes:
      mean: Mean of the natural logarithm.
      spread: Standard deviation of the natural logarithm, above 0.
    """

    mean: float
    spread: float

    @property
    def rates(self) -> RateRange:
        """Median of the distribution with its central 90% range."""
        factor = math.exp(QUANTILE * self.spread)
        best = math.exp(self.mean)
        return RateRange(best / factor, best, best * factor)

    @property
    def three_rates(self) -> tuple[float, float, float]:
        """Half the median, the median and twice the median: the rates to train if the rate matters."""
        best = math.exp(self.mean)
        return best / 2, best, best * 2

    @property
    def expected_regret(self) -> float:
        """Expected regret of the median in nats per token."""
        return 0.5 * CURVATURE * self.spread**2

    @property
    def expected_regret_of_three(self) -> float:
        r"""Expected regret in nats per token if `three_rates` are trained and the one with the lowest loss is kept.

        With s the spread and :math:`d = \ln 2`, it is

        .. math:: \tfrac{c}{2} \, E \min_{k \in \{-1, 0, 1\}} (x - k d)^2
                  = \tfrac{c}{2} \left( s^2 - 4 d s \, \varphi(z) + 2 d^2 Q(z) \right), \qquad z = \frac{d}{2 s}

        where x is normal with standard deviation s, :math:`\varphi` the density and Q the upper tail of the standard
        normal distribution. It assumes that the lowest loss is recognised: held-out losses have no noise.
        """
        z = LOG_STEP / (2 * self.spread)
        density = math.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        upper_tail = 0.5 * math.erfc(z / math.sqrt(2))
        distance = self.spread**2 - 4 * LOG_STEP * self.spread * density + 2 * LOG_STEP**2 * upper_tail
        return 0.5 * CURVATURE * distance


def rate_prior(run: Run, *, family: str | None = None, parameters: float | None = None) -> RateBelief:
    """Compute the best learning rate that public sweeps lead to expect for a planned run.

    The rate of the model's size (and family, if it is one of the sweeps') is transferred from the sweeps' run to the
    planned one by the law of the advice. The spread is that over models and that of the law, in quadrature.

    Args:
      run: Planned run.
      family: Family of the model, one of `rora_theory.evidence.starting_rates.families`; None is another.
      parameters: Number of parameters in billions; None is not known.

    Returns:
      The distribution of the best rate.

    Raises:
      InputError: If the family is unknown or the number of parameters is out of range.

    Examples:
      >>> prior = rate_prior(Run(16, 32.0, 780, "cosine", 128), parameters=8.0)
      >>> f"{prior.rates.best:.1e}"
      '5.4e-04'
    """
    start, change = starting_rate(family=family, parameters=parameters), best_rate_change(REFERENCE, run)
    return RateBelief(start.log_mean + change.mean, math.hypot(start.log_spread, change.spread))


@dataclass(frozen=True)
class ExpectedRate:
    """Learning rate for a planned run that has not been tuned.

    Attributes:
      belief: Distribution of the best rate.
      steps: Number of optimizer steps of the planned run.
      config: Settings of the planned run's adapter: PEFT's ``LoraConfig``, or its entries as a dictionary.
      assumptions: Sentences that state what the result assumes.
    """

    belief: RateBelief
    steps: int
    config: Any
    assumptions: tuple[str, ...]

    @property
    def learning_rate(self) -> float:
        """Learning rate for the planned run."""
        return self.belief.rates.best

    @property
    def low(self) -> float:
        """Lowest rate of the range that is expected to hold the best rate of 90% of runs."""
        return self.belief.rates.low

    @property
    def high(self) -> float:
        """Highest rate of that range."""
        return self.belief.rates.high

    @property
    def expected_regret(self) -> float:
        """Expected regret of the learning rate in nats per token, see `RateBelief`."""
        return self.belief.expected_regret

    @property
    def expected_regret_of_three(self) -> float:
        """Expected regret of the best of three full runs, see `RateBelief.expected_regret_of_three`."""
        return self.belief.expected_regret_of_three

    def sentence(self) -> str:
        """Return the learning rate with its range, and what two further runs are expected to gain."""
        half, rate, double = self.belief.three_rates
        return (
            f"Train {self.steps:,} steps at learning rate {rate:.3g} (90% range {self.low:.2g} to {self.high:.2g}); "
            f"its expected regret is {self.expected_regret:.4f} nats per token. If the rate matters, also train at "
            f"{half:.3g} and {double:.3g} and keep the lowest held-out loss: the expected regret is then "
            f"{self.expected_regret_of_three:.4f}."
        )


def expected_rate(
    run: Run, *, config: Any, family: str | None = None, parameters: float | None = None, remarks: tuple[str, ...] = ()
) -> ExpectedRate:
    """Return the learning rate that public sweeps lead to expect for a planned run, with what it assumes.

    Args:
      run: Planned run, with its number of steps.
      config: Settings of the planned run's adapter.
      family: Family of the model, see `rate_prior`.
      parameters: Number of parameters in billions; None is not known.
      remarks: Further sentences for the assumptions.

    Returns:
      The rate.

    Raises:
      InputError: If the family is unknown or the number of parameters is out of range.
    """

    def twofold(curvature: float) -> float:
        return 0.5 * curvature * LOG_STEP**2

    prior = rate_prior(run, family=family, parameters=parameters)
    assumptions = [
        f"The rate is the best one of {len(models())} public models (1B to 1T parameters) by size, transferred to this "
        "scaling, rank, batch, number of steps and schedule by the law of the advice.",
        "The expected regrets assume a loss that depends on the rate as in our runs of SmolLM2-135M (a rate twice too "
        f"high or low costs {twofold(CURVATURE):.3f} nats per token; {twofold(PUBLIC_CURVATURE):.3f} in the median of "
        "public sweeps of larger models), and held-out losses without noise.",
    ]
    sizes = [model.parameters for model in models()]
    if parameters is not None and not min(sizes) <= parameters <= max(sizes):
        place = "smaller" if parameters < min(sizes) else "larger"
        assumptions.append(f"The model is {place} than all of these; the rate is extrapolated by size.")
    return ExpectedRate(prior, run.steps or 0, config, (*assumptions, *remarks))
