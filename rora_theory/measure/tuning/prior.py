"""Best learning rate of a planned run before any probe: the public sweeps' rates, transferred to the planned run."""

import math

from rora_theory.advice.best_rate import Run, best_rate_change
from rora_theory.evidence.starting_rates import starting_rate
from rora_theory.measure.tuning.belief import RateBelief

REFERENCE = Run(rank=16, gain=32.0, steps=780, schedule="cosine", batch_size=128)
"""Run to which the public sweeps' best rates belong. Their linear decay counts as the cosine that was measured here."""


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
