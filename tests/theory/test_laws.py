"""The exact laws by three routes: enumeration in integers, algebra over index coincidences, and the direct sampler."""

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from support.enumeration import enumerate_first_step
from support.pairings import k as kurtosis_symbol
from support.pairings import (
    random_input_second_moment,
    sgd_matrix_moment,
    sgd_moments,
)
from support.pairings import (
    s2 as variance_symbol,
)
from support.pairings import (
    step as step_symbol,
)

from rora_theory import InputError
from rora_theory.inits import INITS, entries
from rora_theory.optimizers import OPTIMIZERS
from rora_theory.random.draws import draw_A
from rora_theory.stats.moments import threshold
from rora_theory.theory import laws, sampling

# One family of Monte Carlo comparisons: a true law fails it with probability 1e-6 in all.
FALSE_ALARM = 1e-6

small_grads = st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=2)
small_x = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(grad=small_grads, x=small_x, rank=st.integers(1, 3))
def test_enumeration(optimizer: str, grad: list[list[int]], x: list[int], rank: int) -> None:
    """All 2^(r p) Rademacher matrices, ties and zero rows included: the law equals the exact fractions."""
    mean, second, matrix = enumerate_first_step(grad, x, rank, optimizer)
    law = laws.first_step_moments(
        np.array(grad, float), np.array(x, float), rank=rank, scaling=1.0, optimizer=optimizer, init="rademacher"
    )
    # float64 sums of at most a few hundred terms of size <= 1e4
    np.testing.assert_allclose(law.mean, [float(m) for m in mean], rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(law.second_moment, [float(s) for s in second], rtol=1e-12, atol=1e-10)
    assert law.matrix_second_moment == pytest.approx(float(matrix), rel=1e-12, abs=1e-10)


def test_enumeration_would_see_a_wrong_law() -> None:
    """The enumeration rejects wrong laws: without r (k - 3) sum g^2 x^2, or with r^2 in place of r^2 + r."""
    grad, x, rank = [[1, 2, -1]], [2, 1, 3], 2
    second = enumerate_first_step(grad, x, rank, "sgd")[1][0]
    g, v = np.array(grad[0]), np.array(x)
    right = (rank**2 + rank) * (g @ v) ** 2 + rank * (g @ g) * (v @ v) - 2 * rank * np.sum(g**2 * v**2)
    assert second == Fraction(int(right))
    assert second != Fraction(int(right + 2 * rank * np.sum(g**2 * v**2)))
    assert second != Fraction(int(right - rank * (g @ v) ** 2))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_algebra_fixed_data(rank: int) -> None:
    """Symbolic in step, s2 and k: the closed form has every term and no other."""
    grad, x = [1, -2, 3], [2, 1, -1]
    mean, second = sgd_moments(grad, x, rank)
    matrix = sgd_matrix_moment(grad, rank)
    for init in INITS:
        law = entries(init, rank=rank, p_in=3)
        values = {variance_symbol: law.variance, kurtosis_symbol: law.kurtosis, step_symbol: 0.3 * 0.7**2}
        moments = laws.first_step_moments(
            np.array([grad], float),
            np.array(x, float),
            rank=rank,
            scaling=0.7,
            learning_rate=0.3,
            optimizer="sgd",
            init=init,
        )
        assert moments.mean[0] == pytest.approx(float(mean.subs(values)), rel=1e-12)
        assert moments.second_moment[0] == pytest.approx(float(second.subs(values)), rel=1e-12)
        assert moments.matrix_second_moment == pytest.approx(float(matrix.subs(values)), rel=1e-12)


def test_algebra_random_inputs() -> None:
    """E[w^2] over A and Gaussian inputs, symbolic in the overlap, for r = 2, p = 3; and the general polynomial."""
    rho = sp.Symbol("rho")
    symbolic = random_input_second_moment(2, 3)
    for init in INITS:
        law = entries(init, rank=2, p_in=3)
        for overlap in (0.0, 0.3, -0.8, 1.0):
            values = {rho: overlap, variance_symbol: law.variance, kurtosis_symbol: law.kurtosis}
            moments = laws.random_input_moments(rank=2, p_in=3, scaling=1.0, overlap=overlap, init=init)
            assert moments.second_moment[0] == pytest.approx(float(symbolic.subs(values)), rel=1e-12)
    # Gaussian A: r p [rho^2 (r+2)(p+2) + (1-rho^2)(r+p+1)]
    r, p = 2, 3
    gaussian = r * p * (rho**2 * (r + 2) * (p + 2) + (1 - rho**2) * (r + p + 1))
    assert sp.expand(symbolic.subs({variance_symbol: 1, kurtosis_symbol: 3}) - gaussian) == 0


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
def test_direct_sampler_random_inputs(init: str) -> None:
    """The direct sampler (autodiff and optax) against the law over optimizer, rank, overlap and width."""
    cases = [(1, 4, 0.0), (3, 5, 0.6), (6, 16, -0.3)]
    z = threshold(FALSE_ALARM, 3 * len(cases) * len(INITS) * 2)
    for number, (rank, p_in, overlap) in enumerate(cases):
        law = {"rank": rank, "p_in": p_in, "scaling": 0.8, "learning_rate": 0.5, "overlap": overlap, "init": init}
        settings = [sampling.RandomStep(**law, optimizer=optimizer) for optimizer in OPTIMIZERS]
        drawn = sampling.estimate_settings(settings, "direct", jax.random.key(number), draws=40_000)
        for optimizer, sums in zip(OPTIMIZERS, drawn, strict=True):
            moments = laws.random_input_moments(**law, optimizer=optimizer)
            # The uniform Adam law is a series: its stated error, 0.6%, is added to the sampling error.
            slack = 0.006 if (optimizer, init) == ("adam", "kaiming_uniform") else 0.0
            for estimate, exact in [
                (sums.first.mean, moments.mean[0]),
                (sums.first.second_moment, moments.second_moment[0]),
                (sums.first.variance, moments.variance[0]),
            ]:
                assert abs(estimate.value - exact) <= z * estimate.error + slack * abs(exact), (
                    optimizer,
                    *law.values(),
                )


@functools.cache
def drawn_A(init: str, count: int, rank: int, p_in: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(1), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_A(key, init, rank=rank, p_in=p_in)))(keys), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("init", ["normal", "kaiming_uniform", "rademacher"])
def test_adam_fixed_data(init: str, epsilon: float) -> None:
    """Adam's law for fixed data against sampled A, with a dominant entry in one row of G and epsilon near gamma |u|."""
    rng = np.random.default_rng(7)
    p_in, rank, gamma, n = 20, 3, 0.5, 60_000
    grad = rng.standard_normal((3, p_in))
    grad[1, 4] = 8.0
    grad[2] = 0.0
    x = rng.standard_normal((2, p_in))
    scale = entries(init, rank=rank, p_in=p_in).deviation
    law = laws.first_step_moments(
        grad, x, rank=rank, scaling=gamma, optimizer="adam", init=init, epsilon=epsilon * gamma * scale
    )
    A = drawn_A(init, n, rank, p_in)
    u = A @ grad.T
    f = np.divide(u, np.abs(u) + epsilon * scale, out=np.zeros_like(u), where=u != 0)
    dm = -gamma * np.einsum("nri,nrj->nij", f, A)
    w = np.einsum("nij,tj->nti", dm, x)
    # With epsilon and non-Gaussian A the stated relative error is epsilon / (gamma s |g_i|), twice it for squares.
    stated = epsilon / np.maximum(np.linalg.norm(grad, axis=1), 1e-9) if init != "normal" else np.zeros(3)
    z = threshold(FALSE_ALARM, 14 * 6)
    for exact, sample, slack in [(law.mean, w, stated), (law.second_moment, w**2, 2 * stated)]:
        error = sample.std(axis=0) / math.sqrt(n)
        assert np.all(np.abs(sample.mean(axis=0) - exact) <= z * error + slack * np.abs(exact))
    size = np.sum(dm**2, axis=(1, 2))
    allowed = z * size.std() / math.sqrt(n) + 2 * stated[:2].max() * size.mean()
    assert abs(size.mean() - law.matrix_second_moment) <= allowed


