"""Ranges of a configuration's numbers, declared in the types of its fields and checked where it is made.

@dataclass(frozen=True)
class Config:
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
from rora_theory.validation.rules import option_of

Check = Callable[[str, Any], None]
"""Raises `InputError` unless a value is in range; the first argument is what the value is called."""

Natural = Annotated[int, partial(check_integer, least=0)]
"""An integer of 0 or more."""
Count = Annotated[int, partial(check_integer, least=1)]
"""An integer of 1 or more."""
Plural = Annotated[int, partial(check_integer, least=2)]
"""An integer of 2 or more."""
Positive = Annotated[float, check_positive]
"""A finite number above 0."""
NotNegative = Annotated[float, check_not_negative]
"""A finite number of 0 or more."""
Share = Annotated[float, check_share]
"""A number above 0, at most 1."""


def check_ranges(config: Any, called: Callable[[str], str] = option_of) -> None:
    """Check every field of a dataclass whose type declares a range; None is in the range of an optional one.

    Args:
      config: the dataclass.
      called: what a field is called in an error; by default as its option, ``--batch-size``.

    Raises:
      InputError: a value out of its range; names the field, the value and what is accepted.

    Examples:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class Config:
      ...     batch_size: Count = 16
      >>> check_ranges(Config(0))
      Traceback (most recent call last):
      rora_theory.errors.InputError: --batch-size is 0; accepted is an integer of 1 or more
    """
    kind: Any = type(config)
    for name, (check, optional) in _ranges(kind).items():
        value = getattr(config, name)
        if value is not None or not optional:
            check(called(name), value)


@cache
def _ranges(kind: Any) -> dict[str, tuple[Check, bool]]:
    """Check of every field that has a range, and whether it may be None; a field declared anew keeps its range."""
    found: dict[str, tuple[Check, bool]] = {}
    for each in reversed(kind.__mro__):
        for name, hint in get_type_hints(each, include_extras=True).items():
            for check in _checks(hint):
                found[name] = check, type(None) in get_args(hint)
    return found


def _checks(hint: Any) -> list[Check]:
    """The checks of a type: its own, or those of the members of a union."""
    if get_origin(hint) is Annotated:
        return [each for each in get_args(hint)[1:] if each in _ALL]
    if get_origin(hint) in (Union, UnionType):
        return [check for member in get_args(hint) for check in _checks(member)]
    return []


_ALL = [get_args(each)[1] for each in (Natural, Count, Plural, Positive, NotNegative, Share)]
