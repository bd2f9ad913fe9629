"""Many steps at a constant gradient: enumeration in integers, algebra, and real steps of optax's optimizers."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from rora_theory import InputError, laws
from rora_theory.laws import constant_gradient, sgd
from rora_theory.laws.constant_gradient import Distances, distances, rate_factor, row_terms
from rora_theory.laws.first_step import Increment

P_IN, P_OUT = 96, 24


def descend(
    grad: np.ndarray | jax.Array | Callable[[jax.Array], jax.Array],
    lora_A: np.ndarray | jax.Array,
    rates: list[float] | jax.Array,
    *,
    scaling: float = 1.0,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
) -> Increment:
    """Take optax's steps on the linear loss <G, gamma B A>."""
    gradient = grad if callable(grad) else lambda step: jnp.asarray(grad, jnp.float32)
    transform = optimizer(1.0)
    start = (jnp.asarray(lora_A, jnp.float32), jnp.zeros((P_OUT, lora_A.shape[0]), jnp.float32))

    def step(carry: tuple, inputs: tuple) -> tuple:
        (params, state), (number, rate) = carry, inputs
        loss = lambda pair: Increment(pair[0], pair[1], scaling).inner(gradient(number))  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(jax.grad(loss)(params), state, params)
        params = (params[0] + rate * updates[0], params[1] + rate * updates[1])
        return (params, state), None

    inputs = (jnp.arange(len(rates), dtype=jnp.float32), jnp.asarray(rates, jnp.float32))
    (params, _), _ = jax.lax.scan(step, (start, transform.init(start)), inputs)
    return Increment(*params, scaling)


def kaiming(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, P_IN)) / math.sqrt(P_IN)


def mean_squares(
    grad: np.ndarray | Callable[[jax.Array], jax.Array],
    read_at: np.ndarray,
    rank: int,
    rates: list[float],
    *,
    seeds: int,
) -> np.ndarray:
    """Return the mean square of w under optax's Adam for ``seeds`` adapters."""

    adapters = jnp.asarray(kaiming(100, seeds * rank).reshape(seeds, rank, P_IN), jnp.float32)
    at, schedule = jnp.asarray(read_at, jnp.float32), jnp.asarray(rates, jnp.float32)
    if callable(grad):
        return np.asarray(jax.jit(partial(_mean_squares, grad))(at, adapters, schedule), np.float64)
    return np.asarray(_constant(jnp.asarray(grad, jnp.float32), at, adapters, schedule), np.float64)


def _mean_squares(grad: Any, at: jax.Array, adapters: jax.Array, rates: jax.Array) -> jax.Array:
    return jax.vmap(lambda lora_A: jnp.mean(descend(grad, lora_A, rates)(at) ** 2))(adapters)


_constant = jax.jit(_mean_squares)


def data(seed: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient of a number of tokens, and their inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, P_IN))
    return rng.normal(size=(tokens, P_OUT)).T @ x / tokens, x


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


def enumerate_descent(delta: list[int], x: list[int], read_at: list[int], rank: int, steps: int) -> Fraction:
    """Compute E|w|^2 of sign descent on one sample over every sign matrix A, in integers and without the law."""
    total = 0
    for entries in product((-1, 1), repeat=rank * len(x)):
        A = [list(entries[k * len(x) : (k + 1) * len(x)]) for k in range(rank)]
        B = [[0] * rank for _ in delta]
        for _ in range(steps):
            inner = [sum(a * v for a, v in zip(row, x, strict=True)) for row in A]
            back = [sum(d * B[i][k] for i, d in enumerate(delta)) for k in range(rank)]
            for k in range(rank):
                for i, d in enumerate(delta):
                    B[i][k] -= sign(d * inner[k])
                for j, v in enumerate(x):
                    A[k][j] -= sign(back[k] * v)
        read = [sum(a * v for a, v in zip(row, read_at, strict=True)) for row in A]
        total += sum(sum(B[i][k] * read[k] for k in range(rank)) ** 2 for i in range(len(delta)))
    return Fraction(total, 2 ** (rank * len(x)))


