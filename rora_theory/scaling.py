"""Compute the scaling gamma of an adapter, and validate numbers and choices."""

import math
import numbers
from collections.abc import Collection
from typing import Any, Literal

from rora_theory.errors import InputError, shown

Rule = Literal["lora", "rora", "rslora"] | float
"""Name of a rule, or the exponent kappa of ``gamma = alpha / rank**kappa``."""

KAPPAS = {"lora": 1.0, "rora": 0.5, "rslora": 0.5}
"""Exponent kappa of each named rule; RoRA's rule (Sec. III-B) is rsLoRA's."""

LARGEST = 2**31 - 1
"""Maximum of counts and sizes: tokens, positions and array sizes are 32-bit integers."""


def exponent(rule: Rule, name: str = "rule") -> float:
    """Return the exponent kappa of a rule: 1 for ``"lora"``, 1/2 for ``"rora"`` and ``"rslora"``, a float itself.

    Args:
      rule: Name or exponent of the rule.
      name: Name of the argument, for the error.

    Raises:
      InputError: The name is unknown, or the exponent is not a finite number.
    """
    if isinstance(rule, str) and rule in KAPPAS:
        return KAPPAS[rule]
    if isinstance(rule, str) or not is_finite(rule):
        raise InputError(
            f"{name} must be {', '.join(KAPPAS)} or a finite exponent kappa such as 0.25, got {shown(rule)}"
        )
    return float(rule)


def scaling_factor(rule: Rule, *, alpha: float, rank: int) -> float:
    r"""Compute the scaling :math:`\gamma = \alpha / r^\kappa` of an adapter :math:`\gamma B A`.

    Args:
      rule: Scaling rule: ``"lora"`` (kappa = 1, Hu et al. 2021), ``"rora"`` or ``"rslora"`` (kappa = 1/2, RoRA Sec.
        III-B and Kalajdzievski 2023), or kappa itself.
      alpha: Numerator of the scaling, finite and > 0.
      rank: Number of rows of A, an integer >= 1.

    Returns:
      The scaling gamma, a positive float.

    Raises:
      InputError: An argument is outside the ranges above.

    Examples:
      >>> scaling_factor("lora", alpha=16, rank=64), scaling_factor("rora", alpha=16, rank=64)
      (0.25, 2.0)
    """
    check_integer("rank", rank)
    check_positive("alpha", alpha)
    kappa = exponent(rule)
    try:
        scaling = float(alpha) / float(rank) ** kappa
    except (OverflowError, ZeroDivisionError):
        scaling = math.inf
    if not 0 < scaling < math.inf:
        raise InputError(
            f"rule must give a positive float {alpha!r} / {rank}^kappa, got {rule!r}. Use a kappa closer to 0."
        )
    return scaling


def alpha_for(rule: Rule, *, scaling: float, rank: int) -> float:
    r"""Compute the alpha with which a rule gives a scaling at a rank: :math:`\alpha = \gamma r^\kappa`.

    Use it to convert a tuned adapter to another rule: LoRA's alpha 16 at rank 64 is RoRA's alpha 2.

    Args:
      rule: Scaling rule, see `scaling_factor`.
      scaling: Scaling gamma, finite and > 0.
      rank: Number of rows of A, an integer >= 1.

    Examples:
      >>> alpha_for("rora", scaling=scaling_factor("lora", alpha=16, rank=64), rank=64)
      2.0
    """
    check_positive("scaling", scaling)
    return float(scaling) / scaling_factor(rule, alpha=1.0, rank=rank)


def check_integer(name: str, value: Any, *, minimum: int = 1, maximum: int = LARGEST) -> None:
    """Raise `InputError` unless a value is an integer from ``minimum`` to ``maximum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise InputError(f"{name} must be an integer of {minimum} or more, got {shown(value)}")
    if int(value) > maximum:
        raise InputError(f"{name} must be an integer of at most {maximum:,}, got {shown(value)}")


def is_finite(value: object) -> bool:
    """Return whether a value is a finite real number that fits a float; booleans are not numbers."""
    try:
        return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


def check_between(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    closed: Literal["both", "left", "right", "neither"] = "both",
) -> None:
    """Raise `InputError` unless a value is a real number in an interval; booleans and NaN are refused.

    Args:
      name: Name of the argument, for the error.
      value: Value to check.
      low: Lower end of the interval.
      high: Upper end of the interval. If it is infinity, ``closed`` states whether infinity is accepted.
      closed: Ends that belong to the interval.

    Examples:
      >>> check_between("momentum", 0.9, 0, 1, closed="left")
      >>> check_between("momentum", 1.0, 0, 1, closed="left")
      Traceback (most recent call last):
      rora_theory.errors.InputError: momentum must be a number from 0 to below 1, got 1.0
    """
    # Compare the value as a float, because it is used as one: a positive fraction may underflow to 0.
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    has_low, has_high = closed in ("both", "left"), closed in ("both", "right")
    if (low <= number if has_low else low < number) and (number <= high if has_high else number < high):
        return
    # Describe the interval.
    if high == math.inf:
        kind, end = ("number", ", or inf") if has_high else ("finite number", "")
        expected = f"a {kind} " + (f"of {low:g} or more" if has_low else f"above {low:g}") + end
    elif has_low:
        expected = f"a number from {low:g} to {'' if has_high else 'below '}{high:g}"
    else:
        expected = f"a number above {low:g} and {'at most' if has_high else 'below'} {high:g}"
    raise InputError(f"{name} must be {expected}, got {shown(value)}")


def check_positive(name: str, value: float) -> None:
    """Raise `InputError` unless a value is a finite number > 0 that does not underflow to 0 as a float."""
    check_between(name, value, 0, closed="neither")


def check_not_negative(name: str, value: float) -> None:
    """Raise `InputError` unless a value is a finite number >= 0."""
    check_between(name, value, 0, closed="left")


def check_share(name: str, value: float) -> None:
    """Raise `InputError` unless a value is a share, 0 < value <= 1."""
    check_between(name, value, 0, 1, closed="right")


def check_instance(name: str, value: object, kind: Any, description: str) -> None:
    """Raise `InputError` unless ``value`` is an instance of a type, or of one type of a union.

    Args:
      name: Name of the argument, for the error.
      value: Value to check.
      kind: Type or union of types.
      description: Description of the type, such as ``"a Setting"``.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {description}, got {shown(value)}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise `InputError` unless ``value`` is one of ``choices``.

    Args:
      name: Name of the argument, for the error.
      value: Value to check.
      choices: Supported values.

    Examples:
      >>> check_choice("template", "none", ("train", "eval"))
      Traceback (most recent call last):
      rora_theory.errors.InputError: template must be one of train, eval, got 'none'
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")
