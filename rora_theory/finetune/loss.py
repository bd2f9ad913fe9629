r"""Cross-entropy against a large frozen vocabulary, a few tokens at a time.

The logits of a batch, [B, T, V] in float32, are the largest array of a training step (200 MB for four
sequences of 256 tokens of a 49152-word vocabulary), and a gradient of the same size follows them. Neither is
ever held: a chunk of positions is projected, its loss and the gradient in its hidden states are taken there
and then, and its logits are dropped. The gradient needs no second projection, so this is less work than
recomputing chunks, and no more than the direct formula.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS_BYTES = 1 << 27
"""Largest block of float32 logits held at once."""


def cross_entropy(
    hidden: Float[Array, "B T d"],
    head: Float[Array, "V d"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> Float[Array, ""]:
    r""":math:`\sum_{bt} w_{bt} (\log \sum_v e^{z_{btv}} - z_{bt y_{bt}})` with logits :math:`z = h W^\top`.

    Logits, softmax and the sum are float32; the products take ``head``'s dtype and accumulate in float32. The
    gradient flows to ``hidden`` alone: ``head`` belongs to the frozen base and gets none.

    Args:
      hidden: final hidden states.
      head: the unembedding matrix.
      targets: the token each position is to predict, in [0, V).
      weights: 0 leaves a position out.
      logits_bytes: most bytes of logits held at once; at least one position of each row is.

    Returns:
      the sum, a float32 scalar. Divide by the sum of weights for the mean.
    """
    chunk, count = _chunks(targets.shape, head.shape[0], logits_bytes)
    padding = ((0, 0), (0, chunk * count - targets.shape[1]))

    def parts(a: Array) -> Array:
        a = jnp.pad(a, (*padding, (0, 0))[: a.ndim])
        return jnp.moveaxis(a.reshape(a.shape[0], count, chunk, *a.shape[2:]), 1, 0)

    # Chunks run along the sequence, so a batch that is spread over devices stays spread.
    return _summed(parts(hidden), jax.lax.stop_gradient(head), parts(targets), parts(weights))


def _chunks(shape: tuple[int, ...], vocabulary: int, logits_bytes: int) -> tuple[int, int]:
    """Positions of each row in a chunk, and the number of chunks."""
    rows, length = shape
    most = max(1, logits_bytes // (4 * vocabulary * rows))
    count = -(-length // most)
    return -(-length // count), count


@jax.custom_vjp
def _summed(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(head, *chunk)[0], None

    return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))[0]


def _summed_forward(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        part, exponentials, normaliser = _chunk_loss(head, *chunk)
        _, label, weight = chunk
        # Softmax times head less the target's row; normalised after the product, on d columns and not on V.
        mean = jnp.einsum("btv,vd->btd", exponentials, head, preferred_element_type=jnp.float32)
        mean = mean / normaliser[..., None]
        gradient = weight[..., None] * (mean - head[label].astype(jnp.float32))
        return total + part, gradient.astype(hidden.dtype)

    return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))


def _summed_backward(gradient: Array, cotangent: Array) -> tuple[Array, None, None, None]:
    return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype), None, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _chunk_loss(head: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Summed loss, exp(z - max z) in the head's dtype, and its float32 sum over the vocabulary."""
    logits = jnp.einsum("btd,vd->btv", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1)
    exponentials = jnp.exp(logits - top[..., None])
    normaliser = jnp.sum(exponentials, axis=-1)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    total = jnp.sum(weights * (jnp.log(normaliser) + top - gold))
    return total, exponentials.astype(head.dtype), normaliser
