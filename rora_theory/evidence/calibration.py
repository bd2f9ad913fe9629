"""Calibration of a stated range: the share of pairs of settings whose best rate lies inside it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import special

from rora_theory.advice.best_rate import RateRange
from rora_theory.errors import InputError
from rora_theory.evidence.policies import RangedRateFactor
from rora_theory.evidence.sweeps import BestRateFit, Sweep
from rora_theory.stats.estimate import ROUNDING, Estimate, jackknife

LEVEL = 0.9
"""Level that the range of a policy is meant to have."""


@dataclass(frozen=True)
class Calibration:
    """How often the best rate of a new setting lies in the range that a policy states.

    Attributes:
      share: Share of the pairs whose measured best rate lies inside, with the jackknife's standard error over models.
      share_with_errors: The same, where the ends of the range are moved outwards for the error of the two measured best
        rates, which the range does not contain.
      pairs: Number of pairs.
      models: Number of models.
      median_width: Median over pairs of the range's high end divided by its low end.
      needed_scale: Factor by which the range's logarithmic half widths would have to be multiplied so that the stated
        share of the pairs lies inside, with errors; 1 is calibrated, below 1 the range is wider than needed. Infinite
        if it is a single rate that misses too often.
    """

    share: Estimate
    share_with_errors: Estimate
    pairs: int
    models: int
    median_width: float
    needed_scale: float


def calibrate(sweeps: Sequence[Sweep], policy: RangedRateFactor) -> Calibration:
    r"""Compare the range of a policy with the measured ratios of best rates.

    A pair consists of two settings of one model whose best rates lie inside their grids, the new one with a higher rank
    or with a higher G at the same rank. If the range is the central
    interval of the true ratio at a level, and the measured log ratio has the standard error s, then the measured ratio
    lies in the range widened to :math:`\sqrt{h^2 + (z s)^2}` on each side with about the same probability, where h is
    the range's half width on that side and z the normal quantile of the level.

    Args:
      sweeps: Sweeps with at least one pair.
      policy: Factor of the best rate with its range.

    Returns:
      The shares, with models as clusters.

    Raises:
      InputError: If there is no pair.
    """
    quantile = float(special.ndtri(0.5 + LEVEL / 2))
    by_model: dict[str, list[_Pair]] = {}
    for sweep in sweeps:
        inside = [fit for fit in sweep.fits if fit.is_inside]
        for old, new in itertools.permutations(inside, 2):
            # The reverse of a pair has the reciprocal ratio.
            if (new.curve.rank, new.curve.gain) < (old.curve.rank, old.curve.gain):
                continue
            factors = policy(old.curve.rank, old.curve.gain, new.curve.rank, new.curve.gain)
            by_model.setdefault(sweep.model, []).append(_Pair.from_fits(old, new, factors))
    if not by_model:
        raise InputError("sweeps must have a pair of best rates inside their grids, got none")
    groups = list(by_model.values())
    pairs = [pair for group in groups for pair in group]

    def share(members: Sequence[int], quantile: float) -> float:
        return float(np.mean([pair.is_inside(quantile) for index in members for pair in groups[index]]))

    return Calibration(
        share=jackknife(partial(share, quantile=0.0), len(groups), "models"),
        share_with_errors=jackknife(partial(share, quantile=quantile), len(groups), "models"),
        pairs=len(pairs),
        models=len(groups),
        median_width=float(np.median([pair.width for pair in pairs])),
        # The smallest scale with which the stated share of the pairs lies inside.
        needed_scale=sorted(pair.needed_scale(quantile) for pair in pairs)[math.ceil(LEVEL * len(pairs)) - 1],
    )


class _Pair(NamedTuple):
    """Measured ratio of two best rates and a stated range, in octaves.

    Attributes:
      distance: Absolute distance of the measured ratio from the stated factor.
      half_width: Half width of the range on that side.
      error: Standard error of the measured ratio.
      width: High end of the range divided by its low end.
    """

    distance: float
    half_width: float
    error: float
    width: float

    @classmethod
    def from_fits(cls, old: BestRateFit, new: BestRateFit, factors: RateRange) -> "_Pair":
        distance = new.log2_rate.value - old.log2_rate.value - math.log2(factors.best)
        half_width = math.log2(factors.high / factors.best if distance > 0 else factors.best / factors.low)
        errors = [fit.log2_rate.error if fit.log2_rate.has_error else 0.0 for fit in (old, new)]
        return cls(abs(distance), half_width, math.hypot(*errors), factors.high / factors.low)

    def is_inside(self, quantile: float) -> bool:
        return self.distance <= math.hypot(self.half_width, quantile * self.error) + ROUNDING

    def needed_scale(self, quantile: float) -> float:
        outside = math.sqrt(max(self.distance**2 - (quantile * self.error) ** 2, 0.0))
        if self.half_width:
            return outside / self.half_width
        return math.inf if outside > ROUNDING else 0.0
