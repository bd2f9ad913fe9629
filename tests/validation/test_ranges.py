"""Ranges of a configuration's fields: at their ends, behind a union, and redefined in a subclass."""

from dataclasses import dataclass

import pytest

from rora_theory.errors import InputError
from rora_theory.validation.ranges import AtLeastTwo, Count, Natural, NotNegative, Positive, Share, check_ranges


@dataclass(frozen=True)
class Settings:
    natural: Natural = 0
    count: Count = 1
    plural_one: AtLeastTwo = 2
    positive: Positive = 5e-324
    not_negative: NotNegative = 0.0
    share: Share = 1.0
    maybe: Count | None = None
    several: tuple[Count, ...] = (0,)
    free: int = -1


@dataclass(frozen=True)
class Later(Settings):
    count: int = 3


def test_the_edges_are_in_range():
    check_ranges(Settings())
    check_ranges(Settings(maybe=1, share=5e-324))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("natural", -1),
        ("natural", 0.0),
        ("count", 0),
        ("count", True),
        ("plural_one", 1),
        ("positive", 0.0),
        ("positive", float("inf")),
        ("not_negative", -5e-324),
        ("not_negative", float("nan")),
        ("share", 0.0),
        ("share", 1.0000001),
        ("count", None),
        ("positive", None),
        ("maybe", 0),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=rf"^{name} .* {value}$"):
        check_ranges(Settings(**{name: value}))


def test_a_subclass_that_declares_a_field_anew_keeps_its_range():
    check_ranges(Later())
    with pytest.raises(InputError, match=r"^count .* 0$"):
        check_ranges(Later(count=0))