def test_adam_uniform_direction_by_quadrature() -> None:
    """E[sign(g . a) a] for uniform entries and p = 2 against a plain two-dimensional integral."""
    g = np.array([0.6, -0.8])
    unit = laws.first_step_moments(g[None], np.eye(2), rank=1, scaling=1.0, optimizer="adam", init="kaiming_uniform")
    half = 1 / math.sqrt(2)
    for j in range(2):
        # E[a_j sign(g.a)]: the inner integral over a_2 changes sign at -g_1 a_1 / g_2
        def inner(a1: float, j: int = j) -> float:
            edge = float(np.clip(-g[0] * a1 / g[1], -half, half))
            low, high = (edge + half, half - edge)
            if j == 0:
                return a1 * np.sign(g[1]) * (high - low)
            return np.sign(g[1]) * ((half**2 - edge**2) / 2 - (edge**2 - half**2) / 2)

        value, _ = integrate.quad(inner, -half, half, points=[0.0])
        assert -unit.mean[j, 0] == pytest.approx(value / (2 * half) ** 2, rel=2e-5)


def test_gaussian_init_changes_the_exponent() -> None:
    """PEFT's "gaussian" (std 1/r) adds r^-4 to E[w^2] under SGD and r^-2 under Adam: rora's rule is not flat there."""
    for optimizer, power in (("sgd", 4), ("adam", 2)):
        for rank in (2, 64):
            plain = laws.random_input_moments(rank=rank, p_in=64, scaling=1.0, overlap=0.5, optimizer=optimizer)
            shrunk = laws.random_input_moments(
                rank=rank, p_in=64, scaling=1.0, overlap=0.5, optimizer=optimizer, init="gaussian"
            )
            assert shrunk.second_moment[0] == pytest.approx(plain.second_moment[0] / rank**power, rel=1e-12)


