"""Standard normals of a threefry key: to the bit those of `jax.random.normal`, in less of a CPU's time.

On CPUs JAX goes through threefry's rounds in a loop, so that each round reads and writes all numbers. Here the rounds
are unrolled and XLA keeps a number in a register from its counter to its normal; a loop over pieces keeps XLA from
drawing the numbers anew at each place that reads them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, UInt32

_PIECE = 2048
"""Most numbers that are drawn at once: 8 KiB, which a core's first cache holds."""

_FEW = 64
"""Numbers that may as well be drawn anew at each place that reads them."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def standard_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """``jax.random.normal(key, shape, float32)``, to the bit.

    Args:
      key: of JAX's default generator, threefry2x32.
      shape: of fewer than 2^32 numbers.

    Raises:
      TypeError: a key of another generator, or a shape of 2^32 numbers or more.
    """
    count, words = math.prod(shape), words_of(key)
    if count >= 2**32:
        raise TypeError(f"{count:,} normals of one key; accepted are fewer than 2^32")

    def on_cpu(data: UInt32[Array, "2"]) -> Float[Array, "..."]:
        size = count if count <= _FEW else min(_PIECE, -(-count // 2))  # a loop of one turn would be none
        if size == count:
            return _piece(data, jnp.uint32(0), count).reshape(shape)
        starts = jnp.arange(0, count, size, dtype=jnp.uint32)
        return jax.lax.map(lambda start: _piece(data, start, size), starts).reshape(-1)[:count].reshape(shape)

    def elsewhere(data: UInt32[Array, "2"]) -> Float[Array, "..."]:
        return jax.random.normal(jax.random.wrap_key_data(data, impl="threefry2x32"), shape, jnp.float32)

    return jax.lax.platform_dependent(words, cpu=on_cpu, default=elsewhere)


def _piece(key: UInt32[Array, "2"], start: UInt32[Array, ""], count: int) -> Float[Array, " count"]:
    left, right = threefry(key, jnp.uint32(0), start + jax.lax.iota(jnp.uint32, count))
    return normal_of(left ^ right)


def normal_of(bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A standard normal by the inverse of its distribution, from the upper 23 of 32 random bits."""
    # As the mantissa of a number in [1, 2), moved to [-1, 1), both as jax.random.uniform does.
    mantissa = (bits >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = (jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1) * (1 - low) + low
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(low, uniform))


def keys_at(key: PRNGKeyArray, place: UInt32[Array, ""], count: int) -> Key[Array, " count"]:
    """Independent keys of a place, in place of ``split(fold_in(key, place), count)``, which takes long to compile."""
    drawn = threefry(words_of(key), place, jax.lax.iota(jnp.uint32, count))
    return jax.random.wrap_key_data(jnp.stack(drawn, axis=-1), impl="threefry2x32")


def words_of(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """A key's two words; raises TypeError for a key of another generator than JAX's default, threefry2x32."""
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(f"a key of {jax.random.key_impl(key)}; accepted are those of threefry2x32")
    return jax.random.key_data(key)


def threefry(
    key: UInt32[Array, "2"], high: UInt32[Array, ""], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Two words of random bits for each counter of 64 bits, given by its halves: Threefry-2x32 of 20 rounds.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    left, right = high + keys[0], low + keys[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ ((right << jnp.uint32(turn)) | (right >> jnp.uint32(32 - turn)))
        left = left + keys[(group + 1) % 3]
        right = right + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right
