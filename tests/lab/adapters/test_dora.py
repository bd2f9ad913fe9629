"""DoRA's row norms and its forward pass, against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.lab.adapters import LoraConfig, dora
from rora_theory.lab.adapters.dropout import dropout
from rora_theory.lab.adapters.widen import widen
from rora_theory.lab.llama import linear

OUT, IN, RANK, GAMMA = 24, 40, 6, 2.5


def draw(seed: int, update: float = 0.3):
    keys = jax.random.split(jax.random.key(seed), 4)
    weight = jax.random.normal(keys[0], (OUT, IN)) * 0.2
    A = GAMMA * jax.random.uniform(keys[1], (RANK, IN), minval=-1.0, maxval=1.0) / IN**0.5
    B = update * jax.random.normal(keys[2], (OUT, RANK))
    return weight, A, B, jax.random.uniform(keys[3], (OUT,), minval=0.5, maxval=2.0)


def wide(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)


@pytest.mark.parametrize("update", [0.0, 0.01, 0.3, 10.0])
def test_row_norms_are_those_of_the_sum(update: float) -> None:
    """The norms agree to 2e-6 in float32: a few roundings of sums of 40 terms, half of which the root removes."""
    weight, A, B, _ = draw(0, update)
    w, a, b = wide(weight, A, B)
    np.testing.assert_allclose(dora.row_norms(weight, A, B), np.linalg.norm(w + b @ a, axis=1), rtol=2e-6)


@pytest.mark.parametrize("left", [0.3, 0.1, 0.03, 0.01])
def test_error_when_the_update_cancels_the_weight(left: float) -> None:
    """Where the update leaves a fraction of a row, the error grows as eps / fraction^2, as the docstring states."""
    _, A, B, _ = draw(1)
    w = np.asarray(B, np.float64) @ np.asarray(A, np.float64)
    weight = jnp.asarray(-(1 + left) * w, jnp.float32)
    expected = np.linalg.norm(np.asarray(weight, np.float64) + w, axis=1)
    eps = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(dora.row_norms(weight, A, B), expected, rtol=4 * eps * 2 / left**2)


def test_row_norms_in_bfloat16_are_those_of_the_rounded_update() -> None:
    """The update is rounded to bfloat16 as in the products.

    The rest is float32 arithmetic, so the tolerance stays 2e-6.
    """
    weight, A, B, _ = draw(2)
    weight = weight.astype(jnp.bfloat16)
    w, a, b = wide(weight, A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
    norms = dora.row_norms(weight, A, B)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.linalg.norm(w + b @ a, axis=1), rtol=2e-6)


@pytest.mark.slow
def test_a_row_of_zeros_stays_finite() -> None:
    weight, A, B, m = draw(3)
    weight, B, m = weight.at[0].set(0.0), B.at[0].set(0.0), m.at[0].set(0.0)
    x = jnp.ones((1, 2, IN))

    def total(m):
        return jnp.sum(dora.apply(x, x, weight, None, A, B, m, jnp.asarray(True)))

    assert np.isfinite(total(m))
    assert np.isfinite(jax.grad(total)(m)).all()


def test_forward_is_the_definition() -> None:
    """The output has W x without dropout, (c - 1) W x_d and c gamma B A x_d under one mask, and an unscaled bias."""
    weight, A, B, m = draw(5)
    x = jax.random.normal(jax.random.key(9), (2, 3, IN))
    bias = jnp.arange(OUT, dtype=jnp.float32)
    dropped = dropout(jax.random.key(8), x, 0.4)
    output = dora.apply(x, dropped, weight, bias, A, B, m, jnp.asarray(True))
    w, a, b, mm, xx, xd, bb = wide(weight, A, B, m, x, dropped, bias)
    c = mm / np.linalg.norm(w + b @ a, axis=1)
    expected = xx @ w.T + (c - 1) * (xd @ w.T) + c * (xd @ a.T @ b.T) + bb
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert np.abs(np.asarray(output) - (c * (xx @ (w + b @ a).T) + bb)).max() > 0.1, "dropout changes the output"


def test_the_magnitude_stays_in_float32_with_bfloat16_weights() -> None:
    """The output is rounded once, by at most 2^-8 of itself. A rounded magnitude would double that."""
    weight, A, B, m = draw(7)
    x = jax.random.normal(jax.random.key(9), (4, 16, IN)).astype(jnp.bfloat16)
    weight = weight.astype(jnp.bfloat16)
    output = dora.apply(x, x, weight, None, A, B, m, jnp.asarray(True))
    assert output.dtype == jnp.bfloat16
    A, B = A.astype(jnp.bfloat16), B.astype(jnp.bfloat16)
    products = linear(x, weight), widen(linear(x, A), B)
    w, a, b, mm, base, update, y = wide(weight, A, B, m, *products, output)
    expected = mm / np.linalg.norm(w + b @ a, axis=1) * (base + update)
    assert np.max(np.abs(y - expected) / np.abs(expected)) < 2.0**-8 * 1.001


def test_a_fresh_magnitude_is_the_norm_of_bfloat16_weights_in_float32(config, params) -> None:
    """Each row's norm is computed in float32, to a few of its roundings."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    settings = LoraConfig(2, 4, target_modules=("q_proj", "down_proj"), use_dora=True)
    for name, tensors in settings.build(jax.random.key(0), config, params).params.items():
        (weight,) = wide(params["layers"][name]["weight"])
        magnitude = tensors["lora_magnitude_vector"]
        assert magnitude.dtype == jnp.float32
        np.testing.assert_allclose(magnitude, np.linalg.norm(weight, axis=2), rtol=1e-6)
