"""Keys of streams by name, and draws of A from the laws of `rora_theory.inits`, on the device."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.inits import Init, entries
from rora_theory.random import seeds
from rora_theory.random.normals import standard_normal


def stream_key(seed: int, name: str) -> PRNGKeyArray:
    """The key of the stream of draws with this name: the same in every run that has it, different for every other."""
    return jax.random.fold_in(jax.random.key(seed), seeds.of_name(name))


def draw_A(key: PRNGKeyArray, init: Init, *, rank: int, p_in: int) -> Float[Array, "rank p_in"]:
    """A of that law, in float32; see `rora_theory.inits.entries`."""
    law = entries(init, rank=rank, p_in=p_in)
    shape = (rank, p_in)
    if law.shape == "normal":
        return law.deviation * standard_normal(key, shape)
    if law.shape == "uniform":
        half = math.sqrt(3 * law.variance)
        return jax.random.uniform(key, shape, jnp.float32, -half, half)
    return law.deviation * jax.random.rademacher(key, shape, jnp.float32)
