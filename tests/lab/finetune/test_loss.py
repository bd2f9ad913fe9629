"""The cross-entropy in blocks equals the direct formula and its gradient, without storing the batch's logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.lab.finetune.loss import cross_entropy

B, T, D, V = 3, 7, 5, 11
TOKEN = 4 * B * T  # bytes of the logits of one token at every position


def inputs(dtype=jnp.float32, vocabulary=V):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, T, D)).astype(dtype),
        jax.random.normal(keys[1], (vocabulary, D)).astype(dtype),
        jax.random.randint(keys[2], (B, T), 0, vocabulary),
        jax.random.bernoulli(keys[3], 0.6, (B, T)).astype(jnp.float32),
    )


def direct(hidden, head, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0])


blocked_loss = jax.jit(jax.value_and_grad(cross_entropy), static_argnames="logits_bytes")
direct_loss = jax.jit(jax.value_and_grad(direct))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [11, 12])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_equals_the_direct_formula_and_its_gradient(vocabulary, size):
    """Blocks overlap for 11 tokens and do not for 12."""
    arguments = inputs(vocabulary=vocabulary)
    loss, gradient = blocked_loss(*arguments, logits_bytes=size * TOKEN)
    expected, expected_gradient = direct_loss(*arguments)
    # Both sum about 100 terms of size 1 in float32: rounding of a few units in the last place of the sum.
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    alone = jax.jit(cross_entropy, static_argnames="logits_bytes")(*arguments, logits_bytes=size * TOKEN)
    np.testing.assert_allclose(alone, loss, rtol=2e-6)


@pytest.mark.slow
def test_the_gradient_is_scaled_by_the_upstream_gradient():
    arguments = inputs()
    plain = jax.grad(cross_entropy)(*arguments)
    scaled = jax.grad(lambda *a: 3.0 * cross_entropy(*a) ** 2)(*arguments)
    np.testing.assert_allclose(scaled, 6.0 * direct(*arguments) * plain, rtol=1e-5)


def test_bfloat16_products_accumulate_and_normalise_in_float32():
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    loss, gradient = blocked_loss(hidden, head, targets, weights, logits_bytes=2 * TOKEN)
    wide = (hidden.astype(jnp.float32), head.astype(jnp.float32), targets, weights)
    expected, expected_gradient = direct_loss(*wide)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    # Products of bfloat16 numbers are exact in float32, so the loss is as good as in float32 throughout.
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    # The exponentials and the gradient are rounded to 8 bits: 2**-8 of the largest terms, of size about 3.
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected_gradient, atol=3 * 2.0**-8)


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = inputs()
    loss = cross_entropy(100 * hidden, 10 * head, targets, weights, logits_bytes=2 * TOKEN)
    assert np.isfinite(loss)
    np.testing.assert_allclose(loss, direct(100 * hidden, 10 * head, targets, weights), rtol=2e-6)


@pytest.mark.slow
def test_positions_of_weight_zero_have_no_effect_and_the_head_is_frozen():
    hidden, head, targets, weights = inputs()
    out = weights == 0
    loss, gradient = blocked_loss(hidden, head, targets, weights, logits_bytes=2 * TOKEN)
    other = jnp.where(out[..., None], 7.0, hidden), head, jnp.where(out, 0, targets), weights
    np.testing.assert_allclose(blocked_loss(*other, logits_bytes=2 * TOKEN)[0], loss, rtol=1e-6)
    assert not gradient[out].any()
    assert gradient[~out].all()
    assert not jax.grad(cross_entropy, argnums=1)(hidden, head, targets, weights).any()


def test_no_array_of_the_whole_logits_exists():
    arguments = inputs()
    direct_program = jax.make_jaxpr(jax.grad(direct))(*arguments)
    blocked_program = jax.make_jaxpr(jax.grad(lambda *a: cross_entropy(*a, logits_bytes=2 * TOKEN)))(*arguments)
    assert largest(direct_program.jaxpr) >= B * T * V
    assert largest(blocked_program.jaxpr) < B * T * V


def largest(jaxpr):
    """Return the elements of the largest array in a program and in the programs inside it."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)