def test_crossing_ranks() -> None:
    """At r* the two terms are equal: checked on the law's own increments in r."""
    rng = np.random.default_rng(3)
    grad, x = rng.standard_normal((4, 50)), rng.standard_normal((3, 50)) + 0.3
    for optimizer in OPTIMIZERS:
        stars = laws.crossing_rank(grad, x, optimizer=optimizer)
        for token, star in enumerate(stars):
            # E|w|^2 = a r^2 + b r (SGD, Gaussian), a r (r - 1) + b r (Adam), from ranks 1 and 2
            first, second = (
                laws.first_step_moments(grad, x[token], rank=rank, scaling=1.0, optimizer=optimizer).norm_second_moment
                for rank in (1, 2)
            )
            if optimizer == "sgd":
                a = (second - 2 * first) / 2
                signal, crosstalk = a, first - 2 * a
            else:
                signal, crosstalk = (second - 2 * first) / 2, first
            expected = crosstalk / signal + (optimizer == "adam")
            assert star == pytest.approx(float(expected), rel=1e-9)


@given(st.integers(1, 5000), st.floats(1e-3, 1.0), st.sampled_from(OPTIMIZERS))
def test_local_exponent_is_the_derivative(rank: int, overlap: float, optimizer: str) -> None:
    p_in = 512

    def second(r: float) -> float:
        shift = 0.0 if optimizer == "sgd" else 2.0
        return r**2 + r * (laws.random_input_crossing_rank(p_in, overlap, optimizer=optimizer) - shift)

    law = [
        laws.random_input_moments(rank=r, p_in=p_in, scaling=1.0, overlap=overlap, optimizer=optimizer).second_moment[0]
        for r in (rank, rank + 1)
    ]
    assert second(rank + 1) / second(rank) == pytest.approx(law[1] / law[0], rel=1e-9)
    h = rank * 1e-6
    slope = (math.log(second(rank + h)) - math.log(second(rank - h))) / (math.log(rank + h) - math.log(rank - h))
    star = laws.random_input_crossing_rank(p_in, overlap, optimizer=optimizer) - (0.0 if optimizer == "sgd" else 2.0)
    assert float(laws.local_exponent(rank, star)) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.6, 1.0])
def test_the_rate_that_keeps_the_first_adam_step_at_one_gamma_r(overlap: float) -> None:
    """By the exact moments: the rate times the step's rms is the same at both ranks."""
    star = laws.random_input_crossing_rank(64, overlap, optimizer="adam")
    for first, second in ((1, 128), (8, 32), (512, 8)):
        rms = [
            math.sqrt(
                laws.random_input_moments(
                    rank=rank, p_in=64, scaling=64 / rank, overlap=overlap, optimizer="adam"
                ).second_moment[0]
            )
            for rank in (first, second)
        ]
        exponent = float(laws.equal_change_rank_exponent(first, second, star - 2))
        assert exponent == pytest.approx(math.log(rms[0] / rms[1]) / math.log(second / first), abs=1e-9)
        assert 0 <= exponent + 1e-9 < 0.5
    assert laws.equal_change_rank_exponent(1, 4, np.array([0.0, 1e12])) == pytest.approx([0.0, 0.5])


