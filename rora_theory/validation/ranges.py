"""Validate the numbers of a configuration by ranges that are declared in the types of its fields.

Call `check_ranges` where the configuration is created:

    @dataclass(frozen=True)
    class Settings:
        batch_size: Count = 16
        lr: Positive | None = None

        def __post_init__(self) -> None:
            check_ranges(self)
"""

from collections.abc import Callable
from functools import cache, partial
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from rora_theory.scaling import check_integer, check_not_negative, check_positive, check_share

Check = Callable[[str, Any], None]
"""Function of a name and a value that raises `InputError` unless the value is in range."""

Natural = Annotated[int, partial(check_integer, minimum=0)]
"""Integer of 0 or more."""
Count = Annotated[int, partial(check_integer, minimum=1)]
"""Integer of 1 or more."""
AtLeastTwo = Annotated[int, partial(check_integer, minimum=2)]
"""Integer of 2 or more."""
Positive = Annotated[float, check_positive]
"""Finite number above 0."""
NotNegative = Annotated[float, check_not_negative]
"""Finite number of 0 or more."""
Share = Annotated[float, check_share]
"""Number above 0 and at most 1."""


def check_ranges(config: Any) -> None:
    """Check every field of a dataclass whose type declares a range. Optional fields may be None.

    Raises:
      InputError: A value is out of its range.

    Examples:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Settings:
      ...     batch_size: Count = 16
      >>> check_ranges(Settings(0))
      Traceback (most recent call last):
      rora_theory.errors.InputError: batch_size must be an integer of 1 or more, got 0
    """
    kind: Any = type(config)
    for name, (check, optional) in _ranges(kind).items():
        value = getattr(config, name)
        if value is not None or not optional:
            check(name, value)


@cache
def _ranges(kind: Any) -> dict[str, tuple[Check, bool]]:
    """Return the check of each field with a range, and whether it may be None. Redeclared fields keep their range."""
    checks: dict[str, tuple[Check, bool]] = {}
    # Parents first: a field that a subclass declares again without a range keeps the parent's.
    for base in reversed(kind.__mro__):
        for name, hint in get_type_hints(base, include_extras=True).items():
            for check in _range_checks(hint):
                checks[name] = check, type(None) in get_args(hint)
    return checks


def _range_checks(hint: Any) -> list[Check]:
    """Return the checks of a type, or of the members of a union."""
    if get_origin(hint) is Annotated:
        return [annotation for annotation in get_args(hint)[1:] if annotation in _RANGE_CHECKS]
    if get_origin(hint) in (Union, UnionType):
        return [check for member in get_args(hint) for check in _range_checks(member)]
    return []


_RANGE_CHECKS = [get_args(range_type)[1] for range_type in (Natural, Count, AtLeastTwo, Positive, NotNegative, Share)]
