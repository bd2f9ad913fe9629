"""The exact laws by three routes: enumeration in integers, algebra over coincident indices, and the direct sampler."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from support import pairings
from support.enumeration import enumerate_first_step

from rora_theory import InputError, laws
from rora_theory.inits import INITS, Entries, entries
from rora_theory.laws import sampling
from rora_theory.laws.random.draws import draw_A
from rora_theory.optimizers import OPTIMIZERS, Optimizer
from rora_theory.stats.moments import threshold

# One family of Monte Carlo comparisons: a true law fails it with probability 1e-6 in all.
FALSE_ALARM = 1e-6

vectors = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


def linear_term(p_in: int, overlap: float, optimizer: Optimizer) -> float:
    """Return c of E[w^2], which is proportional to r^2 + c r at gamma = 1."""
    return float(
        laws.linear_term(laws.random_input_crossing_rank(p_in, overlap, optimizer=optimizer), optimizer=optimizer)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(grad=st.lists(vectors, min_size=1, max_size=2), x=vectors, rank=st.integers(1, 3))
def test_enumeration(optimizer: str, grad: list[list[int]], x: list[int], rank: int) -> None:
    """Over all 2^(r p) Rademacher matrices, with ties and zero rows, the law equals the exact fractions."""
    mean, second, matrix = enumerate_first_step(grad, x, rank, optimizer)
    law = laws.first_step_moments(
        np.array(grad, float), np.array(x, float), rank=rank, scaling=1.0, optimizer=optimizer, init="rademacher"
    )
    # float64 sums of at most a few hundred terms of size <= 1e4
    np.testing.assert_allclose(law.mean, [float(m) for m in mean], rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(law.second_moment, [float(s) for s in second], rtol=1e-12, atol=1e-10)
    assert law.matrix_second_moment == pytest.approx(float(matrix), rel=1e-12, abs=1e-10)


def symbol_values(law: Entries) -> dict[sp.Symbol, float]:
    return {pairings.s2: law.variance, pairings.k: law.kurtosis}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_algebra_fixed_data(rank: int) -> None:
    """Symbolically in step, s2 and k, the closed form has every term and no other."""
    grad, x = [1, -2, 3], [2, 1, -1]
    expressions = (*pairings.sgd_moments(grad, x, rank), pairings.sgd_matrix_moment(grad, rank))
    for init in INITS:
        values = symbol_values(entries(init, rank=rank, p_in=3)) | {pairings.step: 0.3 * 0.7**2}
        moments = laws.first_step_moments(
            np.array([grad], float), np.array(x, float), rank=rank, scaling=0.7, learning_rate=0.3, init=init
        )
        actual = (moments.mean[0], moments.second_moment[0], moments.matrix_second_moment)
        assert actual == pytest.approx([float(term.subs(values)) for term in expressions], rel=1e-12), init


def test_algebra_random_inputs() -> None:
    """E[w^2] over A and Gaussian inputs is symbolic in the overlap, for r = 2 and p = 3."""
    symbolic = pairings.random_input_second_moment(2, 3)
    for init in INITS:
        values = symbol_values(entries(init, rank=2, p_in=3))
        for overlap in (0.0, 0.3, -0.8, 1.0):
            moments = laws.random_input_moments(rank=2, p_in=3, scaling=1.0, overlap=overlap, init=init)
            expected = float(symbolic.subs(values | {sp.Symbol("rho"): overlap}))
            assert moments.second_moment[0] == pytest.approx(expected, rel=1e-12), (init, overlap)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["normal", "kaiming_uniform", "rademacher"])
def test_direct_sampler_random_inputs(init: str) -> None:
    """The direct sampler (autodiff and optax) agrees with the law over optimizer, rank, overlap and width."""
    cases = [(3, 5, 0.6), (6, 16, -0.3)]
    z = threshold(FALSE_ALARM, 3 * len(cases) * 3 * 2)
    for number, (rank, p_in, overlap) in enumerate(cases):
        law = {"rank": rank, "p_in": p_in, "scaling": 0.8, "learning_rate": 0.5, "overlap": overlap, "init": init}
        settings = [sampling.RandomStep(**law, optimizer=optimizer) for optimizer in OPTIMIZERS]
        drawn = sampling.estimate_settings(settings, "direct", jax.random.key(number), draws=40_000)
        for optimizer, sums in zip(OPTIMIZERS, drawn, strict=True):
            moments = laws.random_input_moments(**law, optimizer=optimizer)
            # The uniform Adam law is a series: its stated error, 0.6%, is added to the sampling error.
            slack = 0.006 if (optimizer, init) == ("adam", "kaiming_uniform") else 0.0
            for name in ("mean", "second_moment", "variance"):
                estimate, exact = getattr(sums.first, name), getattr(moments, name)[0]
                assert abs(estimate.value - exact) <= z * estimate.error + slack * abs(exact), (optimizer, name, law)


@functools.cache
def drawn_A(init: str, rank: int, p_in: int) -> np.ndarray:
    """Return 60,000 draws of A."""
    keys = jax.random.split(jax.random.key(1), 60_000)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_A(key, init, rank=rank, p_in=p_in)))(keys), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("init", ["normal", "kaiming_uniform", "rademacher"])
def test_adam_fixed_data(init: str, epsilon: float) -> None:
    """Adam's law for fixed data agrees with sampled A, with a dominant entry in one row of G and epsilon near gamma
    |u|.
    """
    rng = np.random.default_rng(7)
    p_in, rank, gamma = 20, 3, 0.5
    grad = rng.standard_normal((3, p_in))
    grad[1, 4] = 8.0
    grad[2] = 0.0
    x = rng.standard_normal((2, p_in))
    scale = entries(init, rank=rank, p_in=p_in).deviation
    law = laws.first_step_moments(
        grad, x, rank=rank, scaling=gamma, optimizer="adam", init=init, epsilon=epsilon * gamma * scale
    )
    A = drawn_A(init, rank, p_in)
    u = A @ grad.T
    f = np.divide(u, np.abs(u) + epsilon * scale, out=np.zeros_like(u), where=u != 0)
    dm = -gamma * np.einsum("nri,nrj->nij", f, A)
    w = np.einsum("nij,tj->nti", dm, x)
    # With epsilon and non-Gaussian A the stated relative error is epsilon / (gamma s |g_i|), twice it for squares.
    stated = epsilon / np.maximum(np.linalg.norm(grad, axis=1), 1e-9) if init != "normal" else np.zeros(3)
    z = threshold(FALSE_ALARM, 14 * 6)
    for exact, sample, slack in [(law.mean, w, stated), (law.second_moment, w**2, 2 * stated)]:
        error = sample.std(axis=0) / math.sqrt(len(A))
        assert np.all(np.abs(sample.mean(axis=0) - exact) <= z * error + slack * np.abs(exact))
    size = np.sum(dm**2, axis=(1, 2))
    allowed = z * size.std() / math.sqrt(len(A)) + 2 * stated[:2].max() * size.mean()
    assert abs(size.mean() - law.matrix_second_moment) <= allowed


def test_adam_uniform_direction_in_closed_form() -> None:
    """E[sign(u) a] is the gradient of E|u| in g.

    For p = 2, |g_1| < |g_2| and entries in U(-h, h), E|u| = h (|g_2| / 2 + g_1^2 / (6 |g_2|)).
    """
    first, second = 0.6, -0.8
    moments = laws.first_step_moments(
        np.array([[first, second]]), np.eye(2), rank=1, scaling=1.0, optimizer="adam", init="kaiming_uniform"
    )
    expected = np.array([first / (3 * abs(second)), -(1 / 2 - first**2 / (6 * second**2))]) / math.sqrt(2)
    np.testing.assert_allclose(-moments.mean[:, 0], expected, rtol=2e-5)


def test_crossing_ranks() -> None:
    """At r* the two terms are equal, by the law's own increments in r."""
    rng = np.random.default_rng(3)
    grad, x = rng.standard_normal((4, 50)), rng.standard_normal((3, 50)) + 0.3
    for optimizer in OPTIMIZERS:
        for token, star in enumerate(laws.crossing_rank(grad, x, optimizer=optimizer)):
            # E|w|^2 = a (r^2 + r) + b r (SGD, Gaussian) or a r (r - 1) + b r (Adam): a and b from ranks 1 and 2.
            first, second = (
                laws.first_step_moments(grad, x[token], rank=rank, scaling=1.0, optimizer=optimizer).norm_second_moment
                for rank in (1, 2)
            )
            signal = (second - 2 * first) / 2
            expected = first / signal - 2 if optimizer == "sgd" else first / signal + 1
            assert star == pytest.approx(float(expected), rel=1e-9)


