r"""Rotary position embedding: it rotates the pairs :math:`(x_i, x_{i+h/2})` of a head by position times frequency."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rora_theory.lab.llama.config import LinearRope, LlamaConfig, RopeScaling


def frequencies(config: LlamaConfig, *, windowed: bool = False) -> np.ndarray:
    r"""Compute the frequencies :math:`\omega_i = \theta^{-2i/h}`, scaled by the configuration's ``rope_scaling``.

    The arithmetic is float32, as in the checkpoints' reference: with another rounding of a frequency, the angle at
    position 8192 differs by more than the logits' tolerance.

    Args:
      windowed: Whether the layer has a sliding window. Gemma 3 has another base for such layers.

    Returns:
      Frequencies [head_dim / 2] in float32.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if windowed and config.rope_local_base_freq is not None:
        theta, scaling = config.rope_local_base_freq, None
    half = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    plain = np.float32(1) / np.power(np.float32(theta), half)
    return plain if scaling is None else plain / scaling_divisor(scaling, plain)


def scaling_divisor(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    """Compute the divisor of each unscaled frequency.

    Returns:
      Divisors [head_dim / 2] in float32, between 1 and ``factor``.
    """
    factor = np.float32(scaling.factor)
    if isinstance(scaling, LinearRope):
        return np.full_like(plain, factor)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    # Pairs that turn often over the original context keep their frequency; those that turn rarely are slowed down.
    turns = np.float32(scaling.original_max_position_embeddings) * plain / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return np.float32(1) / ((np.float32(1) - keep) / factor + keep)


Angles = tuple[Float[Array, "b s h"], Float[Array, "b s h"]]
"""Cosine and sine of position times frequency, float32."""


def angles(config: LlamaConfig, positions: Int[Array, "b s"], *, windowed: bool = False) -> Angles:
    """Compute cosine and sine of position times frequency.

    Args:
      positions: Position of each token.
      windowed: Whether the layer has a sliding window, see `frequencies`.
    """
    angle = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies(config, windowed=windowed))[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def layer_angles(config: LlamaConfig, positions: Int[Array, "b s"]) -> Callable[[Bool[Array, ""] | None], Angles]:
    """Compute the angles of all layers at once, outside a scan over the layers.

    Returns:
      A function that selects one layer's angles. Its argument is the layer's entry of `model.windowed_layers`: whether
      the layer has a sliding window, or None if all layers are alike.
    """
    # Without windows, or with one base, all layers share their angles.
    full = angles(config, positions)
    if config.sliding_window is None or config.rope_local_base_freq is None:
        return lambda _: full
    local = angles(config, positions, windowed=True)

    def select(windowed: Bool[Array, ""] | None) -> Angles:
        if windowed is None:
            return local
        return jnp.where(windowed, local[0], full[0]), jnp.where(windowed, local[1], full[1])

    return select


def rotate(
    x: Float[Array, "b s n d"], cos: Float[Array, "b s h"], sin: Float[Array, "b s h"]
) -> Float[Array, "b s n d"]:
    """Rotate every head of queries or keys in float32; return them in the dtype of ``x``."""
    # A pair is an entry of the first half of a head and the same entry of the second half.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
