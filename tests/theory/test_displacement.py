"""The displacement law, by algebra, by automatic differentiation and by simulated factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy

from rora_theory.errors import InputError
from rora_theory.theory import displacement

CONSTANTS, STRENGTHS = (0.0, 1.0, 130.0, 1e4), (0.5, 8.0, 64.0, 724.0)


def test_the_ratio_solves_the_quadratic() -> None:
    rho, constant, strength = sympy.symbols("rho K G", positive=True)
    (root,) = [
        solution
        for solution in sympy.solve(rho * (1 + rho) - constant / strength, rho)
        if solution.subs({constant: 2, strength: 1}) > 0
    ]
    for k in CONSTANTS[1:]:
        for g in STRENGTHS:
            expected = float(root.subs({constant: k, strength: g}))
            assert displacement.displacement_ratio(g, displacement_constant=k) == pytest.approx(expected, rel=1e-9)
    assert displacement.displacement_ratio(64.0, displacement_constant=0.0) == 0.0


def change(b: jax.Array, a: jax.Array, strength: float, p: float, q: float) -> jax.Array:
    """Return the size of the change after all entries of B have moved by b and all of A by a."""
    return strength * (p * b + q * a * b)


@pytest.mark.parametrize("multiplier", [0.125, 1.0, 8.0])
def test_autodiff_of_the_change_gives_the_effective_step(multiplier: float) -> None:
    """W is differentiated by a step of B alone (c = 1) and of both factors (c = 2), at equal W for every G."""
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
    for strength in (16.0, 64.0, 724.0):
        gamma = strength / rank

        def parts(b: float, gamma: float = gamma) -> tuple[float, float, float]:
            led_B, led_A = gamma * b * unit_B @ start @ x, gamma * b * unit_B @ (b * unit_A) @ x
            rms = [float(np.sqrt(np.mean(part**2))) for part in (led_B, led_A, led_B + led_A)]
            return rms[0], rms[1], rms[2]

        # Bisect for the displacement whose whole change is `target`.
        low, high = 1e-9, 1e3
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if parts(middle)[2] < target else (low, middle)
        led_B, led_A, _ = parts(low)
        constants.append(displacement.measured_constant(strength, [led_A / led_B]))
        # The effective step of both factors, by a finite difference.
        steps.append((parts(low * 1.0001)[2] - parts(low)[2]) / (0.0001 * low))
    assert max(constants) / min(constants) < 1.05
    constant = float(np.median(constants))
    for (g0, s0), (g1, s1) in (((16.0, steps[0]), (64.0, steps[1])), ((64.0, steps[1]), (724.0, steps[2]))):
        factor = displacement.best_rate_factor(g0, g1, displacement_constant=constant, coherence=2.0)
        assert factor == pytest.approx(s0 / s1, rel=0.05)


@pytest.mark.parametrize("strength", [1e-320, 1e-307, 5e-307])
def test_a_ratio_that_overflows_is_refused(strength) -> None:
    """An infinite 4 K / G would give a ratio of nan or 0."""
    with pytest.raises(InputError, match=f"strength .* {strength!r}:"):
        displacement.displacement_ratio(strength, displacement_constant=100.0)
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


STEPS_EXPONENTS = (-0.6, -0.4)


def test_a_carried_rate_with_one_constant_and_one_exponent_is_the_law() -> None:
    """Only c varies, so the ends are the law at c = 1 and 2."""
    rates = displacement.carry_rate(
        2e-4,
        old_strength=32.0,
        new_strength=256.0,
        displacement_constants=(130.0, 130.0),
        old_steps=64,
        new_steps=256,
        steps_exponents=(-0.5, -0.5),
    )
    coherent, both = (
        2e-4 / 2 * displacement.best_rate_factor(32.0, 256.0, displacement_constant=130.0, coherence=coherence)
        for coherence in displacement.COHERENCE_RANGE
    )
    assert rates == pytest.approx((coherent, coherent, both), rel=1e-12)


@pytest.mark.parametrize("new_strength", [8.0, 64.0, 724.0])
@pytest.mark.parametrize("new_steps", [16, 64, 1000])
def test_a_carried_rate_covers_every_constant_coherence_and_exponent(new_strength: float, new_steps: int) -> None:
    """K, c and the exponent are drawn within their ranges; no draw lies outside the range of rates."""
    rates = displacement.carry_rate(
        1e-3,
        old_strength=64.0,
        new_strength=new_strength,
        displacement_constants=(88.0, 167.0),
        old_steps=64,
        new_steps=new_steps,
        steps_exponents=STEPS_EXPONENTS,
    )
    random = np.random.default_rng(0)
    for constant, coherence, exponent in random.uniform((88.0, 1.0, -0.6), (167.0, 2.0, -0.4), (200, 3)):
        factor = displacement.best_rate_factor(64.0, new_strength, displacement_constant=constant, coherence=coherence)
        rate = 1e-3 * factor * (new_steps / 64) ** exponent
        assert rates.low * (1 - 1e-9) <= rate <= rates.high * (1 + 1e-9)
    assert rates.low <= rates.best <= rates.high
    middle = displacement.best_rate_factor(64.0, new_strength, displacement_constant=math.sqrt(88.0 * 167.0))
    assert rates.best == pytest.approx(1e-3 * middle * (new_steps / 64) ** -0.5, rel=1e-12)


def test_a_rate_is_kept_where_neither_strength_nor_steps_change() -> None:
    rates = displacement.carry_rate(
        3e-4,
        old_strength=16.0,
        new_strength=16.0,
        displacement_constants=(60.0, 210.0),
        steps_exponents=STEPS_EXPONENTS,
    )
    assert rates == pytest.approx((3e-4, 3e-4, 3e-4), rel=1e-12)


@pytest.mark.parametrize(
    ("changed", "argument", "value"),
    [
        ({"learning_rate": 0.0}, "learning_rate", "0.0"),
        ({"new_strength": -1.0}, "strength", "-1.0"),
        ({"displacement_constants": (2.0, 1.0)}, "displacement_constants", r"\(2.0, 1.0\)"),
        ({"displacement_constants": (-1.0, 1.0)}, "displacement_constant", "-1.0"),
        ({"steps_exponents": (-0.4, -0.6)}, "steps_exponents", r"\(-0.4, -0.6\)"),
        ({"steps_exponents": (math.nan, -0.6)}, "steps_exponents", "nan"),
        ({"old_steps": None}, "old_steps", "given together"),
        ({"new_steps": None}, "new_steps", "given together"),
        ({"new_steps": 0}, "new_steps", "0"),
    ],
)
def test_a_carried_rate_refuses_arguments_out_of_range(changed, argument: str, value: str) -> None:
    arguments = {
        "learning_rate": 1e-3,
        "old_strength": 64.0,
        "new_strength": 724.0,
        "displacement_constants": (88.0, 167.0),
        "old_steps": 64,
        "new_steps": 256,
        "steps_exponents": STEPS_EXPONENTS,
    } | changed
    with pytest.raises(InputError, match=f"{argument}.*{value}"):
        displacement.carry_rate(arguments.pop("learning_rate"), **arguments)


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [
        (lambda: displacement.displacement_ratio(0.0, displacement_constant=1.0), "strength", "0.0"),
        (lambda: displacement.displacement_ratio(1.0, displacement_constant=-1.0), "displacement_constant", "-1.0"),
        (lambda: displacement.displacement_ratio(1.0, displacement_constant=math.nan), "displacement_constant", "nan"),
        (lambda: displacement.measured_constant(1.0, []), "ratios", r"\[\]"),
        (lambda: displacement.measured_constant(1.0, [-0.5]), "ratios", "-0.5"),
        (lambda: displacement.best_rate_factor(1.0, 2.0, displacement_constant=1.0, coherence=3.0), "coherence", "3.0"),
        (lambda: displacement.best_rate_exponent(2.0, 2.0, displacement_constant=1.0), "new_strength", "2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(call, argument: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{argument}.*{value}"):
        call()
