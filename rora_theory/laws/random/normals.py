"""Draw standard normals with the same bits as `jax.random.normal`, but faster on CPUs.

On CPUs JAX runs the rounds of threefry in a loop, and each round reads and writes all numbers. Here the rounds are
unrolled, so that XLA keeps a number in a register from its counter to its normal. A loop over pieces prevents XLA from
computing the numbers again in each operation that reads them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, UInt32

_PIECE = 2048
"""Maximum number of normals drawn at a time: 8 KiB, which fit into the first-level cache of a core."""

_UNSPLIT_MAX = 64
"""Maximum number of normals that are drawn without a loop over pieces, as computing them again is cheap."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def standard_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Return the same bits as ``jax.random.normal(key, shape, float32)``.

    Args:
      key: Key of JAX's default generator, threefry2x32.
      shape: Shape of the result, with fewer than 2^32 entries.

    Raises:
      TypeError: The key belongs to another generator, or the shape has 2^32 entries or more.
    """
    count, words = math.prod(shape), key_words(key)
    if count >= 2**32:
        raise TypeError(f"shape must have fewer than 2^32 entries, got {count:,}")

    def on_cpu(data: UInt32[Array, "2"]) -> Float[Array, "..."]:
        size = count if count <= _UNSPLIT_MAX else min(_PIECE, -(-count // 2))  # XLA removes a loop of one iteration
        if size == count:
            return _piece(data, jnp.uint32(0), count).reshape(shape)
        # The last piece may draw more normals than are needed: cut them off.
        starts = jnp.arange(0, count, size, dtype=jnp.uint32)
        return jax.lax.map(lambda start: _piece(data, start, size), starts).reshape(-1)[:count].reshape(shape)

    def elsewhere(data: UInt32[Array, "2"]) -> Float[Array, "..."]:
        return jax.random.normal(jax.random.wrap_key_data(data, impl="threefry2x32"), shape, jnp.float32)

    return jax.lax.platform_dependent(words, cpu=on_cpu, default=elsewhere)


def _piece(key: UInt32[Array, "2"], start: UInt32[Array, ""], count: int) -> Float[Array, " count"]:
    left, right = threefry(key, jnp.uint32(0), start + jax.lax.iota(jnp.uint32, count))
    return to_normal(left ^ right)


def to_normal(bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Convert the upper 23 of 32 random bits to a standard normal by the inverse of its distribution function."""
    # As jax.random.uniform does: the bits are the mantissa of a number in [1, 2), which is shifted to [-1, 1).
    mantissa = (bits >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = (jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1) * (1 - low) + low
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(low, uniform))


def keys_at(key: PRNGKeyArray, place: UInt32[Array, ""], count: int) -> Key[Array, " count"]:
    """Derive independent keys for a position, faster to compile than ``split(fold_in(key, place), count)``.

    Args:
      key: Key of JAX's default generator, threefry2x32.
      place: Position; different positions have independent keys.
      count: Number of keys.

    Raises:
      TypeError: The key belongs to another generator.
    """
    words = threefry(key_words(key), place, jax.lax.iota(jnp.uint32, count))
    return jax.random.wrap_key_data(jnp.stack(words, axis=-1), impl="threefry2x32")


def key_words(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """Return the two words of a key.

    Raises:
      TypeError: The key does not belong to JAX's default generator, threefry2x32.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(f"key must be of the generator threefry2x32, got {jax.random.key_impl(key)}")
    return jax.random.key_data(key)


def threefry(
    key: UInt32[Array, "2"], high: UInt32[Array, ""], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Compute Threefry-2x32 with 20 rounds: two words of random bits for each counter of 64 bits.

    Args:
      key: Two words of the key.
      high: Upper half of the counters.
      low: Lower halves of the counters.

    Returns:
      The first and the second word of each counter.

    References:
      Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    # Key schedule: the third word is the parity of the key.
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    left, right = high + keys[0], low + keys[1]
    # Five groups of four rounds; after each group a rotated key and the group's number are added.
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ ((right << jnp.uint32(turn)) | (right >> jnp.uint32(32 - turn)))
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right
