"""The adapter's scaling gamma: the only place that computes it."""

import math
import numbers
from typing import Literal

from rora_theory.errors import InputError, shown

Rule = Literal["lora", "rora", "rslora"] | float
"""A named rule, or the exponent kappa itself of ``gamma = alpha / rank**kappa``."""

KAPPAS = {"lora": 1.0, "rora": 0.5, "rslora": 0.5}
"""Exponent kappa of each named rule; RoRA's rule (Sec. III-B) is rsLoRA's."""

LARGEST = 2**31 - 1
"""Of counts and sizes: tokens, positions and array sizes are 32-bit integers."""


def exponent(rule: Rule) -> float:
    """The exponent kappa of a rule: 1 for ``"lora"``, 1/2 for ``"rora"`` and ``"rslora"``, a float is itself.

    Raises:
      InputError: an unknown name, or an exponent that is not a finite number.
    """
    if isinstance(rule, str):
        if rule not in KAPPAS:
            raise InputError(f"rule is {rule!r}; accepted are {', '.join(KAPPAS)} or a finite exponent kappa")
        return KAPPAS[rule]
    if not is_finite(rule):
        raise InputError(f"rule is {shown(rule)}; accepted are {', '.join(KAPPAS)} or a finite exponent kappa")
    return float(rule)


def scaling_factor(rule: Rule, *, alpha: float, rank: int) -> float:
    r"""The scaling :math:`\gamma = \alpha / r^\kappa` of an adapter :math:`\gamma B A`.

    Args:
      rule: ``"lora"`` (kappa = 1, Hu et al. 2021), ``"rora"`` or ``"rslora"`` (kappa = 1/2, RoRA Sec. III-B and
        Kalajdzievski 2023), or kappa itself.
      alpha: adapter strength, finite and > 0.
      rank: number of rows of A, an integer >= 1.

    Returns:
      gamma, a positive float.

    Raises:
      InputError: an argument outside the ranges above.

    Examples:
      >>> scaling_factor("lora", alpha=16, rank=64), scaling_factor("rora", alpha=16, rank=64)
      (0.25, 2.0)
    """
    check_rank(rank)
    check_positive("alpha", alpha)
    kappa = exponent(rule)
    try:
        scaling = float(alpha) / float(rank) ** kappa
    except (OverflowError, ZeroDivisionError):
        scaling = math.inf
    if not 0 < scaling < math.inf:
        raise InputError(
            f"rule is {rule!r}: {alpha!r} / {rank}^{kappa:g} is not a float above 0; accepted is nearer to 0"
        )
    return scaling


def alpha_for(rule: Rule, *, scaling: float, rank: int) -> float:
    r"""The alpha that gives ``scaling`` at ``rank`` under ``rule``: :math:`\alpha = \gamma r^\kappa`.

    Carries a tuned adapter to another rule or another reader: LoRA's alpha 16 at rank 64 is RoRA's alpha 2.

    Examples:
      >>> alpha_for("rora", scaling=scaling_factor("lora", alpha=16, rank=64), rank=64)
      2.0
    """
    check_positive("scaling", scaling)
    return float(scaling) / scaling_factor(rule, alpha=1.0, rank=rank)


def check_integer(name: str, value: int, *, least: int = 1, most: int = LARGEST) -> None:
    """Raise `InputError` unless ``value`` is an integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name} is {shown(value)}; accepted is an integer of {least} or more")
    if value > most:
        raise InputError(f"{name} is {shown(value)}; accepted is an integer of at most {most:,}")


def check_rank(rank: int) -> None:
    """Raise `InputError` unless ``rank`` is an integer from 1 to `LARGEST`."""
    check_integer("rank", rank)


def is_finite(value: object) -> bool:
    """Whether ``value`` is a real number that a float holds: no truth value, NaN, infinity, or integer beyond."""
    try:
        return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


def check_positive(name: str, value: float) -> None:
    """Raise `InputError` unless ``value`` is a finite number > 0, as a float too."""
    if not is_finite(value) or float(value) <= 0:
        raise InputError(f"{name} is {shown(value)}; accepted is a finite number above 0")


def check_not_negative(name: str, value: float) -> None:
    """Raise `InputError` unless ``value`` is a finite number >= 0."""
    if not is_finite(value) or value < 0:
        raise InputError(f"{name} is {shown(value)}; accepted is a finite number of 0 or more")


def check_share(name: str, value: float) -> None:
    """Raise `InputError` unless ``value`` is a share, 0 < value <= 1."""
    if not is_finite(value) or not 0 < value <= 1:
        raise InputError(f"{name} is {shown(value)}; accepted is a number above 0, at most 1")
