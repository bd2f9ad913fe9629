"""The displacement law, by algebra, by automatic differentiation and by simulated factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory.errors import InputError
from rora_theory.laws import displacement

gains = st.floats(0.5, 2e3)


@given(gains, st.floats(0, 1e6))
def test_the_ratio_solves_the_quadratic(gain: float, constant: float) -> None:
    ratio = displacement.displacement_ratio(gain, displacement_constant=constant)
    assert ratio >= 0
    assert ratio * (1 + ratio) == pytest.approx(constant / gain, rel=1e-12)


def change(b: jax.Array, a: jax.Array, gain: float, p: float, q: float) -> jax.Array:
    """Return the size of the change after all entries of B have moved by b and all of A by a."""
    return gain * (p * b + q * a * b)


@pytest.mark.parametrize("multiplier", [0.125, 1.0, 8.0])
def test_autodiff_of_the_change_gives_the_effective_step(multiplier: float) -> None:
    """W is differentiated by a step of B alone (c = 1) and of both factors (c = 2), at equal W for every G."""
    p, q, target = 0.7, 90.0, 0.05
    steps = {}
    for gain in (16.0, 724.0):
        # Solve for the displacement at which the change is `target`, independently of the module under test.
        roots = np.roots([gain * q * multiplier, gain * p, -target])
        b = float(roots[roots > 0][0])
        a = multiplier * b
        d_b, d_a = jax.grad(change, argnums=(0, 1))(jnp.float32(b), jnp.float32(a), gain, p, q)
        steps[gain] = {1.0: float(d_b), 2.0: float(d_b + multiplier * d_a)}
        constant = multiplier * q * target / p**2
        ratio = displacement.displacement_ratio(gain, displacement_constant=constant)
        assert ratio == pytest.approx(q * a / p, rel=1e-5)
    for coherence in (1.0, 2.0):
        expected = steps[16.0][coherence] / steps[724.0][coherence]
        factor = displacement.best_rate_factor(16.0, 724.0, displacement_constant=constant, coherence=coherence)
        assert factor == pytest.approx(expected, rel=1e-5)


def test_simulated_factors_follow_the_law() -> None:
    """Rows of A and columns of B share a direction plus noise; both parts of B A x are measured as in a run.

    The standard error of each rms ratio is below 1% with 512 rows; 5% allows for the incoherent part of both sums.
    """
    random = np.random.default_rng(0)
    rank, p_in, p_out, target = 512, 64, 32, 3.0
    x = random.normal(size=p_in)
    start = random.uniform(-1, 1, (rank, p_in)) / math.sqrt(p_in)
    # Displacements per unit: B against A's reading of x, A along x, each with incoherent noise beside it.
    unit_B = np.sign(random.normal(size=(p_out, 1)) * (start @ x) + 0.2 * random.normal(size=(p_out, rank)))
    unit_A = np.sign(x + 0.2 * random.normal(size=(rank, p_in))) * np.sign(unit_B[:1].T)
    constants, steps = [], []
    for gain in (16.0, 64.0, 724.0):
        gamma = gain / rank

        def parts(b: float, gamma: float = gamma) -> tuple[float, float, float]:
            B_part, A_part = gamma * b * unit_B @ start @ x, gamma * b * unit_B @ (b * unit_A) @ x
            rms = [float(np.sqrt(np.mean(part**2))) for part in (B_part, A_part, B_part + A_part)]
            return rms[0], rms[1], rms[2]

        # Bisect for the displacement whose whole change is `target`.
        low, high = 1e-9, 1e3
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if parts(middle)[2] < target else (low, middle)
        B_part, A_part, _ = parts(low)
        constants.append(displacement.measured_constant(gain, [A_part / B_part]))
        # The effective step of both factors, by a finite difference.
        steps.append((parts(low * 1.0001)[2] - parts(low)[2]) / (0.0001 * low))
    assert max(constants) / min(constants) < 1.05
    constant = float(np.median(constants))
    for (g0, s0), (g1, s1) in (((16.0, steps[0]), (64.0, steps[1])), ((64.0, steps[1]), (724.0, steps[2]))):
        factor = displacement.best_rate_factor(g0, g1, displacement_constant=constant, coherence=2.0)
        assert factor == pytest.approx(s0 / s1, rel=0.05)


@pytest.mark.parametrize("gain", [1e-320, 1e-307, 5e-307])
def test_a_ratio_that_overflows_is_refused(gain) -> None:
    """An infinite 4 K / G would give a ratio of nan or 0."""
    with pytest.raises(InputError, match=f"gain .* {gain!r}:"):
        displacement.displacement_ratio(gain, displacement_constant=100.0)
    assert displacement.displacement_ratio(1e-305, displacement_constant=100.0) == pytest.approx(math.sqrt(1e307))


def test_the_exponent_runs_from_minus_one_half_to_minus_one() -> None:
    for coherence in (1.0, 1.5, 2.0):
        exponents = [
            displacement.best_rate_exponent(64.0, 724.0, displacement_constant=k, coherence=coherence)
            for k in (1e8, 1e3, 130.0, 10.0, 1e-6)
        ]
        assert exponents == sorted(exponents, reverse=True)
        assert exponents[0] == pytest.approx(-0.5, abs=1e-3)
        assert exponents[-1] == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [
        (lambda: displacement.displacement_ratio(0.0, displacement_constant=1.0), "gain", "0.0"),
        (lambda: displacement.displacement_ratio(1.0, displacement_constant=-1.0), "displacement_constant", "-1.0"),
        (lambda: displacement.displacement_ratio(1.0, displacement_constant=math.nan), "displacement_constant", "nan"),
        (lambda: displacement.measured_constant(1.0, []), "ratios", r"\[\]"),
        (lambda: displacement.measured_constant(1.0, [-0.5]), "ratios", "-0.5"),
        (lambda: displacement.best_rate_factor(1.0, -1.0, displacement_constant=1.0), "gain", "-1.0"),
        (lambda: displacement.best_rate_factor(1.0, 2.0, displacement_constant=1.0, coherence=3.0), "coherence", "3.0"),
        (lambda: displacement.best_rate_exponent(2.0, 2.0, displacement_constant=1.0), "new_gain", "2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(call, argument: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{argument}.*{value}"):
        call()
