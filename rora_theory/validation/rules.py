"""Validate lists of ranks, steps, seeds and scaling rules, and settings that have no effect.

Scaling rules give the same gamma at a reference rank, so that runs differ in the exponent alone.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from rora_theory.errors import InputError
from rora_theory.scaling import (
    Rule,
    alpha_for,
    check_integer,
    check_positive,
    exponent,
)


def name_of(rule: Rule) -> str:
    """Return the name of a rule in results: its name, or its exponent.

    Examples:
      >>> name_of("rora"), name_of(0.25)
      ('rora', '0.25')
    """
    return rule if isinstance(rule, str) else f"{rule:g}"


def check_rules(
    rules: Sequence[Rule], name: str = "rules", *, gamma: float | None = None, reference_rank: int = 1
) -> None:
    """Check that there is a rule, that all have different exponents, and that each has an alpha.

    Args:
      name: Name of the argument, for errors.
      gamma: Scaling that every rule has at ``reference_rank``, see `alpha_at`; None checks no alpha.
      reference_rank: Rank of that scaling.

    Raises:
      InputError: There is no rule, two have the same exponent, or one has no alpha.
    """
    if not rules:
        raise InputError(f"{name} must have at least one rule, got none")
    for rule in rules:
        exponent(rule, name)
    # Compare exponents, not names: "rora" and 0.5 are the same rule.
    if len({exponent(rule) for rule in rules}) != len(rules):
        names = " ".join(map(name_of, rules))
        raise InputError(f"{name} must have different rules, got one rule twice: {names}")
    if gamma is not None:
        for rule in rules:
            alpha_at(rule, gamma=gamma, reference_rank=reference_rank)


def alpha_at(rule: Rule, *, gamma: float, reference_rank: int) -> float:
    """Compute the alpha with which a rule gives the scaling ``gamma`` at ``reference_rank``.

    Raises:
      InputError: The scaling or the rank is out of range.
    """
    check_positive("gamma", gamma)
    check_integer("reference_rank", reference_rank)
    return alpha_for(rule, scaling=gamma, rank=reference_rank)


def as_words(value: object) -> str:
    """Return a value as it is written on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def listed(values: Sequence[object]) -> str:
    """Return one or more values as a list in a sentence.

    Examples:
      >>> listed([1]), listed((1, 2)), listed((1, 2, 4))
      ('1', '1 and 2', '1, 2 and 4')
    """
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def check_unread(config: Any, *names: str, requires: str = "", conflicts_with: str = "") -> None:
    """Raise `InputError` if a setting that has no effect differs from its default. Pass one of the two reasons.

    Args:
      config: Dataclass instance.
      *names: Names of its fields; a field that is a dataclass stands for all its fields.
      requires: Missing setting without which the fields have no effect.
      conflicts_with: Present setting with which the fields have no effect.

    Raises:
      InputError: A field differs from its default.
    """
    # Report the first field that differs from its default, with the reason that the caller passes.
    for field in fields(config):
        if field.name in names:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            for name, value in _changed(field.name, getattr(config, field.name), default):
                reason = f"without {requires}. Add {requires} or remove {name}."
                if conflicts_with:
                    reason = f"with {conflicts_with}. Remove {name} or {conflicts_with}."
                raise InputError(f"{name} {as_words(value)} has no effect {reason}")


def _changed(name: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a value that differ from its default, with their values."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _changed(field.name, getattr(value, field.name), getattr(default, field.name))
    elif value != default:
        yield name, value


def check_list(
    name: str, values: Sequence[Any], check: Callable[[str, Any], None] | None = None, *, fewest: int = 1
) -> None:
    """Check the number of values, that all are different, and each value.

    Args:
      check: Function of the name and one value that raises `InputError`, such as `scaling.check_positive`. It may be
        a partial call, such as that of `scaling.check_choice` with the supported values.
      fewest: Minimum number of values.

    Raises:
      InputError: There are too few values, a value occurs twice, or ``check`` refuses one.
    """
    if len(values) < fewest:
        raise InputError(f"{name} must have {fewest} or more values, got {len(values)}")
    if len(set(values)) != len(values):
        raise InputError(f"{name} must have different values, got {' '.join(map(str, values))}")
    if check is not None:
        for value in values:
            check(name, value)


def check_steps(steps: Sequence[int], name: str = "steps") -> None:
    """Raise `InputError` unless steps ascend strictly from 1 or more."""
    if not steps or steps[0] < 1 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise InputError(f"{name} must be ascending integers of 1 or more, got {' '.join(map(str, steps))}")
    check_integer(name, steps[-1])


def check_warmup(warmup: int, steps: float) -> None:
    """Raise `InputError` unless the warm-up is shorter than the planned run.

    Args:
      warmup: Number of steps of warm-up.
      steps: Number of steps of the planned run; infinity if it is not known yet.
    """
    check_integer("warmup", warmup, minimum=0)
    if warmup >= steps:
        raise InputError(
            f"warmup must be less than the number of steps, {steps}, got {warmup}. "
            "Use a shorter warm-up or a longer run."
        )
