"""Ranges that a configuration's fields declare: at their edges, behind a union, and where a subclass declares anew."""

from dataclasses import dataclass

import pytest

from rora_theory.errors import InputError
from rora_theory.validation.ranges import Count, Natural, NotNegative, Plural, Positive, Share, check_ranges


@dataclass(frozen=True)
class Config:
    natural: Natural = 0
    count: Count = 1
    plural_one: Plural = 2
    positive: Positive = 5e-324
    not_negative: NotNegative = 0.0
    share: Share = 1.0
    maybe: Count | None = None
    several: tuple[Count, ...] = (0,)
    free: int = -1


@dataclass(frozen=True)
class Later(Config):
    count: int = 3


def test_the_edges_are_in_range():
    check_ranges(Config())
    check_ranges(Config(maybe=1, share=5e-324))


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ({"natural": -1}, "--natural is -1; accepted is an integer of 0 or more"),
        ({"natural": 0.0}, "--natural is 0.0; accepted is an integer of 0 or more"),
        ({"count": 0}, "--count is 0; accepted is an integer of 1 or more"),
        ({"count": True}, "--count is True; accepted is an integer of 1 or more"),
        ({"plural_one": 1}, "--plural-one is 1; accepted is an integer of 2 or more"),
        ({"positive": 0.0}, "--positive is 0.0; accepted is a finite number above 0"),
        ({"positive": float("inf")}, "--positive is inf; accepted is a finite number above 0"),
        ({"not_negative": -5e-324}, "--not-negative is -5e-324; accepted is a finite number of 0 or more"),
        ({"not_negative": float("nan")}, "--not-negative is nan; accepted is a finite number of 0 or more"),
        ({"share": 0.0}, "--share is 0.0; accepted is a number above 0, at most 1"),
        ({"share": 1.0000001}, "--share is 1.0000001; accepted is a number above 0, at most 1"),
        ({"count": None}, "--count is None; accepted is an integer of 1 or more"),
        ({"positive": None}, "--positive is None; accepted is a finite number above 0"),
        ({"maybe": 0}, "--maybe is 0; accepted is an integer of 1 or more"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_out_of_range_is_named(given, accepted):
    with pytest.raises(InputError) as refused:
        check_ranges(Config(**given))
    assert str(refused.value) == accepted


def test_a_subclass_that_declares_a_field_anew_keeps_its_range():
    check_ranges(Later())
    with pytest.raises(InputError, match=r"^count is 0; accepted is an integer of 1 or more"):
        check_ranges(Later(count=0), str)
    with pytest.raises(InputError, match=r"^--count is 0"):
        check_ranges(Later(count=0))
