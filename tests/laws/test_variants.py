"""Other starts and other first steps, each against the step itself, by optax or by the method's definition."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rora_theory import InputError, laws
from rora_theory.laws.first_step import Increment
from rora_theory.laws.variants import clipped_sgd_moments, dora_first_step, muon_second_moment, start_terms

P_IN, P_OUT, TOKENS = 24, 6, 5
SIGMAS = 5.4  # a false alarm of 1e-6 over about fifteen comparisons of means of thousands


ONE_ROW = np.ones((1, P_IN)), np.ones((P_OUT, 1))


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, P_IN))
    return rng.normal(size=(TOKENS, P_OUT)).T @ x / TOKENS, x


def stepped(
    grad: np.ndarray, A: np.ndarray, B: np.ndarray, scaling: float, tx: optax.GradientTransformation
) -> tuple[np.ndarray, np.ndarray]:
    """Take optax's step on <G, gamma B A> of many adapters, from any start."""

    def take_step(params: tuple) -> tuple:
        loss = lambda pair: Increment(pair[0], pair[1], scaling).inner(jnp.asarray(grad, jnp.float32))  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    new = jax.jit(jax.vmap(take_step))((jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)))
    return np.asarray(new[0], np.float64), np.asarray(new[1], np.float64)


def read(x: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Compute B A x' of many adapters, [adapters, tokens, p_out]."""
    return np.einsum("nor,ntr->nto", B, np.einsum("nri,ti->ntr", A, x))


def agrees(squares: np.ndarray, law: float) -> None:
    error = np.std(squares, ddof=1) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - law) < SIGMAS * error
    assert error < 0.05 * law


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("random", ["B", "both"])
def test_random_starts(random: str, optimizer: str) -> None:
    """The start and the first step of adapters of rank 3 are checked with A zero and B random, and with both random."""
    grad, x = data()
    rng = np.random.default_rng(1)
    rank, count, rate, scaling = 3, 1500, 0.02, 0.8
    tx = optax.sgd(rate) if optimizer == "sgd" else optax.adam(rate, eps=1e-30)
    many_A = 0.2 * rng.normal(size=(8000, P_IN)) * (random == "both")
    many_B = 0.3 * rng.normal(size=(P_OUT, 8000))
    terms = start_terms(grad, x, many_A, many_B, learning_rate=rate, optimizer=optimizer, scaling=scaling)
    A = 0.2 * rng.normal(size=(count, rank, P_IN)) * (random == "both")
    B = 0.3 * rng.normal(size=(count, P_OUT, rank))
    change = read(x, *stepped(grad, A, B, scaling, tx)) - read(x, A, B)
    agrees(np.mean((scaling * change) ** 2, axis=(1, 2)), terms.rms(rank, scaling=scaling) ** 2)


def test_random_B_under_sgd_is_exact() -> None:
    """E|w|^2 = r (r + p_out + k - 2) |G x'|^2 at eta = gamma = s2 = 1, with Rademacher B enumerated and Gaussian B
    drawn.
    """
    grad, x = data()
    p_out, rank = 3, 2
    small = grad[:p_out]
    y = x @ small.T
    signs = 2.0 * ((np.arange(2 ** (p_out * rank))[:, None] >> np.arange(p_out * rank)) & 1) - 1
    exact = np.mean([np.sum((y @ B @ B.T) ** 2) for B in signs.reshape(-1, p_out, rank)])
    assert exact == pytest.approx(rank * (rank + p_out - 1) * np.sum(y**2), rel=1e-12)
    rng = np.random.default_rng(2)
    B = rng.normal(size=(20000, p_out, rank))
    agrees(
        np.sum(np.einsum("ti,nir,nor->nto", y, B, B, optimize=True) ** 2, axis=(1, 2)),
        rank * (rank + p_out + 1) * float(np.sum(y**2)),
    )