@given(
    delta=st.lists(st.integers(-2, 2), min_size=2, max_size=2),
    x=st.lists(st.integers(-3, 3), min_size=3, max_size=3),
    read_at=st.lists(st.integers(-3, 3), min_size=3, max_size=3),
    rank=st.integers(1, 2),
    steps=st.integers(1, 4),
)
def test_enumeration_one_sample(delta: list, x: list, read_at: list, rank: int, steps: int) -> None:
    """The mean of the terms over all pairs of rows equals the exact fraction, with ties and zeros included."""
    grad, at = np.outer(delta, x).astype(float), np.array([read_at], float)
    pairs = [np.array(rows, float).reshape(2, 3) for rows in product((-1, 1), repeat=6)]
    moved = distances([1.0] * steps, decay=None)
    # The squares are polynomials of E[q_i]^2 and E[q_i^2], which every pair of rows estimates without bias.
    pair_terms = [row_terms(grad, at, pair) for pair in pairs]
    coherent = np.mean([terms.coherent(moved.A) for terms in pair_terms])
    total = np.mean([terms.total(moved.A) for terms in pair_terms])
    square = moved.B**2 * (rank * total + rank * (rank - 1) * coherent)
    # integers below 1e6, exact in float64 but for the division by 64
    assert square == pytest.approx(float(enumerate_descent(delta, x, read_at, rank, steps)), rel=1e-12, abs=1e-9)


def test_pace_by_algebra() -> None:
    """On a ramp Adam's step is sqrt(1 + b2) / (1 + b1) where A first moves (step 2), and sqrt(3) in the limit."""
    b1, b2 = sp.symbols("b1 b2", positive=True)
    gradients = [0, 1, 2]
    paces = []
    for t in (2, 3):
        first = sum((1 - b1) * b1 ** (t - 1 - n) * gradients[n] for n in range(t)) / (1 - b1**t)
        second = sum((1 - b2) * b2 ** (t - 1 - n) * gradients[n] ** 2 for n in range(t)) / (1 - b2**t)
        paces.append(first / sp.sqrt(second))
    assert sp.simplify(paces[0] ** 2 - (1 + b2) / (1 + b1) ** 2) == 0
    values = {b1: sp.Rational(9, 10), b2: sp.Rational(999, 1000)}
    expected = [float(pace.subs(values)) for pace in paces]
    distances_A = [distances([1.0] * t).A for t in (1, 2, 3)]
    assert distances_A[0] == 0.0
    np.testing.assert_allclose(np.diff(distances_A), expected, rtol=1e-12)
    # sqrt(3): m follows the ramp up to 1 / (1 - b1) steps, v is its mean square, (t / sqrt 3)^2
    slow = (0.9, 1 - 1e-9)
    ahead = distances([1.0] * 4001, decay=slow).A - distances([1.0] * 4000, decay=slow).A
    assert ahead == pytest.approx(math.sqrt(3), rel=4e-3)  # the ramp's lag of 9 steps in 4000


