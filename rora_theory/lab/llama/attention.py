r"""Causal grouped-query attention, :math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v` for each head.

Two implementations compute the same function. ``"cudnn"`` is cuDNN's fused kernel, through
`jax.nn.dot_product_attention`. ``"blocked"`` goes by blocks of queries: a block computes no scores with keys of its
future, and no probabilities are stored for the backward pass. On two CPU cores, with 4 x 256 tokens and 9 heads over 3
of width 64, forward and backward take 11 ms blocked and 40 ms in JAX's plain form, which stores 9 MB of probabilities a
layer.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

Route = Literal["blocked", "cudnn"]
"""Implementation of attention, see `choose_route`."""
_MIN_BLOCK_ROWS = 64  # queries in a block
_MAX_BLOCKS = 16  # each block is compiled
_MASKED_SCORE = -1e30  # exp gives 0 in float32; -inf would give NaN in a row whose keys are all hidden


def choose_route(dtype: jnp.dtype, head_dim: int, *, queries: int, keys: int, masked: bool = False) -> Route:
    """Choose the implementation of attention: ``"cudnn"`` if its kernel applies and ``"blocked"`` otherwise.

    The kernel needs an NVIDIA GPU of compute capability 8 or higher, bfloat16 or float16, and a ``head_dim`` that is a
    multiple of 8 up to 128. Under a mask that is not merely causal it also needs an even number of queries and of keys.
    """
    is_supported = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    needs_even_lengths = masked or queries != keys
    is_supported = is_supported and not (needs_even_lengths and (queries % 2 or keys % 2))
    return "cudnn" if is_supported and _has_fused_kernel() else "blocked"


def _has_fused_kernel() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", None)  # absent on AMD
    return isinstance(capability, str) and float(capability) >= 8.0


def attend(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b t k d"],
    v: Float[Array, "b t k d"],
    mask: Bool[Array, "#b 1 s t"] | None = None,
    *,
    route: Route | None = None,
) -> Float[Array, "b s n d"]:
    """Compute the attention of the last s of t positions, in the dtype of ``q``.

    Head n reads key/value head ``n // (heads / kv_heads)``.

    Args:
      q: Queries of the positions t - s to t - 1.
      k: Keys of all t positions.
      v: Values of all t positions.
      mask: True if a query may attend to a key, never one after its own position; None allows all keys up to its own.
        The output of a query that may attend to no key is finite but meaningless.
      route: Implementation; None chooses one, see `choose_route`.
    """
    length, keys = q.shape[1], k.shape[1]
    route = route or choose_route(q.dtype, q.shape[3], queries=length, keys=keys, masked=mask is not None)
    if route == "blocked":
        return _blocked(q, k, v, mask)
    # JAX's own causal mask counts from the first key, so later queries need an explicit one.
    if mask is None and length != keys:
        mask = causal_mask(length, keys, keys - length)[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation="cudnn")


def attend_segments(
    q: Float[Array, "b s n d"],
    segments: Sequence[tuple[Float[Array, "#b k d _"], Float[Array, "#b k _ d"]]],
    mask: Bool[Array, "b 1 s t"],
) -> Float[Array, "b s n d"]:
    """Compute the attention of few queries over keys in several segments, in the dtype of ``q``.

    Decoding reads all keys for every token. The segments are therefore neither concatenated nor transposed.

    Args:
      q: Queries.
      segments: Keys and values of each segment, in the order of the mask's last axis. A segment of one row belongs to
        all rows and is read once.
      mask: True if a query may attend to a key.
    """
    rows, heads = slice(0, q.shape[1]), segments[0][0].shape[1]
    # Scores with every segment, side by side.
    queries = _group(q, rows, heads)
    scores = jnp.concatenate([_row_products(queries, keys) for keys, _ in segments], axis=-1) * q.shape[3] ** -0.5
    scores = jnp.where(jnp.tile(mask, (1, 1, q.shape[2] // heads, 1)), scores, _MASKED_SCORE)
    # Softmax over all segments, without the division: that is done once on the output, which is smaller.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Weighted values of each segment, summed.
    ends = list(itertools.accumulate(keys.shape[3] for keys, _ in segments))
    pieces = jnp.split(weights, ends[:-1], axis=-1)
    out = sum(
        _row_products(piece.astype(values.dtype), values) for piece, (_, values) in zip(pieces, segments, strict=True)
    )
    return _ungroup((out / total).astype(q.dtype), rows)


def _row_products(left: Float[Array, "b k r i"], right: Float[Array, "#b k i j"]) -> Float[Array, "b k r j"]:
    """Multiply each row's matrices; if ``right`` has one row for all, stack the rows of ``left`` into one product."""
    if len(right) == len(left):
        return _einsum("bkri,bkij->bkrj", left, right)
    batch, heads, _, inner = left.shape
    out = _einsum("kri,kij->krj", left.swapaxes(0, 1).reshape(heads, -1, inner), right[0])
    return out.reshape(heads, batch, -1, out.shape[-1]).swapaxes(0, 1)


def causal_mask(queries: int, keys: int, start: Array | int = 0) -> Bool[Array, "s t"]:
    """Return True where the query at position ``start + i`` may attend to the key at position j."""
    return jnp.arange(keys)[None, :] <= (jnp.arange(queries) + start)[:, None]


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _blocked_forward(q, k, v, mask)[0]


