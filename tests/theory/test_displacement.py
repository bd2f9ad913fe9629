"""The displacement law, by algebra and by automatic differentiation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.theory import displacement


def test_the_ratio_solves_the_quadratic() -> None:
    for constant in (1.0, 130.0, 1e4):
        for strength in (0.5, 8.0, 64.0, 724.0):
            ratio = displacement.displacement_ratio(strength, displacement_constant=constant)
            assert ratio > 0
            assert ratio * (1 + ratio) == pytest.approx(constant / strength, rel=1e-9)
            measured = displacement.measured_constant(strength, [0.0, ratio, 1e6])
            assert measured == pytest.approx(constant, rel=1e-9), "of the median ratio"
    assert displacement.displacement_ratio(64.0, displacement_constant=0.0) == 0.0


def change(b: jax.Array, a: jax.Array, strength: float, p: float, q: float) -> jax.Array:
    """Size of the change when all entries of B have moved by b and all of A by a."""
    return strength * (p * b + q * a * b)


@pytest.mark.parametrize("multiplier", [0.125, 1.0, 8.0])
def test_autodiff_of_the_change_gives_the_effective_step(multiplier: float) -> None:
    """Differentiates W by a step of B alone (c = 1) and of both factors (c = 2), at equal W for every G."""
    p, q, target = 0.7, 90.0, 0.05
    steps = {}
    for strength in (16.0, 724.0):
        # Solve for the displacement at which the change is `target`, independently of the module under test.
        roots = np.roots([strength * q * multiplier, strength * p, -target])
        b = float(roots[roots > 0][0])
        a = multiplier * b
        d_b, d_a = jax.grad(change, argnums=(0, 1))(jnp.float32(b), jnp.float32(a), strength, p, q)
        steps[strength] = {1.0: float(d_b), 2.0: float(d_b + multiplier * d_a)}
        constant = multiplier * q * target / p**2
        ratio = displacement.displacement_ratio(strength, displacement_constant=constant)
        assert ratio == pytest.approx(q * a / p, rel=1e-5)
    for coherence in (1.0, 2.0):
        expected = steps[16.0][coherence] / steps[724.0][coherence]
        factor = displacement.best_rate_factor(16.0, 724.0, displacement_constant=constant, coherence=coherence)
        assert factor == pytest.approx(expected, rel=1e-5)


def test_the_exponent_runs_from_minus_one_half_to_minus_one() -> None:
    for coherence in (1.0, 1.5, 2.0):
        exponents = [
            displacement.best_rate_exponent(64.0, 724.0, displacement_constant=k, coherence=coherence)
            for k in (1e8, 1e3, 130.0, 10.0, 1e-6)
        ]
        assert exponents == sorted(exponents, reverse=True)
        assert exponents[0] == pytest.approx(-0.5, abs=1e-3)
        assert exponents[-1] == pytest.approx(-1.0, abs=1e-3)


def carry_rate(learning_rate: float = 1e-3, **changed: Any) -> displacement.RateRange:
    arguments = {
        "old_strength": 64.0, "new_strength": 724.0, "displacement_constants": (88.0, 167.0),
        "old_steps": 64, "new_steps": 256, "steps_exponents": (-0.6, -0.4),
    }  # fmt: skip
    return displacement.carry_rate(learning_rate, **arguments | changed)


def test_a_carried_rate_with_one_constant_and_one_exponent_is_the_law() -> None:
    """With nothing to vary but c, the ends are the law at c = 1 and 2."""
    rates = carry_rate(2e-4, displacement_constants=(130.0, 130.0), steps_exponents=(-0.5, -0.5))
    at_one, at_two = (
        2e-4 / 2 * displacement.best_rate_factor(64.0, 724.0, displacement_constant=130.0, coherence=coherence)
        for coherence in displacement.COHERENCE_RANGE
    )
    assert rates == pytest.approx((at_one, at_one, at_two), rel=1e-12)
    same = carry_rate(3e-4, new_strength=64.0, old_steps=None, new_steps=None)
    assert same == pytest.approx((3e-4, 3e-4, 3e-4), rel=1e-12), "neither strength nor steps change"


@pytest.mark.parametrize(("new_strength", "new_steps"), [(8.0, 16), (8.0, 1000), (724.0, 16), (724.0, 1000)])
def test_a_carried_rate_covers_every_constant_coherence_and_exponent(new_strength: float, new_steps: int) -> None:
    """Draws K, c and the exponent within their ranges; no draw lies outside the range of rates."""
    rates = carry_rate(new_strength=new_strength, new_steps=new_steps)
    random = np.random.default_rng(0)
    for constant, coherence, exponent in random.uniform((88.0, 1.0, -0.6), (167.0, 2.0, -0.4), (200, 3)):
        factor = displacement.best_rate_factor(64.0, new_strength, displacement_constant=constant, coherence=coherence)
        rate = 1e-3 * factor * (new_steps / 64) ** exponent
        assert rates.low * (1 - 1e-9) <= rate <= rates.high * (1 + 1e-9)
    assert rates.low <= rates.best <= rates.high
    middle = displacement.best_rate_factor(64.0, new_strength, displacement_constant=math.sqrt(88.0 * 167.0))
    assert rates.best == pytest.approx(1e-3 * middle * (new_steps / 64) ** -0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: carry_rate(0.0), r"learning_rate.*0\.0"),
        (lambda: carry_rate(new_strength=-1.0), r"strength.*-1\.0"),
        (lambda: carry_rate(displacement_constants=(2.0, 1.0)), r"displacement_constants.*\(2.0, 1.0\)"),
        (lambda: carry_rate(displacement_constants=(-1.0, 1.0)), r"displacement_constant.*-1\.0"),
        (lambda: carry_rate(steps_exponents=(-0.4, -0.6)), r"steps_exponents.*\(-0.4, -0.6\)"),
        (lambda: carry_rate(steps_exponents=(math.nan, -0.6)), "steps_exponents.*nan"),
        (lambda: carry_rate(old_steps=None), "old_steps.*given together"),
        (lambda: carry_rate(new_steps=None), "new_steps.*given together"),
        (lambda: carry_rate(new_steps=0), "new_steps.*0"),
        (lambda: displacement.displacement_ratio(0.0, displacement_constant=1.0), r"strength.*0\.0"),
        (lambda: displacement.displacement_ratio(1.0, displacement_constant=-1.0), r"displacement_constant.*-1\.0"),
        (lambda: displacement.displacement_ratio(1.0, displacement_constant=math.nan), "displacement_constant.*nan"),
        (lambda: displacement.measured_constant(1.0, []), r"ratios.*\[\]"),
        (lambda: displacement.measured_constant(1.0, [-0.5]), r"ratios.*-0\.5"),
        (lambda: displacement.best_rate_factor(1.0, 2.0, displacement_constant=1.0, coherence=3.0), r"coherence.*3\.0"),
        (lambda: displacement.best_rate_exponent(2.0, 2.0, displacement_constant=1.0), r"new_strength.*2\.0"),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