def test_sgd_closed_form() -> None:
    """In one direction at a constant rate the factors are halves of (1 + h)^t -+ (1 - h)^t; other rates use the
    recursion.
    """
    scaling, rate, steps, sigma = 0.7, 0.3, 5, 1.9
    grad, x = np.array([[0.0, sigma]]), np.array([3.0, 2.0])
    equivalent, at = sgd.sgd_equivalent(grad, x, rates=[rate] * steps, scaling=scaling)
    up, down = ((1 + s * scaling * rate * sigma) ** steps for s in (1, -1))
    np.testing.assert_allclose(equivalent, [[0.0, (up - down) / 2 / scaling]], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(at, [3.0, 2.0 * (up + down) / 2], rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_optax(momentum: float) -> None:
    """The equivalent first step equals the real steps for any A, and its moments follow the first step's law."""
    grad, x = data(0, 40)
    rates = [0.0, 0.02, 0.05, 0.05, 0.03, 0.03]
    lora_A = kaiming(1, 6)
    increment = descend(grad, lora_A, rates, scaling=1.3, optimizer=lambda lr: optax.sgd(lr, momentum=momentum))
    equivalent, at = sgd.sgd_equivalent(grad, x, rates=rates, scaling=1.3, momentum=momentum)
    expected = -(1.3**2) * at @ lora_A.T @ (equivalent @ lora_A.T).T
    measured = np.asarray(increment(jnp.asarray(x, jnp.float32)))
    assert np.max(np.abs(expected)) > 0.1
    # float32 products of 96 terms over six steps
    np.testing.assert_allclose(measured, expected, atol=2e-5 * np.max(np.abs(expected)))
    adapters = [kaiming(seed, 6) for seed in range(2000)]
    squares = [np.mean((at[:3] @ A.T @ (equivalent @ A.T).T) ** 2) for A in adapters]
    law = laws.first_step_moments(equivalent, at[:3], rank=6, scaling=1.0, init="kaiming_uniform")
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - np.mean(law.second_moment)) < 4.9 * error  # a false alarm of 1e-6


@pytest.mark.parametrize("rates", [[1e-3] * 200, [0.0, *[1e-3] * 99]])
def test_one_sample_adam(rates: list[float]) -> None:
    """The law holds for optax's Adam (betas, bias correction, epsilon) and a warm-up from 0.

    The one approximation is that all entries of B share one history: measured within 3% at every horizon here; sign
    descent without Adam's pace is off by up to 2.4 times.
    """
    rng = np.random.default_rng(7)
    x = rng.normal(size=P_IN)
    grad = np.outer(rng.normal(size=P_OUT), x)
    terms = row_terms(grad, x[None], kaiming(8, 4000))
    for rank, seeds in ((8, 40), (64, 8)):
        moved = distances(rates, crossing_distance=terms.crossing_distance(rank))
        squares = mean_squares(grad, x[None], rank, rates, seeds=seeds)
        measured = math.sqrt(np.mean(squares))
        assert terms.rms(rank, scaling=1.0, moved=moved) == pytest.approx(measured, rel=0.03)
        if len(rates) == 200:
            plain = Distances(sum(rates), sum(rates[1:]))
            assert terms.rms(rank, scaling=1.0, moved=plain) < 0.7 * measured


@pytest.mark.slow
def test_many_tokens_adam() -> None:
    """The first step is exact. Once A's motion flips signs the law holds within a factor of 1.5, up to step 64."""
    fresh = np.random.default_rng(3).normal(size=(16, P_IN))
    for tokens in (16, 64):
        grad, x = data(11 + tokens, tokens)
        for read_at in (x[:16], fresh):
            terms = row_terms(grad, read_at, kaiming(8, 4000))
            for rank in (8, 64):
                for steps in (1, 8, 64):
                    moved = distances([1e-3] * steps, crossing_distance=terms.crossing_distance(rank))
                    law = terms.rms(rank, scaling=1.0, moved=moved)
                    squares = mean_squares(grad, read_at, rank, [1e-3] * steps, seeds=48)
                    if steps == 1:  # the rows that the terms rest on are 10 times as many as the adapters'
                        assert abs(np.mean(squares) - law**2) < 6 * np.std(squares) / math.sqrt(len(squares))
                    bound = 1.15 if steps <= 8 else 1.5
                    assert 1 / bound < law / math.sqrt(np.mean(squares)) < bound, (tokens, rank, steps)


@pytest.mark.slow
def test_turning_gradient() -> None:
    """If the gradient turns by theta over the horizon, the law holds to a few per cent up to theta = 0.5."""
    first, x = data(21, 1)
    second, _ = data(22, 1)
    second = second * np.linalg.norm(first) / np.linalg.norm(second)
    steps, rank = 64, 16
    terms = row_terms(first, x, kaiming(8, 4000))
    moved = distances([1e-3] * steps, crossing_distance=terms.crossing_distance(rank))
    law = terms.rms(rank, scaling=1.0, moved=moved)
    ratios = {}
    for theta in (0.0, 0.5, 3.0):
        turning = lambda step, theta=theta: (  # noqa: E731
            jnp.cos(theta * step / steps) * jnp.asarray(first, jnp.float32)
            + jnp.sin(theta * step / steps) * jnp.asarray(second, jnp.float32)
        )
        squares = mean_squares(turning, x, rank, [1e-3] * steps, seeds=48)
        ratios[theta] = law / math.sqrt(np.mean(squares))
    assert ratios[0.0] == pytest.approx(1.0, abs=0.05)
    assert ratios[0.5] == pytest.approx(1.0, abs=0.1)
    assert ratios[3.0] > 1.2


def test_rate_exponents_are_the_slopes_of_the_factor() -> None:
    for rho in (0.0, 0.3, 1.0, 7.0, 1e6):
        step = 1e-5
        slope = math.log(rate_factor(math.exp(step), rho)) / step
        assert slope == pytest.approx(constant_gradient.rate_exponents(rho).scaling, abs=1e-4)
        for gain in (0.1, 11.3):
            y = rate_factor(gain, rho)
            assert gain * y * (1 + rho * y) == pytest.approx(1 + rho, rel=1e-12)
    assert rate_factor(9.0, math.inf) == pytest.approx(1 / 3)


def test_sgd_exponents_by_algebra() -> None:
    """They are implicit derivatives of gamma r sinh(2 gamma eta s) = constant, at two ends too."""
    gamma, rank, eta, sigma = sp.symbols("gamma r eta sigma", positive=True)
    change = gamma * rank * sp.sinh(2 * gamma * eta * sigma)
    for tau in (0.05, 1.0, 6.0):
        at = {gamma: 0.7, rank: 16, sigma: 3.0, eta: tau / (0.7 * 3.0)}
        exponents = sgd.sgd_rate_exponents(tau)
        for symbol, exponent in ((gamma, exponents.scaling), (rank, exponents.rank)):
            slope = -sp.diff(change, symbol) / sp.diff(change, eta) * symbol / eta
            assert float(slope.subs(at)) == pytest.approx(exponent, rel=1e-9)
    assert sgd.sgd_rate_exponents(0.0) == (-2.0, -1.0)
    assert sgd.sgd_rate_exponents(math.inf) == (-1.0, 0.0)
    for kappa_one in (0.0, 0.3, 4.0, math.inf):  # under alpha / r gamma falls as 1 / r: the rate grows as r, always
        exponents = sgd.sgd_rate_exponents(kappa_one)
        assert exponents.rank - exponents.scaling == pytest.approx(1.0)


@pytest.mark.parametrize("tau", [0.02, 1.0, 4.0])
def test_sgd_s_exponents_preserve_the_change_of_real_steps(tau: float) -> None:
    """The change is gamma r sinh(2 tau), at other gammas, ranks and rates, after 1000 steps of optax's SGD on a
    gradient of one direction, which every row of A reads alike. The law has exp(tau) and real steps (1 + tau /
    n)^n, less by a factor of exp(tau^2 / 2n).
    """
    rng = np.random.default_rng(5)
    left, right = (v / np.linalg.norm(v) for v in (rng.normal(size=P_OUT), rng.normal(size=P_IN)))
    sigma, steps = 2.0, 1000
    rows = kaiming(7, 32)
    rows += np.outer(0.05 - rows @ right, right)

    def size(rank: int, scaling: float, rate: float) -> float:
        grad, rates = sigma * np.outer(left, right), [rate] * steps
        increment = descend(grad, rows[:rank], rates, scaling=scaling, optimizer=optax.sgd)
        return float(np.linalg.norm(np.asarray(increment(jnp.asarray(right[None], jnp.float32)))))

    base, rate = 0.5, tau / (0.5 * sigma * steps)
    first = size(16, base, rate)
    for rank, scaling, factor in ((16, 1.5 * base, 1.0), (32, base, 1.0), (32, base / 2, 1.3)):
        grown = tau * factor * scaling / base
        expected = scaling * rank / (base * 16) * math.sinh(2 * grown) / math.sinh(2 * tau)
        assert size(rank, scaling, factor * rate) / first == pytest.approx(expected, rel=2 * tau**2 / steps + 1e-3)


def test_sign_changes_are_computed_entry_by_entry() -> None:
    """An entry of G A^T reaches 0 at a finite distance if A moves against its sign, and never otherwise."""
    rng = np.random.default_rng(0)
    grad, lora_A = rng.normal(size=(30, 4)), rng.normal(size=(6, 4))
    moves = np.sign(np.sign(grad @ lora_A.T).T @ grad)
    change_distances = []
    for row, (start_row, move_row) in product(grad, zip(lora_A, moves, strict=True)):
        initial, drift = row @ start_row, row @ move_row
        change_distances.append(-initial / drift if initial * drift < 0 else math.inf)
    quantiles = row_terms(grad, rng.normal(size=(2, 4)), lora_A).sign_change_distances
    expected = tuple(np.quantile(change_distances, [0.05, 0.25, 0.5, 0.75, 0.95], method="lower"))
    assert quantiles == pytest.approx(expected)
    assert np.isfinite(quantiles[0])


def terms_of(square: constant_gradient.Quadratic) -> constant_gradient.RowTerms:
    return constant_gradient.RowTerms(square, square, (math.inf,) * 5, 1, 0)


def test_the_A_part_never_dominates_without_a_contribution() -> None:
    assert terms_of(constant_gradient.Quadratic(1.0, 0.0, 0.0)).crossing_distance(8) == math.inf


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: distances([]), "rates"),
        (lambda: distances([-1.0]), "rates"),
        (lambda: distances([1.0], decay=(1.0, 0.9)), "decay"),
        (lambda: distances([1.0], crossing_distance=0.0), "crossing_distance"),
        (lambda: rate_factor(0.0, 1.0), "gain_ratio"),
        (lambda: constant_gradient.rate_exponents(-1.0), "rho"),
        (lambda: constant_gradient.rate_exponents("1"), "rho.* '1'"),
        (lambda: rate_factor(2.0, None), "rho.* None"),
        (lambda: sgd.sgd_rate_exponents("1"), "growth.* '1'"),
        (lambda: sgd.sgd_rate_exponents(math.nan), "growth.* nan"),
        (lambda: distances([1.0], crossing_distance="1"), "crossing_distance.* '1'"),
        (lambda: row_terms(np.ones((2, 3)), np.ones((1, 3)), np.ones((1, 3))), "lora_A.* 1"),
        (
            lambda: row_terms(np.ones((2, 3)), np.ones((1, 4)), np.ones((2, 3))),
            r"x and lora_A.* \(1, 4\)",
        ),
        (
            lambda: sgd.sgd_equivalent(np.ones((2, 3)), np.ones(3), rates=[1.0], scaling=1.0, momentum=1),
            "momentum",
        ),
        (lambda: distances([1e-3] * 3, crossing_distance=1e-300), "crossing_distance.*1e-300"),
        (lambda: constant_gradient.rate_for_equal_change(1e-3, [0.0], [1.0, 1.0], crossing_distance=1.0), "first"),
        (lambda: constant_gradient.rate_for_equal_change(1e-3, [1.0], [0.0, 0.0], crossing_distance=1.0), "second"),
        (lambda: constant_gradient.rate_for_equal_change(0.0, [1.0], [1.0], crossing_distance=1.0), r"rate.* 0\.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(call: Callable, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_a_crossing_distance_whose_square_underflows_is_refused() -> None:
    """At the bound the step is still that of the limit, where B's gradient is a ramp from step 3 on."""
    smallest = 3e-3 / constant_gradient.MAX_GRADIENT_GROWTH * (1 + 1e-9)
    assert distances([1e-3] * 3, crossing_distance=smallest) == pytest.approx(
        distances([1e-3] * 3, crossing_distance=1e-50)
    )