@given(st.integers(1, 5000), st.floats(1e-3, 1.0), st.sampled_from(OPTIMIZERS))
def test_local_exponent_is_the_derivative(rank: int, overlap: float, optimizer: Optimizer) -> None:
    linear = linear_term(512, overlap, optimizer)

    def second(r: float) -> float:
        return r**2 + r * linear

    law = [
        laws.random_input_moments(rank=r, p_in=512, scaling=1.0, overlap=overlap, optimizer=optimizer).second_moment[0]
        for r in (rank, rank + 1)
    ]
    assert second(rank + 1) / second(rank) == pytest.approx(law[1] / law[0], rel=1e-9)
    h = rank * 1e-6
    slope = math.log(second(rank + h) / second(rank - h)) / math.log((rank + h) / (rank - h))
    assert float(laws.local_exponent(rank, linear)) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.6, 1.0])
def test_the_rate_that_preserves_the_first_adam_step_at_one_gamma_r(overlap: float) -> None:
    """By the exact moments the rate times the step's rms is the same at both ranks."""
    for first, second in ((1, 128), (8, 32), (512, 8)):
        squares = [
            laws.random_input_moments(
                rank=rank, p_in=64, scaling=64 / rank, overlap=overlap, optimizer="adam"
            ).second_moment[0]
            for rank in (first, second)
        ]
        exponent = float(laws.equal_change_rank_exponent(first, second, linear_term(64, overlap, "adam")))
        assert exponent == pytest.approx(math.log(squares[0] / squares[1]) / 2 / math.log(second / first), abs=1e-9)
        assert 0 <= exponent + 1e-9 < 0.5
    assert laws.equal_change_rank_exponent(1, 4, np.array([0.0, 1e12])) == pytest.approx([0.0, 0.5])


