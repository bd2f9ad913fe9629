"""Draws of A from the laws of `rora_theory.inits`, on the device."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.inits import Init, entries


def draw_A(key: PRNGKeyArray, init: Init, *, rank: int, p_in: int) -> Float[Array, "rank p_in"]:
    """A of that law, in float32; see `rora_theory.inits.entries`."""
    law = entries(init, rank=rank, p_in=p_in)
    shape = (rank, p_in)
    if law.shape == "normal":
        return law.deviation * jax.random.normal(key, shape, jnp.float32)
    if law.shape == "uniform":
        half = math.sqrt(3 * law.variance)
        return jax.random.uniform(key, shape, jnp.float32, -half, half)
    return law.deviation * jax.random.rademacher(key, shape, jnp.float32)
