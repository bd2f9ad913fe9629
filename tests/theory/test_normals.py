"""Normals that are drawn the fast way are those of JAX's own generator, to the bit."""

import jax
import numpy as np
import pytest

from rora_theory.normals import standard_normal


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (65,), (4096,), (4097,), (3, 5000), (33, 4096)])
def test_normals_are_jaxs_own(shape: tuple[int, ...]) -> None:
    """In one piece, in several, and with a last piece that is not whole; alone and under vmap."""
    keys = jax.random.split(jax.random.key(len(shape) + 11), 2)
    ours = jax.jit(jax.vmap(lambda key: standard_normal(key, shape)))(keys)
    theirs = jax.jit(jax.vmap(lambda key: jax.random.normal(key, shape)))(keys)
    np.testing.assert_array_equal(ours, theirs)


def test_a_key_of_another_generator_is_refused() -> None:
    with pytest.raises(TypeError, match="threefry2x32"):
        standard_normal(jax.random.key(0, impl="rbg"), (2,))
