"""The scaling rule, and a check that no other code computes one."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory import InputError, scaling_factor
from rora_theory.scaling import alpha_for, check_between, exponent

ranks = st.integers(1, 10**6)
alphas = st.floats(1e-3, 1e6)


@given(ranks, alphas)
def test_named_rules(rank: int, alpha: float) -> None:
    assert (exponent("lora"), exponent("rora"), exponent(0.25)) == (1.0, 0.5, 0.25)
    assert scaling_factor("lora", alpha=alpha, rank=rank) == pytest.approx(alpha / rank, rel=1e-15)
    assert scaling_factor("rora", alpha=alpha, rank=rank) == pytest.approx(alpha / math.sqrt(rank), rel=1e-15)
    assert scaling_factor("rslora", alpha=alpha, rank=rank) == scaling_factor("rora", alpha=alpha, rank=rank)


@given(ranks, alphas, st.floats(-2, 2))
def test_an_exponent_is_a_rule(rank: int, alpha: float, kappa: float) -> None:
    assert scaling_factor(kappa, alpha=alpha, rank=rank) == pytest.approx(alpha * rank**-kappa, rel=1e-12)


@given(ranks, alphas, st.sampled_from(["lora", "rora", 0.25]))
def test_alpha_for_inverts_scaling_factor(rank: int, alpha: float, rule: str | float) -> None:
    scaling = scaling_factor(rule, alpha=alpha, rank=rank)
    assert alpha_for(rule, scaling=scaling, rank=rank) == pytest.approx(alpha, rel=1e-14)


@pytest.mark.parametrize(
    ("value", "low", "high", "closed", "is_inside"),
    [
        (0, 0, 1, "both", True),
        (1, 0, 1, "both", True),
        (np.float32(0.5), 0, 1, "neither", True),
        (0.0, 0, 1, "left", True),
        (1.0, 0, 1, "left", False),
        (0.0, 0, 1, "right", False),
        (Fraction(1), 0, 1, "right", True),
        (math.inf, 0, math.inf, "both", True),
        (math.inf, 0, math.inf, "left", False),
        (-math.inf, 0, math.inf, "both", False),
        (math.nan, 0, math.inf, "both", False),
        (True, 0, 1, "both", False),
        ("0.5", 0, 1, "both", False),
        (None, 0, 1, "both", False),
        (np.full(2, 0.5), 0, 1, "both", False),
        (10**400, 0, math.inf, "both", False),
        (Fraction(1, 10**400), 0, 1, "right", False),
    ],
)
def test_numbers_in_an_interval(value: object, low: float, high: float, closed: str, is_inside: bool) -> None:
    if is_inside:
        check_between("share", value, low, high, closed=closed)
    else:
        with pytest.raises(InputError, match=r"^share .*, got "):
            check_between("share", value, low, high, closed=closed)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rule", "alpha", "rank", "message"),
    [
        ("LoRA", 1.0, 1, "rule .*, got 'LoRA'"),
        (math.nan, 1.0, 1, "rule .*, got nan"),
        (True, 1.0, 1, "rule .*, got True"),
        ("lora", 0.0, 1, "alpha .*, got 0.0"),
        ("lora", math.inf, 1, "alpha .*, got inf"),
        ("lora", 1.0, 0, "rank .*, got 0"),
        ("lora", 1.0, 2.5, "rank .*, got 2.5"),
        ("lora", 1.0, 2**31, "rank .* 2,147,483,647, got 2147483648"),
        ("lora", 1.0, True, "rank .*, got True"),
        ("lora", 10**400, 1, r"alpha .*, got 10+\.\.\.0+"),
        pytest.param("lora", 10**5000, 1, "alpha .* got an int too long to print", id="thousands of digits"),
        ("lora", Fraction(1, 10**400), 1, "alpha .*, got Fraction"),
        ("lora", 1.0, 10**400, r"rank .*, got 10+\.\.\.0+"),
        (-(10**400), 1.0, 1, r"rule .*, got -10+\.\.\.0+"),
    ],
)
def test_bad_input_is_named(rule: object, alpha: float, rank: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        scaling_factor(rule, alpha=alpha, rank=rank)
    assert "got" in str(error.value)
    assert "\n" not in str(error.value)
