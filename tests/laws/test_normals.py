"""Normals of the fast sampler equal those of JAX's own generator to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.laws.random.normals import keys_at, standard_normal


@pytest.mark.parametrize("shape", [(), (7, 3), (4096,), (3, 5000), (33, 4096)])
def test_normals_are_jaxs_own(shape: tuple[int, ...]) -> None:
    """They are drawn in one piece, in several, and with an incomplete last piece; alone and under vmap.

    Two programs: the bits are JAX's own, their transform to float32 to a few roundings.
    """
    keys = jax.random.split(jax.random.key(len(shape) + 11), 2)
    ours = jax.jit(jax.vmap(lambda key: standard_normal(key, shape)))(keys)
    theirs = jax.jit(jax.vmap(lambda key: jax.random.normal(key, shape)))(keys)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_key_of_another_generator_is_refused() -> None:
    key = jax.random.key(0, impl="rbg")
    for draw in (lambda: standard_normal(key, (2,)), lambda: keys_at(key, jnp.uint32(0), 2)):
        with pytest.raises(TypeError, match=r"key .*threefry2x32.*got rbg"):
            draw()


def test_places_and_counters_have_keys_of_their_own() -> None:
    """Keys of one counter are a prefix of a longer request; no two keys are equal, and none equals the parent key."""
    key = jax.random.key(3)
    keys = np.stack([jax.random.key_data(keys_at(key, jnp.uint32(place), 40)) for place in (0, 1, 2**32 - 1)])
    np.testing.assert_array_equal(keys[1, :7], jax.random.key_data(keys_at(key, jnp.uint32(1), 7)))
    every = np.concatenate([*keys, jax.random.key_data(key)[None]])
    assert len(np.unique(every, axis=0)) == 3 * 40 + 1
    np.testing.assert_array_equal(keys[0], jax.random.key_data(jax.random.split(key, 40)))  # JAX's own, of place 0
