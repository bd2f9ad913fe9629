"""Cross-entropy over a large frozen vocabulary, computed in blocks of the vocabulary.

The logits of a batch, [B, T, V] in float32, are the largest array of a training step: 400 MB for four sequences of 96
tokens and the vocabulary of 262,144 tokens of Gemma 3. Their gradient has the same size. Neither is ever held as a
whole. One pass over the blocks keeps three values for every position and rescales them whenever a larger logit appears:
the largest logit, the sum of the exponentials, and the sum of the unembedding's rows weighted by the exponentials
(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). The loss and the gradient of the hidden
states follow from these values, so that the backward pass needs no second projection.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS_BYTES = 1 << 27
"""Default maximum size in bytes of the block of float32 logits held at once."""

_MAX_BLOCK_SIZE = 8192
"""Largest number of tokens in a block; on a CPU, larger blocks do not fit in its cache and take longer."""


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
      logits_bytes: Maximum number of bytes of logits held at once. A block has at least one token.

    Returns:
      The sum, a float32 scalar. Divide it by the sum of the weights for the mean.
    """
    blocks = count_blocks(targets.size, head.shape[0], logits_bytes)
    return _loss_sum(blocks, hidden, jax.lax.stop_gradient(head), targets, weights)


def cross_entropy_of_trained_head(
    hidden: Float[Array, "B T d"],
    head: Float[Array, "V d"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Compute the sum of `cross_entropy` with a gradient in ``head`` too, for pretraining with a small vocabulary.

    The logits are held as a whole.

    Args:
      hidden: Final hidden states.
      head: Unembedding matrix.
      targets: Target token of each position, in [0, V).
      weights: Weight of each position; 0 excludes it.
    """
    logits = jnp.einsum("btd,vd->btv", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - gold))


def count_blocks(positions: int, vocabulary: int, logits_bytes: int) -> int:
    """Return the number of blocks into which `cross_entropy` divides the vocabulary."""
    block_size = max(1, min(_MAX_BLOCK_SIZE, logits_bytes // (4 * positions)))
    fewest = -(-vocabulary // block_size)
    # Blocks of equal size need no mask. Most vocabularies are padded to a multiple of 64 or more, so that there is a
    # suitable divisor; otherwise the blocks overlap.
    return next((count for count in range(fewest, 2 * fewest) if vocabulary % count == 0), fewest)


class _Softmax(NamedTuple):
    """Softmax of every position over the tokens that have been added so far.

    Attributes:
      maximum: Largest logit.
      normaliser: Sum of exp(logit - maximum).
      weighted_rows: Sum of exp(logit - maximum) times the token's row of the unembedding; None without a gradient.
    """

    maximum: Float[Array, "B T"]
    normaliser: Float[Array, "B T"]
    weighted_rows: Float[Array, "B T d"] | None


def _softmax(blocks: int, hidden: Array, head: Array, *, gradient: bool) -> _Softmax:
    """Accumulate the softmax over the vocabulary block by block."""

    def add(softmax: _Softmax, index: Array) -> tuple[_Softmax, None]:
        rows, is_new = _block(head, index, blocks)
        logits = jnp.einsum("btd,vd->btv", hidden, rows, preferred_element_type=jnp.float32)
        if is_new is not None:
            logits = jnp.where(is_new, logits, -jnp.inf)
        # Subtract the largest logit so far, so that no exponential overflows, and rescale the earlier sums to match.
        maximum = jnp.maximum(softmax.maximum, jnp.max(logits, axis=-1))
        exponentials = jnp.exp(logits - maximum[..., None])
        rescaling = jnp.exp(softmax.maximum - maximum)
        normaliser = rescaling * softmax.normaliser + jnp.sum(exponentials, axis=-1)
        weighted_rows = softmax.weighted_rows
        if weighted_rows is not None:
            exponentials = exponentials.astype(head.dtype)
            added = jnp.einsum("btv,vd->btd", exponentials, rows, preferred_element_type=jnp.float32)
            weighted_rows = rescaling[..., None] * weighted_rows + added
        return _Softmax(maximum, normaliser, weighted_rows), None

    hidden = hidden.astype(head.dtype)
    positions = hidden.shape[:-1]
    rows_sum = jnp.zeros(hidden.shape, jnp.float32) if gradient else None
    empty = _Softmax(jnp.full(positions, -jnp.inf), jnp.zeros(positions), rows_sum)
    return jax.lax.scan(add, empty, jnp.arange(blocks))[0]


def _block(head: Array, index: Array, blocks: int) -> tuple[Array, Array | None]:
    """Return the rows of a block, and a mask of those that no earlier block has; None if blocks do not overlap."""
    if blocks == 1:
        return head, None
    vocabulary, width = head.shape
    if vocabulary % blocks == 0:
        # Take every blocks-th row. Devices that share the rows of the unembedding then share those of each block, so
        # that none has to fetch rows from another.
        interleaved = head.reshape(vocabulary // blocks, blocks, width)
        return jax.lax.dynamic_index_in_dim(interleaved, index, axis=1, keepdims=False), None
    # Take consecutive rows. A block that would reach beyond the end begins earlier and overlaps the block before it.
    size = -(-vocabulary // blocks)
    begin = jnp.minimum(index * size, vocabulary - size)
    return jax.lax.dynamic_slice_in_dim(head, begin, size), begin + jnp.arange(size) >= index * size


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(blocks: int, hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    softmax = _softmax(blocks, hidden, head, gradient=False)
    return _weighted_loss(softmax, hidden, head[targets], weights)


def _loss_sum_forward(blocks: int, hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """Compute the loss and, as the residual of the backward pass, its gradient in the hidden states."""
    softmax = _softmax(blocks, hidden, head, gradient=True)
    assert softmax.weighted_rows is not None
    target_rows = head[targets]
    # The gradient is softmax(z) W minus the target's row of W.
    mean_row = softmax.weighted_rows / softmax.normaliser[..., None]
    gradient = weights[..., None] * (mean_row - target_rows.astype(jnp.float32))
    return _weighted_loss(softmax, hidden, target_rows, weights), gradient.astype(hidden.dtype)


def _loss_sum_backward(_blocks: int, gradient: Array, cotangent: Array) -> tuple[Array, None, None, None]:
    return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype), None, None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward)


def _weighted_loss(softmax: _Softmax, hidden: Array, target_rows: Array, weights: Array) -> Array:
    """Compute the weighted sum of the cross-entropy, log sum exp(z) minus the target's logit."""
    target_logits = jnp.einsum(
        "btd,btd->bt", hidden.astype(target_rows.dtype), target_rows, preferred_element_type=jnp.float32
    )
    return jnp.sum(weights * (jnp.log(softmax.normaliser) + softmax.maximum - target_logits))
