r"""Rotary position embedding: pairs :math:`(x_i, x_{i+h/2})` of a head turn by position times frequency."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rora_theory.llama.config import LinearRope, LlamaConfig, RopeScaling


def frequencies(config: LlamaConfig) -> np.ndarray:
    r"""Frequencies :math:`\omega_i = \theta^{-2i/h}`, scaled as the configuration says.

    Returns [head_dim / 2] float32. Computed in float32 as the checkpoints' reference does: a frequency
    rounded otherwise turns the angle at position 8192 by more than the logits' tolerance.
    """
    half = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    plain = np.float32(1) / np.power(np.float32(config.rope_theta), half)
    return plain if config.rope_scaling is None else plain / scaling_divisor(config.rope_scaling, plain)


def scaling_divisor(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    """What each unscaled frequency is divided by: [head_dim / 2] float32, between 1 and ``factor``."""
    factor = np.float32(scaling.factor)
    if isinstance(scaling, LinearRope):
        return np.full_like(plain, factor)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    # How often each pair turns over the original context decides how much of its frequency is kept.
    turns = np.float32(scaling.original_max_position_embeddings) * plain / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return np.float32(1) / ((np.float32(1) - keep) / factor + keep)


def angles(config: LlamaConfig, positions: Int[Array, "b s"]) -> tuple[Float[Array, "b s h"], Float[Array, "b s h"]]:
    """Cosine and sine of position times frequency: two [b, s, head_dim / 2] float32."""
    angle = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies(config))[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b s n d"], cos: Float[Array, "b s h"], sin: Float[Array, "b s h"]
) -> Float[Array, "b s n d"]:
    """Rotate every head of queries or keys, in float32, returned in the dtype of ``x``."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