def pissa_factors(weight: np.ndarray, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of the top singular directions of the weight, as PEFT starts them."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(values[:rank] / scaling)
    return root[:, None] * right[:rank], left[:, :rank] * root


def olora_factors(weight: np.ndarray, rank: int, _scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of the QR decomposition of the weight, as PEFT starts them."""
    Q, R = np.linalg.qr(weight)
    return R[:rank], Q[:, :rank]


@pytest.mark.parametrize(("factors", "power"), [(pissa_factors, 0.5), (olora_factors, 1.0)])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_starts_from_the_weight(factors: Callable, power: float, optimizer: str) -> None:
    """The first step has this power of gamma under Adam, and twice the power under SGD."""
    grad, x = data()
    weight = np.random.default_rng(3).normal(size=(P_OUT, P_IN))
    rate = 1e-4
    tx = optax.sgd(rate) if optimizer == "sgd" else optax.adam(rate, eps=1e-30)
    sizes = []
    for scaling in (0.5, 2.0):
        A, B = factors(weight, 4, scaling)
        # float32 factors: the change is formed from the factors' own changes
        new_A, new_B = (many[0] for many in stepped(grad, A[None], B[None], scaling, tx))
        d_A, d_B = new_A - np.float32(A), new_B - np.float32(B)
        sizes.append(np.sqrt(np.mean((scaling * x @ (B @ d_A + d_B @ A + d_B @ d_A).T) ** 2)))
    slope = math.log(sizes[1] / sizes[0]) / math.log(4)
    # the rounding of entries near 1 is 1e-7, of a step 1e-4; second order in the rate is smaller
    assert slope == pytest.approx(power * (2 if optimizer == "sgd" else 1), abs=5e-3)


@pytest.mark.parametrize("init", ["normal", "kaiming_uniform"])
def test_clipped_sgd(init: str) -> None:
    """With optax's clipping by the global norm, the norm's root mean square is accurate to 0.5 / r."""
    grad, x = data()
    rng = np.random.default_rng(4)
    for rank in (8, 32):
        tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.5))
        law = clipped_sgd_moments(grad, x, rank=rank, scaling=1.7, max_norm=0.01, learning_rate=0.5, init=init)
        shape = (4000, rank, P_IN)
        A = rng.normal(size=shape) if init == "normal" else rng.uniform(-1, 1, shape) / P_IN**0.5
        w = 1.7 * read(x, *stepped(grad, A, np.zeros((4000, P_OUT, rank)), 1.7, tx))
        ratio = math.sqrt(np.mean(w**2) / np.mean(law.second_moment))
        assert 1 - 0.5 / rank < ratio < 1  # the norm of a drawn A follows the step: the law is a little high
    unclipped = clipped_sgd_moments(grad, x, rank=8, scaling=1.0, max_norm=1e9, init=init)
    law = laws.first_step_moments(grad, x, rank=8, scaling=1.0, init=init)
    np.testing.assert_allclose(unclipped.second_moment, law.second_moment, rtol=1e-12)


def test_muon() -> None:
    """The orthogonal factor by SVD gives the law up to the rank of G; above it the law is an upper bound."""
    grad, x = data()
    rng = np.random.default_rng(5)
    for rank in (1, 4, P_OUT, 12):
        A = rng.normal(size=(rank, P_IN))
        left, _, right = np.linalg.svd(grad @ A.T, full_matrices=False)
        w = -0.3 * 2.0 * x @ (left @ right @ A).T
        squares = np.sum((x @ A.T) ** 2, axis=1) * 0.36
        if rank <= min(P_OUT, TOKENS):
            np.testing.assert_allclose(np.sum(w**2, axis=1), squares, rtol=1e-9)
        else:
            assert (np.sum(w**2, axis=1) <= squares * (1 + 1e-9)).all()
    inner = rng.normal(size=(4000, 3, P_IN)) @ x[0]
    agrees(
        0.36 * np.sum(inner**2, axis=1),
        float(muon_second_moment(x[0], rank=3, scaling=2.0, learning_rate=0.3)),
    )


@pytest.mark.slow
def test_dora() -> None:
    """The reference is automatic differentiation of DoRA's layer with a constant norm, and a sign step on A, B and
    magnitude.
    """
    grad, x = data()
    rng = np.random.default_rng(6)
    W, A = rng.normal(size=(P_OUT, P_IN)), rng.normal(size=(3, P_IN))
    rate, scaling = 1e-5, 0.9

    def layer(params: tuple, detach: bool) -> jax.Array:
        lora_A, lora_B, m = params
        adapted = W + scaling * lora_B @ lora_A
        norm = jnp.linalg.norm(adapted, axis=1)
        return (m / (jax.lax.stop_gradient(norm) if detach else norm))[:, None] * adapted

    with jax.enable_x64(True):
        params = (jnp.asarray(A), jnp.zeros((P_OUT, 3)), jnp.linalg.norm(jnp.asarray(W), axis=1))
        grads = jax.grad(lambda p: jnp.sum(jnp.asarray(grad) * layer(p, True)))(params)
        new = tuple(p - rate * jnp.sign(g) for p, g in zip(params, grads, strict=True))
        measured = np.asarray(x @ np.asarray(layer(new, False) - layer(params, False)).T)
    change = -rate * scaling * np.sign(grad @ A.T) @ A
    direction, magnitude = dora_first_step(W, grad, change, x, learning_rate=rate)
    # second order in the rate
    np.testing.assert_allclose(direction + magnitude, measured, atol=1e-3 * np.max(np.abs(measured)))
    assert np.max(np.abs(magnitude)) > 0.01 * np.max(np.abs(measured))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: start_terms(*data(), *ONE_ROW, learning_rate=1.0), "lora_A.* 1"),
        (lambda: clipped_sgd_moments(*data(), rank=1, scaling=1.0, max_norm=0.0), "max_norm"),
        (
            lambda: dora_first_step(0 * data()[0], *[data()[0]] * 2, data()[1], learning_rate=1.0),
            "weight.*zeros",
        ),
    ],
)
def test_bad_input(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
