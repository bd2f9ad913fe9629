"""The adapter's second product has automatic differentiation's gradient, computed with the narrow operand first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.lab.adapters.widen import widen
from rora_theory.lab.llama import linear


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_plain_product(dtype):
    inner, B, weights = (
        jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
        for i, shape in enumerate([(2, 5, 3), (7, 3), (2, 5, 7)])
    )

    def loss(product):
        return lambda h, b: jnp.sum((weights * product(h, b)).astype(jnp.float32))

    wide, plain = (np.asarray(product(inner, B), np.float32) for product in (widen, linear))
    np.testing.assert_allclose(wide, plain, rtol=2 * jnp.finfo(dtype).eps, atol=1e-6)
    gradients = (jax.grad(loss(product), (0, 1))(inner, B) for product in (widen, linear))
    for ours, expected in zip(*gradients, strict=True):
        assert ours.dtype == expected.dtype
        # The same sums of at most ten products: equal but for their order.
        np.testing.assert_allclose(
            ours.astype(jnp.float32), expected.astype(jnp.float32), rtol=20 * jnp.finfo(dtype).eps, atol=1e-6
        )


def test_no_wide_array_is_the_left_operand_of_a_gradient_in_B():
    inner, B = jnp.ones((2, 5, 3)), jnp.ones((7, 3))
    jaxpr = jax.make_jaxpr(jax.grad(lambda b: jnp.sum(widen(inner, b))))(B)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    over_tokens = [e for e in products if len(e.params["dimension_numbers"][0][0]) == 2]
    assert [e.invars[0].aval.shape for e in over_tokens] == [(2, 5, 3)]
