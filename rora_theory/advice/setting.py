r"""Tuned setting of an adapter, and the change of the first step's size from one setting to another.

A rank-r step from B = 0 is a sum of r one-row steps, equal in law and independent, so that its mean square is

.. math:: E[w^2] = (\eta \gamma^p s^p)^2 K\, (r^2 + c\, r), \qquad p = 2 \text{ (SGD)},\ 1 \text{ (Adam)}

with s the deviation of A's entries, K a constant of the module and its data, and the **linear term** c the variance of
a one-row step over its squared mean, both summed over outputs and tokens. c = 0 is signal alone, c = inf cross-talk
alone; with Gaussian A it is r* + 1 for SGD and r* - 2 for Adam, r* from `laws.crossing_rank`.
`rora_theory.measure.regimes.terms` measures it. The size of the step then changes by the factor

.. math:: \frac{\eta'}{\eta} \left( \frac{\gamma'}{\gamma} \frac{s'}{s} \right)^p \sqrt{\frac{r'^2 + c r'}{r^2 + c r}}.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property

from rora_theory import inits
from rora_theory.errors import InputError
from rora_theory.optimizers import FAMILY, OptimizerName, parse_optimizer, scaling_power
from rora_theory.scaling import Rule, alpha_for, check_between, check_integer, check_positive, scaling_factor

SIGNAL, CROSS_TALK = 0.0, math.inf
"""Linear terms of the two limits."""

REGIMES = {"signal": SIGNAL, "cross-talk": CROSS_TALK}


@dataclass(frozen=True)
class Setting:
    """Rank, alpha, learning rate, rule, optimizer and initialisation of an adapter.

    Numbers of NumPy are converted to Python's.

    Attributes:
      rank: Rank r, 1 or more.
      alpha: Alpha, above 0.
      learning_rate: Learning rate, above 0; the peak rate if there is a schedule.
      rule: Scaling rule, see `rora_theory.scaling_factor`.
      optimizer: Name of the optimizer, or a name that `rora_theory.optimizers.parse_optimizer` accepts.
      init: Distribution of A's entries, see `rora_theory.inits.entries`. The standard deviation of ``"gaussian"``
        depends on the rank.

    Raises:
      InputError: If a value is out of range.
    """

    rank: int
    alpha: float
    learning_rate: float
    rule: Rule = "lora"
    optimizer: OptimizerName = "adamw"
    init: inits.Init = "kaiming_uniform"

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        object.__setattr__(self, "optimizer", parse_optimizer(self.optimizer))
        # Computing these validates the rank, initialisation, rule and alpha.
        inits.entries(self.init, rank=self.rank, p_in=1)
        _ = self.scaling
        # Numbers of NumPy become Python's, so that the setting is printed and stored as plain numbers.
        types = {"rank": int, "alpha": float, "learning_rate": float}
        if not isinstance(self.rule, str):
            types["rule"] = float
        for name, number_type in types.items():
            object.__setattr__(self, name, number_type(getattr(self, name)))

    @cached_property
    def scaling(self) -> float:
        """Scaling gamma of the adapter."""
        return scaling_factor(self.rule, alpha=self.alpha, rank=self.rank)

    @property
    def gain(self) -> float:
        """Gain G of the adapter: the scaling times the rank."""
        return self.scaling * self.rank

    @property
    def power(self) -> int:
        """Power p of gamma and of A's deviation in the size of the first step."""
        return scaling_power(FAMILY[self.optimizer])

    def with_scaling(self, scaling: float) -> "Setting":
        """Return the setting with the alpha that gives a scaling gamma."""
        return replace(self, alpha=alpha_for(self.rule, scaling=scaling, rank=self.rank))


def rank_growth(old_rank: int, new_rank: int, linear_term: float) -> float:
    r"""Compute the growth of the first step's root mean square with the rank, at fixed gamma and learning rate.

    .. math:: \sqrt{(r'^2 + c r') / (r^2 + c r)}

    Args:
      old_rank: Rank r, 1 or more.
      new_rank: Rank r', 1 or more.
      linear_term: Linear term c, above -1: 0 if only the signal counts (r'/r), infinity if only cross-talk does
        (sqrt(r'/r)).

    Returns:
      The root mean square at the new rank divided by that at the old one.

    Raises:
      InputError: If a value is out of range.

    Examples:
      >>> rank_growth(8, 128, SIGNAL), rank_growth(8, 128, CROSS_TALK), round(rank_growth(8, 128, 5.0), 3)
      (16.0, 4.0, 12.794)
    """
    check_integer("old_rank", old_rank)
    check_integer("new_rank", new_rank)
    # At -1 the first step of rank 1 vanishes.
    check_between("linear_term", linear_term, -1, closed="right")
    if linear_term > 1e100:  # the ranks are below its rounding error, and products may overflow
        return math.sqrt(new_rank / old_rank)
    return math.sqrt(new_rank * (new_rank + linear_term) / (old_rank * (old_rank + linear_term)))


def step_ratio(new: Setting, old: Setting, linear_term: float) -> float:
    """Compute the root mean square of the first step under a new setting, divided by that under the old one.

    Args:
      new: New setting, with the optimizer and the initialisation of the old one.
      old: Old setting.
      linear_term: Linear term c of the module, under that optimizer and initialisation.

    Returns:
      The ratio of the root mean squares.

    Raises:
      InputError: If the optimizer or the initialisation differs, or if the ratio is not representable as a float.
    """
    for name in ("optimizer", "init"):
        if getattr(new, name) != getattr(old, name):
            raise InputError(
                f"{name} must be {getattr(old, name)!r} as in the old setting, got {getattr(new, name)!r}: the effect "
                "of the rank depends on it"
            )
    # The step depends on gamma times the standard deviation of A, which may depend on the rank. The number of inputs
    # cancels in the ratio.
    new_deviation, old_deviation = (
        inits.entries(setting.init, rank=setting.rank, p_in=1).deviation for setting in (new, old)
    )
    rate_ratio, rank_factor = new.learning_rate / old.learning_rate, rank_growth(old.rank, new.rank, linear_term)
    try:
        scaling_ratio = new.scaling * new_deviation / (old.scaling * old_deviation)
        ratio = rate_ratio * scaling_ratio**new.power * rank_factor
    except (OverflowError, ZeroDivisionError):
        ratio = math.inf
    if not sys.float_info.min <= ratio < math.inf:
        raise InputError(
            f"alpha and learning_rate must be closer to the old ones ({old.alpha:g} and {old.learning_rate:g}), got "
            f"{new.alpha:g} and {new.learning_rate:g}: the ratio of the first steps is not representable as a float"
        )
    return ratio