def test_inits_are_those_of_their_names() -> None:
    """The paper's N(0, 1); PEFT's kaiming_uniform_(a=sqrt 5), U(-b, b) with b = 1/sqrt(p_in); its gaussian, std 1/r."""
    moments = {
        init: (entries(init, rank=4, p_in=25).variance, entries(init, rank=4, p_in=25).kurtosis) for init in INITS
    }
    assert moments == {
        "normal": (1.0, 3.0),
        "kaiming_uniform": (pytest.approx(0.2**2 / 3), 1.8),
        "rademacher": (1.0, 1.0),
        "gaussian": (pytest.approx(1 / 16), 3.0),
    }
    largest = float(np.max(np.abs(np.asarray(draw_A(jax.random.key(0), "kaiming_uniform", rank=4000, p_in=25)))))
    assert 0.2 * (1 - 1e-3) < largest <= 0.2  # the largest of 10^5: below by 1e-3 with probability e^-100


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("sizes", [{"rank": 0}, {"p_in": 0}, {"p_in": -1}, {"p_in": 2.5}, {"p_in": True}])
def test_sizes_that_no_matrix_has_are_refused(init: str, sizes: dict[str, Any]) -> None:
    (name, value), valid = *sizes.items(), {"rank": 2, "p_in": 3}
    with pytest.raises(InputError, match=f"{name}.*{value}"):
        entries(init, **valid | sizes)


@pytest.mark.parametrize("init", INITS)
def test_entries_are_drawn_as_told(init: str) -> None:
    """Variance and kurtosis of drawn entries; chi-square bounds of false alarm 1e-6 over both."""
    n, law = 400_000, entries(init, rank=5, p_in=7)
    keys = jax.random.split(jax.random.key(0), n // 35 + 1)
    sample = np.asarray(jax.jit(jax.vmap(lambda key: draw_A(key, init, rank=5, p_in=7)))(keys), np.float64).ravel()
    z = stats.norm.isf(1e-6 / 4)
    for power, exact in ((2, law.variance), (4, law.kurtosis * law.variance**2)):
        values = sample**power
        error = values.std() / math.sqrt(values.size) + 1e-6 * exact  # float32 entries
        assert abs(values.mean() - exact) <= z * error


@pytest.mark.parametrize("init", ["normal", "kaiming_uniform", "rademacher"])
def test_characteristic_function(init: str) -> None:
    """phi and phi' against the sample mean of cos and -a sin, and phi' against differences of phi."""
    law = entries(init, rank=1, p_in=3)
    t = np.array([1e-3, 0.1, 0.7, 2.0])
    phi, slope = law.characteristic(t)
    h = 1e-5
    numeric = (law.characteristic(t + h)[0] - law.characteristic(t - h)[0]) / (2 * h)
    np.testing.assert_allclose(slope, numeric, atol=1e-9)
    np.testing.assert_allclose(phi, 1 - law.variance * t**2 / 2, atol=law.variance**2 * law.kurtosis * 2.0**4 / 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank.* 0"),
        ({"scaling": -1.0}, r"scaling.* -1\.0"),
        ({"learning_rate": 0.0}, r"learning_rate.* 0\.0"),
        ({"overlap": 1.5}, r"overlap.* 1\.5"),
        ({"overlap": math.nan}, "overlap.* nan"),
        ({"p_in": 0}, "p_in.* 0"),
    ],
)
def test_bad_input(change: dict[str, float], message: str) -> None:
    arguments = {"rank": 2, "p_in": 3, "scaling": 1.0} | change
    with pytest.raises(InputError, match=message):
        laws.random_input_moments(**arguments)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_bad_shapes() -> None:
    with pytest.raises(InputError, match=r"grad and x.*\(2, 3\).*\(4,\)"):
        laws.first_step_moments(np.ones((2, 3)), np.ones(4), rank=1, scaling=1.0)
    with pytest.raises(InputError, match=r"grad.*NaN"):
        laws.first_step_moments(np.full((2, 3), np.nan), np.ones(3), rank=1, scaling=1.0)
