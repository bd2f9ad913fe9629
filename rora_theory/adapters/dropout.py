"""Inverted dropout of an adapter's input, from 16 random bits an element."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

LEVELS = 2**16


def dropout(key: PRNGKeyArray, x: Float[Array, "*b i"], rate: float) -> Float[Array, "*b i"]:
    r""":math:`x \odot m / q` with m Bernoulli(q), so that the mean is ``x`` (Srivastava et al. 2014).

    q is ``1 - rate`` to the nearest of 65536 levels, and the same q divides, so the mean is exact. Half a
    32-bit word an element halves the cost of the mask, which on a CPU is the cost of dropout.

    Args:
      key: one mask a key.
      x: the input, any float type.
      rate: probability of a zero, in [0, 1).

    Returns:
      array like ``x``.
    """
    kept = min(max(round((1.0 - rate) * LEVELS), 1), LEVELS)
    if kept == LEVELS:
        return x
    width = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], math.ceil(width / 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., :width]
    # Scaled in float32: 1/q rounded to bfloat16 would bias the mean by up to 0.4%.
    scaled = (x.astype(jnp.float32) * (LEVELS / kept)).astype(x.dtype)
    return jnp.where(bits < jnp.uint16(kept), scaled, jnp.zeros((), x.dtype))
