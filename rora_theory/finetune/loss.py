"""Cross-entropy over a large frozen vocabulary, computed in chunks of positions.

The logits of a batch, [B, T, V] in float32, are the largest array of a training step: 200 MB for four sequences of 256
tokens and a vocabulary of 49152. Their gradient has the same size. Neither is ever held as a whole. The forward pass
projects one chunk of positions, computes its loss and the gradient of its hidden states, and drops the logits. The
backward pass needs no second projection, so this is less work than recomputing chunks and no more than the direct
formula.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS_BYTES = 1 << 27
"""Default maximum size in bytes of the block of float32 logits held at once."""


def cross_entropy(
    hidden: Float[Array, "B T d"],
    head: Float[Array, "V d"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> Float[Array, ""]:
    r"""Compute the weighted sum of the cross-entropy over all positions.

    The value is :math:`\sum_{bt} w_{bt} (\log \sum_v e^{z_{btv}} - z_{bt y_{bt}})` with logits :math:`z = h W^\top`.
    Logits, softmax and the sum are float32; the products are computed in the dtype of ``head`` and accumulated in
    float32. Only ``hidden`` gets a gradient: ``head`` belongs to the frozen base.

    Args:
      hidden: Final hidden states.
      head: Unembedding matrix.
      targets: Target token of each position, in [0, V).
      weights: Weight of each position; 0 excludes it.
      logits_bytes: Maximum number of bytes of logits held at once. A chunk has at least one position of each row.

    Returns:
      The sum, a float32 scalar. Divide it by the sum of the weights for the mean.
    """
    # Equal chunks are needed to scan over them. The padding has weight 0, so it adds nothing to the sum.
    chunk, count = _chunks(targets.shape, head.shape[0], logits_bytes)
    padding = ((0, 0), (0, chunk * count - targets.shape[1]))

    def split(array: Array) -> Array:
        """Pad the sequence axis and move its chunks to the front: [count, B, chunk, ...]."""
        array = jnp.pad(array, (*padding, (0, 0))[: array.ndim])
        return jnp.moveaxis(array.reshape(array.shape[0], count, chunk, *array.shape[2:]), 1, 0)

    # Chunks run along the sequence, so that rows split over devices stay on their devices.
    return _loss_sum(split(hidden), jax.lax.stop_gradient(head), split(targets), split(weights))


def _chunks(shape: tuple[int, ...], vocabulary: int, logits_bytes: int) -> tuple[int, int]:
    """Return the number of positions per row in a chunk, and the number of chunks."""
    rows, length = shape
    limit = max(1, logits_bytes // (4 * vocabulary * rows))
    count = -(-length // limit)
    return -(-length // count), count


@jax.custom_vjp
def _loss_sum(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(head, *chunk)[0], None

    return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))[0]


def _loss_sum_forward(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """Compute the loss and, as the residual of the backward pass, its gradient in the hidden states."""

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        chunk_loss, exponentials, normaliser = _chunk_loss(head, *chunk)
        _, label, weight = chunk
        # Gradient in the hidden states: softmax(z) W minus the target's row of W. The softmax is normalised after the
        # product, on d columns instead of V.
        mean = jnp.einsum("btv,vd->btd", exponentials, head, preferred_element_type=jnp.float32)
        mean = mean / normaliser[..., None]
        gradient = weight[..., None] * (mean - head[label].astype(jnp.float32))
        return total + chunk_loss, gradient.astype(hidden.dtype)

    return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))


def _loss_sum_backward(gradient: Array, cotangent: Array) -> tuple[Array, None, None, None]:
    return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype), None, None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward)


def _chunk_loss(head: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Return the summed loss, exp(z - max z) in the head's dtype, and its float32 sum over the vocabulary."""
    logits = jnp.einsum("btd,vd->btv", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    # Subtract the largest logit, so that no exponential overflows.
    maximum = jnp.max(logits, axis=-1)
    exponentials = jnp.exp(logits - maximum[..., None])
    normaliser = jnp.sum(exponentials, axis=-1)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    total = jnp.sum(weights * (jnp.log(normaliser) + maximum - gold))
    return total, exponentials.astype(head.dtype), normaliser
