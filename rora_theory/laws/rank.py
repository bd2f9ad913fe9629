r"""How the best learning rate under Adam depends on the rank at one gain G = gamma r.

At one G the signal of a step does not depend on the rank, and cross-talk falls as :math:`1/\sqrt r`
(`rora_theory.laws.moments`). Three mechanisms by which cross-talk could lower the best rate of small ranks, with
:math:`r^*_m` the crossing rank of module m and w a constant:

- curvature: a step of size eta changes the loss by
  :math:`-\eta S + \eta^2 (S^2 l_s + N^2 l_n / r) / 2`, whose minimum lies at
  :math:`\eta^* \propto 1 / (1 + w\, \bar{r^*} / r)` with :math:`w = l_n / l_s` the curvature along random directions
  relative to that along the signal, and :math:`\bar{r^*}` the mean over modules, which share one rate;
- size: the best rate keeps the root mean square of the held-out change,
  :math:`\eta^* \propto (1 + \bar{r^*} / r)^{-1/2}`;
- the same two, with the geometric mean over modules of each module's own best rate.

None of them predicts the public sweeps' best rates better than the power law :math:`\eta^* \propto r^a` does, which the
advice uses: it is empirical. `rora_theory.evidence` judges all of them on models that gave no constant.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer

Mechanism = Literal["curvature", "size"]
"""What a small rank changes: the curvature of the loss along the step, or the size of the held-out change."""


def rank_factor(old_rank: int, new_rank: int, *, exponent: float) -> float:
    """Compute the factor of the best learning rate at another rank and the same gain, by the power law.

    Args:
      old_rank: Rank at which the rate was tuned, 1 or more.
      new_rank: New rank, 1 or more.
      exponent: Exponent a of the best rate in the rank.

    Returns:
      The new best rate divided by the old one.

    Raises:
      InputError: If a rank is not an integer of 1 or more.

    Examples:
      >>> round(rank_factor(16, 128, exponent=0.157), 2)
      1.39
    """
    check_integer("old_rank", old_rank)
    check_integer("new_rank", new_rank)
    return (new_rank / old_rank) ** exponent


def cross_talk_factor(
    rank: int,
    crossing_ranks: Sequence[float] | Float[np.ndarray, " modules"],
    *,
    mechanism: Mechanism,
    weight: float = 1.0,
    by_module: bool = False,
) -> float:
    r"""Compute the best learning rate at a rank, relative to that at a rank without cross-talk, by a mechanism.

    Args:
      rank: Rank of the adapter, 1 or more.
      crossing_ranks: Crossing rank of every module, 0 or more.
      mechanism: ``"curvature"`` for :math:`1 / (1 + w r^*/r)`, ``"size"`` for its square root.
      weight: Constant w.
      by_module: Whether to take the geometric mean of the modules' own factors instead of the factor at the mean
        crossing rank.

    Returns:
      The factor, above 0 and at most 1.

    Raises:
      InputError: If the rank is not an integer of 1 or more, or a crossing rank is negative or not finite.

    Examples:
      >>> cross_talk_factor(8, [8.0], mechanism="curvature"), cross_talk_factor(8, [24.0], mechanism="size")
      (0.5, 0.5)
    """
    check_integer("rank", rank)
    values = np.asarray(crossing_ranks, np.float64)
    if not values.size or not np.isfinite(values).all() or values.min() < 0:
        raise InputError(f"crossing_ranks must be one or more finite numbers of at least 0, got {values.tolist()}")
    ratios = weight * values / rank
    power = {"curvature": -1.0, "size": -0.5}[mechanism]
    log_growth = np.mean(np.log1p(ratios)) if by_module else np.log1p(np.mean(ratios))
    return math.exp(power * float(log_growth))
