r"""How the best learning rate under Adam moves with the scaling, the rank, the steps, the schedule and the batch.

With :math:`G = \gamma r` the gain of the adapter, T the number of optimizer steps and n the batch size in records,

.. math:: \ln \frac{\eta'}{\eta} = \ln \frac{G (1 + \rho)}{G' (1 + \rho')} + a \ln \frac{r'}{r}
          + \tau \ln \frac{T'}{T} + \beta \ln \frac{n'}{n} + \ln \frac{s'}{s}

The first term is the displacement law (`rora_theory.laws.displacement`), the second the law of the rank at one gain
(`rora_theory.laws.rank`). tau, beta and the factors s of the schedules are empirical. Every term is a difference of a
function of the new and of the old run, so that a change there and back leaves the rate as it was, and a change over a
third setting ends at the same rate.

The range is central in log rate: each term has a spread between models and settings in proportion to the change, and a
best rate itself has the spread of a pair. `rora_theory.advice.constants` holds all of them with their sources.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from rora_theory.advice.constants import CONSTANTS, SCHEDULE_FACTORS
from rora_theory.laws.displacement import best_rate_factor
from rora_theory.laws.rank import rank_factor
from rora_theory.optimizers import Schedule

QUANTILE = 1.6448536269514722
"""Standard deviations on either side of the centre that hold 90% of a normal distribution."""


class RateRange(NamedTuple):
    """A learning rate with the range in which the best one is expected.

    Attributes:
      low: Lowest learning rate of the range.
      best: Learning rate to use.
      high: Highest learning rate of the range.
    """

    low: float
    best: float
    high: float

    def __format__(self, form: str) -> str:
        """Format the rate to use, followed by the range to two digits if it has one.

        Examples:
          >>> f"{RateRange(1e-4, 2e-4, 4e-4):.3g}, {RateRange(2e-4, 2e-4, 2e-4):.3g}"
          '0.0002 (0.0001 to 0.0004), 0.0002'
        """
        has_range = not math.isclose(self.low, self.high)
        return format(self.best, form) + (f" ({self.low:.2g} to {self.high:.2g})" if has_range else "")


@dataclass(frozen=True)
class Run:
    """Properties of a fine-tuning run on which its best learning rate depends.

    Attributes:
      rank: Rank of the adapter.
      gain: G, the scaling times the rank.
      steps: Number of optimizer steps; None if it is not known.
      schedule: Schedule of the learning rate; None if it is not known.
      batch_size: Number of records in an optimizer step; None if it is not known.
    """

    rank: int
    gain: float
    steps: int | None = None
    schedule: Schedule | None = None
    batch_size: int | None = None


class LogChange(NamedTuple):
    """Change of the logarithm of the best learning rate.

    Attributes:
      mean: Natural logarithm of the factor.
      spread: Standard deviation of that logarithm over models and settings.
    """

    mean: float
    spread: float


def best_rate_change(old: Run, new: Run, *, displacement_constant: float | None = None) -> LogChange:
    """Compute by how much the best learning rate changes from one run to another.

    A property that either run lacks counts as unchanged, and so does a schedule that was not measured.

    Args:
      old: Run for which a rate was tuned.
      new: Planned run.
      displacement_constant: Displacement constant K of the user's own runs; None uses the published one.

    Returns:
      The change of the logarithm of the rate; zero with no spread if the runs are alike.
    """
    constant = CONSTANTS["displacement_constant"].value if displacement_constant is None else displacement_constant
    growth_of_gain = math.log(new.gain / old.gain)
    terms = [
        LogChange(
            math.log(best_rate_factor(old.gain, new.gain, displacement_constant=constant)),
            CONSTANTS["gain_exponent"].spread * abs(growth_of_gain),
        ),
        LogChange(
            math.log(rank_factor(old.rank, new.rank, exponent=CONSTANTS["rank_exponent"].value)),
            CONSTANTS["rank_exponent"].spread * abs(math.log(new.rank / old.rank)),
        ),
        _power("steps_exponent", old.steps, new.steps),
        _power("batch_exponent", old.batch_size, new.batch_size),
        _schedule_change(old.schedule, new.schedule),
    ]
    spread = math.hypot(*(term.spread for term in terms))
    # Two runs that differ have best rates that scatter around the laws; a run and itself have one.
    if spread > 0:
        spread = math.hypot(spread, CONSTANTS["pair"].spread)
    return LogChange(math.fsum(term.mean for term in terms), spread)


def transfer_rate(rate: float, old: Run, new: Run, *, displacement_constant: float | None = None) -> RateRange:
    """Carry a tuned learning rate to another run.

    Args:
      rate: Best learning rate of the old run; the peak rate if there is a schedule.
      old: Run for which the rate was tuned.
      new: Planned run.
      displacement_constant: Displacement constant K of the user's own runs; None uses the published one.

    Returns:
      The learning rate to use, with a range that is meant to hold the best rate of 90% of models and settings.

    Examples:
      >>> [f"{value:.1g}" for value in transfer_rate(2e-4, Run(16, 32.0), Run(128, 32.0))]
      ['0.0002', '0.0003', '0.0003']
    """
    change = best_rate_change(old, new, displacement_constant=displacement_constant)
    if change.spread == 0:
        return RateRange(rate, rate, rate)
    best, factor = rate * math.exp(change.mean), math.exp(QUANTILE * change.spread)
    return RateRange(best / factor, best, best * factor)


def _power(name: str, old: int | None, new: int | None) -> LogChange:
    if old is None or new is None:
        return LogChange(0.0, 0.0)
    growth = math.log(new / old)
    return LogChange(CONSTANTS[name].value * growth, CONSTANTS[name].spread * abs(growth))


def _schedule_change(old: Schedule | None, new: Schedule | None) -> LogChange:
    before, after = SCHEDULE_FACTORS.get(str(old)), SCHEDULE_FACTORS.get(str(new))
    if old == new or before is None or after is None:
        return LogChange(0.0, 0.0)
    return LogChange(math.log(after.value / before.value), math.hypot(before.spread, after.spread))