def test_inits_are_those_of_their_names() -> None:
    """They are the paper's N(0, 1); PEFT's U(-b, b) with b = 1/sqrt(p_in), from kaiming_uniform_(a=sqrt 5); and its
    gaussian, std 1/r.
    """
    moments = {
        init: (entries(init, rank=4, p_in=25).variance, entries(init, rank=4, p_in=25).kurtosis) for init in INITS
    }
    assert moments == {
        "normal": (1.0, 3.0),
        "kaiming_uniform": (pytest.approx(0.2**2 / 3), 1.8),
        "rademacher": (1.0, 1.0),
        "gaussian": (pytest.approx(1 / 16), 3.0),
    }


@pytest.mark.parametrize("init", INITS)
def test_draws_have_the_moments_of_their_distribution(init: str) -> None:
    """Variance and kurtosis, and the bound of uniform entries, are tested at a total false-alarm rate of 1e-6."""
    law = entries(init, rank=3, p_in=20)
    sample = drawn_A(init, 3, 20).ravel()
    for power, exact in ((2, law.variance), (4, law.kurtosis * law.variance**2)):
        values = sample**power
        error = values.std() / math.sqrt(values.size) + 1e-6 * exact  # float32 entries
        assert abs(values.mean() - exact) <= threshold(FALSE_ALARM, 2) * error
    if init == "kaiming_uniform":
        assert np.max(np.abs(sample)) <= (1 + 1e-6) / math.sqrt(20)


@pytest.mark.parametrize("init", ["normal", "kaiming_uniform", "rademacher"])
def test_characteristic_function(init: str) -> None:
    """phi and phi' agree with the sample mean of cos and -a sin, and phi' with differences of phi."""
    law = entries(init, rank=1, p_in=3)
    t = np.array([1e-3, 0.1, 0.7, 2.0])
    phi, slope = law.characteristic(t)
    h = 1e-5
    numeric = (law.characteristic(t + h)[0] - law.characteristic(t - h)[0]) / (2 * h)
    np.testing.assert_allclose(slope, numeric, atol=1e-9)
    np.testing.assert_allclose(phi, 1 - law.variance * t**2 / 2, atol=law.variance**2 * law.kurtosis * 2.0**4 / 24)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (entries, {"rank": 0}, "rank.* 0"),
        (entries, {"p_in": -1}, "p_in.* -1"),
        (entries, {"p_in": 2.5}, r"p_in.* 2\.5"),
        (entries, {"p_in": True}, "p_in.* True"),
        (laws.random_input_moments, {"rank": 0}, "rank.* 0"),
        (laws.random_input_moments, {"scaling": -1.0}, r"scaling.* -1\.0"),
        (laws.random_input_moments, {"learning_rate": 0.0}, r"learning_rate.* 0\.0"),
        (laws.random_input_moments, {"overlap": 1.5}, r"overlap.* 1\.5"),
        (laws.random_input_moments, {"overlap": math.nan}, "overlap.* nan"),
        (laws.random_input_moments, {"overlap": "0.5"}, r"overlap.* '0\.5'"),
        (laws.random_input_moments, {"p_in": 0}, "p_in.* 0"),
        (laws.first_step_moments, {"x": np.ones(4)}, r"grad and x.*\(2, 3\).*\(4,\)"),
        (laws.first_step_moments, {"grad": np.full((2, 3), np.nan)}, "grad.*NaN"),
    ],
)
def test_bad_input(function: Callable, change: dict, message: str) -> None:
    valid = {
        entries: {"init": "normal", "rank": 2, "p_in": 3},
        laws.random_input_moments: {"rank": 2, "p_in": 3, "scaling": 1.0},
        laws.first_step_moments: {"grad": np.ones((2, 3)), "x": np.ones(3), "rank": 1, "scaling": 1.0},
    }
    with pytest.raises(InputError, match=message):
        function(**valid[function] | change)
