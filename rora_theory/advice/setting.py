r"""A tuned setting, and how the size of the first step moves from one setting to another.

A rank-r step from B = 0 is a sum of r one-row steps, equal in law and independent, so that its mean square is

.. math:: E[w^2] = (\eta \gamma^p s^p)^2 K\, (r^2 + c\, r), \qquad p = 2 \text{ (SGD)},\ 1 \text{ (Adam)}

with s the deviation of A's entries, K a constant of the module and its data, and the **linear term** c the variance of
a one-row step over its squared mean, both summed over outputs and tokens. c = 0 is signal alone, c = inf cross-talk
alone; with Gaussian A it is r* + 1 for SGD and r* - 2 for Adam, r* from `laws.crossing_rank`.
`rora_theory.measure.regimes.terms` measures it. All else follows: the step's size changes with the rank by

.. math:: \frac{\eta'}{\eta} \left( \frac{\gamma'}{\gamma} \frac{s'}{s} \right)^p \sqrt{\frac{r'^2 + c r'}{r^2 + c r}}.
"""

import math
import sys
from dataclasses import dataclass, replace

from rora_theory import inits
from rora_theory.errors import InputError, shown
from rora_theory.optimizers import FAMILY, OptimizerName, optimizer_named
from rora_theory.scaling import Rule, alpha_for, check_positive, check_rank, is_finite, scaling_factor
from rora_theory.theory.laws import scaling_power

SIGNAL, CROSS_TALK = 0.0, math.inf
"""Linear terms of the two limits."""

REGIMES = {"signal": SIGNAL, "cross-talk": CROSS_TALK}


@dataclass(frozen=True)
class Setting:
    """What the size of the first step depends on, the data apart. Numbers of NumPy become Python's.

    Attributes:
      rank: r >= 1.
      alpha: > 0.
      learning_rate: eta > 0, of the step (a warm-up's factor is the same at every rank).
      rule: how gamma depends on rank, see `rora_theory.scaling_factor`.
      optimizer: one of `rora_theory.optimizers.OptimizerName`, or what `rora_theory.optimizers.optimizer_named` takes.
      init: law of A, see `rora_theory.inits.entries`; ``"gaussian"``'s deviation depends on the rank.

    Raises:
      InputError: a value outside these ranges.
    """

    rank: int
    alpha: float
    learning_rate: float
    rule: Rule = "lora"
    optimizer: OptimizerName = "adamw"
    init: inits.Init = "kaiming_uniform"

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        object.__setattr__(self, "optimizer", optimizer_named(self.optimizer))
        inits.entries(self.init, rank=self.rank, p_in=1)
        _ = self.scaling
        rule = {} if isinstance(self.rule, str) else {"rule": float}
        for name, kind in {"rank": int, "alpha": float, "learning_rate": float, **rule}.items():
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def scaling(self) -> float:
        """gamma."""
        return scaling_factor(self.rule, alpha=self.alpha, rank=self.rank)

    @property
    def power(self) -> int:
        """p, the power of gamma and of s in the step."""
        return scaling_power(FAMILY[self.optimizer])

    def with_scaling(self, scaling: float) -> "Setting":
        """The setting whose alpha gives this gamma."""
        return replace(self, alpha=alpha_for(self.rule, scaling=scaling, rank=self.rank))


def check_setting(name: str, value: object) -> None:
    """Raise `InputError` unless ``value`` is a `Setting`."""
    if not isinstance(value, Setting):
        raise InputError(f"{name} is {shown(value)}; accepted is a Setting")


def check_linear_term(name: str, value: float) -> None:
    """Raise `InputError` unless ``value`` is a number above -1, at which a rank-1 step has no mean square, or inf."""
    if not (is_finite(value) or value == math.inf) or value <= -1:
        raise InputError(f"{name} is {shown(value)}; accepted is a number above -1, or inf")


def growth(old_rank: int, new_rank: int, linear_term: float) -> float:
    r""":math:`\sqrt{(r'^2 + c r') / (r^2 + c r)}`: what the rank alone does to the rms of the first step.

    Args:
      old_rank, new_rank: r and r', 1 or more.
      linear_term: c > -1; 0 is signal alone (r'/r), infinity cross-talk alone (sqrt(r'/r)).

    Raises:
      InputError: a value outside these ranges.

    Examples:
      >>> growth(8, 128, SIGNAL), growth(8, 128, CROSS_TALK), round(growth(8, 128, 5.0), 3)
      (16.0, 4.0, 12.794)
    """
    check_rank(old_rank)
    check_rank(new_rank)
    check_linear_term("linear_term", linear_term)
    if linear_term > 1e100:  # the ranks beside it are no digit of a float, and its products may be none
        return math.sqrt(new_rank / old_rank)
    return math.sqrt(new_rank * (new_rank + linear_term) / (old_rank * (old_rank + linear_term)))


def step_ratio(new: Setting, old: Setting, linear_term: float) -> float:
    """How many times larger the rms of the first step is under ``new`` than under ``old``.

    Args:
      new, old: of one optimizer and one init; rank, alpha, rate and rule may differ.
      linear_term: of the module, under that optimizer and init.

    Raises:
      InputError: another optimizer or init, which changes more than a factor, or a factor that no float holds.
    """
    for name in ("optimizer", "init"):
        if getattr(new, name) != getattr(old, name):
            raise InputError(
                f"{name} is {getattr(new, name)!r} after {getattr(old, name)!r}; accepted is the same one: what a rank "
                "does to the step depends on it"
            )
    deviation = [inits.entries(each.init, rank=each.rank, p_in=1).deviation for each in (new, old)]
    rate, grown = new.learning_rate / old.learning_rate, growth(old.rank, new.rank, linear_term)
    try:
        strength = new.scaling * deviation[0] / (old.scaling * deviation[1])
        ratio = rate * strength**new.power * grown
    except (OverflowError, ZeroDivisionError):
        ratio = math.inf
    if not sys.float_info.min <= ratio < math.inf:
        raise InputError(
            f"alpha is {new.alpha:g} after {old.alpha:g} and learning_rate {new.learning_rate:g} after "
            f"{old.learning_rate:g}: the step's factor or its inverse is not a float; accepted are nearer values"
        )
    return ratio
