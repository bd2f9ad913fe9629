"""Derive the keys of named streams, and draw A on the device from the distributions of `rora_theory.inits`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.inits import Init, entries
from rora_theory.laws.random import seeds
from rora_theory.laws.random.normals import standard_normal


def stream_key(seed: int, name: str) -> PRNGKeyArray:
    """Return the key of a named stream. It depends on the seed and the name alone."""
    return jax.random.fold_in(jax.random.key(seed), seeds.seed_from_name(name))


def draw_A(key: PRNGKeyArray, init: Init, *, rank: int, p_in: int) -> Float[Array, "rank p_in"]:
    """Draw A in float32.

    Args:
      init: Initialisation of A, see `rora_theory.inits.entries`.
      rank: Number of rows of A, 1 or more.
      p_in: Number of columns of A, 1 or more.
    """
    distribution = entries(init, rank=rank, p_in=p_in)
    shape = (rank, p_in)
    if distribution.shape == "normal":
        return distribution.deviation * standard_normal(key, shape)
    if distribution.shape == "uniform":
        half = math.sqrt(3 * distribution.variance)
        return jax.random.uniform(key, shape, jnp.float32, -half, half)
    return distribution.deviation * jax.random.rademacher(key, shape, jnp.float32)