def _blocked_forward(
    q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[Array, tuple[Array, Array, Array, Array | None, Array, list[Array]]]:
    """Compute the output and the residuals of the backward pass: arguments, output, log normaliser of each row."""
    # Heads before positions: one matrix for each key/value head.
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    outputs, log_normalisers = [], []
    for rows, visible_keys in _blocks(q.shape[1], k.shape[1]):
        scores, _ = _scores(_group(q, rows, k.shape[2]), keys, mask, rows, visible_keys)
        # Softmax, stabilised by the row's largest score; the division comes after the product with the values.
        # A hidden key has the weight 0, but 0 x NaN is NaN: a value that is not finite reaches the queries of its block
        # that must not see it. PyTorch's and cuDNN's kernels behave alike. Hiding it here would take a second product,
        # since later queries must still see it, and finite models and valid ids, padding included, have no such value.
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        output = _einsum("bkrt,bktd->bkrd", weights.astype(v.dtype), values[:, :, :visible_keys]) / total
        outputs.append(_ungroup(output.astype(q.dtype), rows))
        log_normalisers.append(top + jnp.log(total))
    # Named, so that the checkpoint policy of the layers' scan can save them.
    out = checkpoint_name(jnp.concatenate(outputs, axis=1), "attention")
    logs = [checkpoint_name(log, "log") for log in log_normalisers]
    return out, (q, k, v, mask, out, logs)


def _blocked_backward(residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Recompute the probabilities from scores and log normalisers, then differentiate the two products."""
    q, k, v, mask, out, logs = residuals
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # Softmax's derivative is p (dp - sum_t p_t dp_t); the sum equals the inner product of output and cotangent.
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_keys, d_values = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    d_queries = []
    for (rows, visible_keys), log in zip(_blocks(q.shape[1], k.shape[1]), logs, strict=True):
        queries, d_outs = _group(q, rows, k.shape[2]), _group(d_out, rows, k.shape[2])
        # Probabilities of the block, as in the forward pass.
        scores, visible = _scores(queries, keys, mask, rows, visible_keys)
        weights = jnp.where(visible, jnp.exp(scores - log), 0.0)
        # Cotangents of probabilities and scores.
        d_weights = _einsum("bkrd,bktd->bkrt", d_outs, values[:, :, :visible_keys])
        d_scores = weights * (d_weights - _group(inner, rows, k.shape[2])) * q.shape[3] ** -0.5
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        # Cotangents of the queries of this block, and its contribution to those of the keys and values.
        d_query = _einsum("bkrt,bktd->bkrd", d_scores, keys[:, :, :visible_keys])
        d_queries.append(_ungroup(d_query.astype(q.dtype), rows))
        d_keys = d_keys.at[:, :, :visible_keys].add(_einsum("bkrt,bkrd->bktd", d_scores, queries))
        d_values = d_values.at[:, :, :visible_keys].add(_einsum("bkrt,bkrd->bktd", weights, d_outs))
    d_q = jnp.concatenate(d_queries, axis=1)
    return d_q, d_keys.swapaxes(1, 2).astype(k.dtype), d_values.swapaxes(1, 2).astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)
_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(queries: int, keys: int) -> list[tuple[slice, int]]:
    """Return the blocks of queries, and the number of keys that the last query of each block can see."""
    size = max(_MIN_BLOCK_ROWS, -(-queries // _MAX_BLOCKS))
    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [(rows, rows.stop + keys - queries) for rows in blocks]


def _scores(
    queries: Array, keys: Array, mask: Array | None, rows: slice, visible_keys: int
) -> tuple[Float[Array, "b k r t"], Bool[Array, "#b 1 r t"]]:
    """Compute the scaled scores of a block's grouped queries with its visible keys, and which of them are allowed."""
    count = rows.stop - rows.start
    if mask is None:
        visible = causal_mask(count, visible_keys, visible_keys - count)[None, None]
    else:
        visible = mask[:, :, rows, :visible_keys]
    # The grouped queries repeat the block's positions once for each head of the group.
    visible = jnp.tile(visible, (1, 1, queries.shape[2] // count, 1))
    scores = _einsum("bkrd,bktd->bkrt", queries, keys[:, :, :visible_keys]) * queries.shape[3] ** -0.5
    return jnp.where(visible, scores, _MASKED_SCORE), visible


def _group(x: Float[Array, "b s n d"], rows: slice, heads: int) -> Float[Array, "b k r d"]:
    """Stack the heads that share a key/value head into one matrix of r = group x rows rows, head by head."""
    b, _, n, d = x.shape
    x = x[:, rows].reshape(b, -1, heads, n // heads, d)
    return x.transpose(0, 2, 3, 1, 4).reshape(b, heads, -1, d)


def _ungroup(x: Float[Array, "b k r d"], rows: slice) -> Float[Array, "b s n d"]:
    """Invert `_group`: back to [batch, rows, heads, width]."""
    b, heads, _, d = x.shape
    count = rows.stop - rows.start
    return x.reshape(b, heads, -1, count, d).transpose(0, 3, 1, 2, 4).reshape(b, count, -1, d)
