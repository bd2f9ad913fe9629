"""Inverted dropout of an adapter's input, with 16 random bits per element."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

LEVELS = 2**16
"""Number of values of a random draw."""


def dropout(key: PRNGKeyArray, x: Float[Array, "*b i"], rate: float) -> Float[Array, "*b i"]:
    r"""Compute :math:`x \odot m / q` with m Bernoulli(q), whose mean is ``x`` (Srivastava et al. 2014).

    q is ``1 - rate`` rounded to 65536 levels. The output is divided by the rounded q, so the mean is exact. Drawing
    half a 32-bit word per element halves the cost of the mask, which dominates the cost of dropout on a CPU.

    Args:
      key: Random key of the mask.
      x: Inputs of any float dtype.
      rate: Probability of a zero, in [0, 1).

    Returns:
      Array of the shape and dtype of ``x``.
    """
    # An element is kept if its 16-bit draw is below the threshold.
    threshold = min(max(round((1.0 - rate) * LEVELS), 1), LEVELS)
    if threshold == LEVELS:
        return x
    # Split each 32-bit word into two draws.
    width = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], math.ceil(width / 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., :width]
    # Scale in float32: 1/q rounded to bfloat16 would bias the mean by up to 0.4%.
    scaled = (x.astype(jnp.float32) * (LEVELS / threshold)).astype(x.dtype)
    return jnp.where(bits < jnp.uint16(threshold), scaled, jnp.zeros((), x.dtype))
