r"""Causal grouped-query attention, :math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v` for each head.

Three routes compute the same: cuDNN's fused kernel and XLA's plain form, both through
`jax.nn.dot_product_attention`, and ``"blocked"``, the plain form by blocks of queries that see no key of
their future and keep no probabilities for the backward pass. On two CPU cores, 4 x 256 tokens, 9 heads over 3
of width 64, forward and backward take 11 ms blocked and 40 ms plain; the probabilities that the plain form
keeps are 9 MB a layer.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from rora_theory.errors import InputError

ROUTES = ("auto", "blocked", "xla", "cudnn")
_ROWS, _BLOCKS = 64, 16  # queries in a block at least; blocks at most, each of which is compiled
_HIDDEN = -1e30  # a score that float32's softmax turns into 0; infinity would give NaN where all are hidden


def choose_route(route: str, dtype: jnp.dtype, head_dim: int, *, queries: int, keys: int, masked: bool = False) -> str:
    """The route to take.

    ``"auto"`` is cuDNN where its kernel applies and blocked everywhere else. cuDNN's applies on an NVIDIA GPU
    of compute capability 8 or more, in bfloat16 or float16, for a ``head_dim`` that is a multiple of 8 up to 128,
    and, under a mask that is not causal alone, for an even number of queries and keys.

    Raises:
      InputError: an unknown route.
    """
    if route not in ROUTES:
        raise InputError(f"attention is {route!r}; accepted are {', '.join(ROUTES)}")
    if route != "auto":
        return route
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    fits = fits and not ((masked or queries != keys) and (queries % 2 or keys % 2))
    return "cudnn" if fits and _has_fused_kernel() else "blocked"


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
    route: str = "auto",
) -> Float[Array, "b s n d"]:
    """Attention of the last s of t positions, in the dtype of ``q``.

    Head n reads key/value head ``n // (heads / kv_heads)``.

    Args:
      q: queries, of positions t - s and on.
      k, v: keys and values, t >= s.
      mask: True where a query may attend to a key, never one after its own position; None is all up to its
        own. A query that may attend to none gives a finite value that means nothing.
      route: see `choose_route`.
    """
    length, keys = q.shape[1], k.shape[1]
    route = choose_route(route, q.dtype, q.shape[3], queries=length, keys=keys, masked=mask is not None)
    if route == "blocked":
        return _blocked(q, k, v, mask)
    if mask is None and length != keys:
        mask = causal(length, keys, keys - length)[None, None]
    if route == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation="cudnn")
    # In float32 throughout: JAX differentiates a bfloat16 product of this function into one of mixed dtypes.
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    out: Array = jax.nn.dot_product_attention(
        wide[0], wide[1], wide[2], mask=mask, is_causal=mask is None, implementation="xla"
    )
    return out.astype(q.dtype)


def attend_parts(
    q: Float[Array, "b s n d"],
    parts: Sequence[tuple[Float[Array, "#b k d _"], Float[Array, "#b k _ d"]]],
    mask: Bool[Array, "b 1 s t"],
) -> Float[Array, "b s n d"]:
    """Attention of few queries over keys in several parts, in the dtype of ``q``: decoding, which reads all keys for
    every token, so that what is kept is neither joined nor turned.

    Args:
      q: queries.
      parts: keys and values, in the order of the mask's t. Those of one row are all rows', and are read once.
      mask: True where a query may attend to a key.
    """
    rows, heads = slice(0, q.shape[1]), parts[0][0].shape[1]
    queries = _group(q, rows, heads)
    scores = jnp.concatenate([_of_rows(queries, keys) for keys, _ in parts], axis=-1) * q.shape[3] ** -0.5
    scores = jnp.where(jnp.tile(mask, (1, 1, q.shape[2] // heads, 1)), scores, _HIDDEN)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    ends = list(itertools.accumulate(keys.shape[3] for keys, _ in parts))
    pieces = jnp.split(weights, ends[:-1], axis=-1)
    out = sum(_of_rows(piece.astype(values.dtype), values) for piece, (_, values) in zip(pieces, parts, strict=True))
    return _ungroup((out / total).astype(q.dtype), rows)


def _of_rows(left: Float[Array, "b k r i"], right: Float[Array, "#b k i j"]) -> Float[Array, "b k r j"]:
    """The product for every row, of which ``right`` has one each, or one for all: then all rows make one matrix."""
    if len(right) == len(left):
        return _einsum("bkri,bkij->bkrj", left, right)
    batch, heads, _, inner = left.shape
    out = _einsum("kri,kij->krj", left.swapaxes(0, 1).reshape(heads, -1, inner), right[0])
    return out.reshape(heads, batch, -1, out.shape[-1]).swapaxes(0, 1)


def causal(queries: int, keys: int, start: Array | int = 0) -> Bool[Array, "s t"]:
    """True where the query at position ``start + i`` may attend to the key at position j."""
    return jnp.arange(keys)[None, :] <= (jnp.arange(queries) + start)[:, None]


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _blocked_forward(q, k, v, mask)[0]


def _blocked_forward(
    q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[Array, tuple[Array, Array, Array, Array | None, Array, list[Array]]]:
    """Output, and what the backward pass needs: the arguments, the output, each row's log normaliser."""
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs, logs = [], []
    for rows, seen in _blocks(q.shape[1], k.shape[1]):
        scores, _ = _scores(_group(q, rows, k.shape[2]), keys, mask, rows, seen)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _einsum("bkrt,bktd->bkrd", weights.astype(v.dtype), values[:, :, :seen]) / total
        outs.append(_ungroup(out.astype(q.dtype), rows))
        logs.append(top + jnp.log(total))
    out = jnp.concatenate(outs, axis=1)
    kept = checkpoint_name(out, "attention"), [checkpoint_name(log, "log") for log in logs]
    return kept[0], (q, k, v, mask, *kept)


def _blocked_backward(kept: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    """The probabilities again, from scores and log normalisers; then the cotangents of the products."""
    q, k, v, mask, out, logs = kept
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # sum_t p_t dp_t, of softmax's derivative p (dp - sum_t p_t dp_t), is the product of output and cotangent.
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_keys, d_values = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    d_queries = []
    for (rows, seen), log in zip(_blocks(q.shape[1], k.shape[1]), logs, strict=True):
        queries, d_outs = _group(q, rows, k.shape[2]), _group(d_out, rows, k.shape[2])
        scores, visible = _scores(queries, keys, mask, rows, seen)
        weights = jnp.where(visible, jnp.exp(scores - log), 0.0)
        d_weights = _einsum("bkrd,bktd->bkrt", d_outs, values[:, :, :seen])
        d_scores = weights * (d_weights - _group(inner, rows, k.shape[2])) * q.shape[3] ** -0.5
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        d_query = _einsum("bkrt,bktd->bkrd", d_scores, keys[:, :, :seen])
        d_queries.append(_ungroup(d_query.astype(q.dtype), rows))
        d_keys = d_keys.at[:, :, :seen].add(_einsum("bkrt,bkrd->bktd", d_scores, queries))
        d_values = d_values.at[:, :, :seen].add(_einsum("bkrt,bkrd->bktd", weights, d_outs))
    d_q = jnp.concatenate(d_queries, axis=1)
    return d_q, d_keys.swapaxes(1, 2).astype(k.dtype), d_values.swapaxes(1, 2).astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)
_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(queries: int, keys: int) -> list[tuple[slice, int]]:
    """Blocks of queries, and how many keys the last query of each can see."""
    size = max(_ROWS, -(-queries // _BLOCKS))
    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [(rows, rows.stop + keys - queries) for rows in blocks]


def _scores(
    queries: Array, keys: Array, mask: Array | None, rows: slice, seen: int
) -> tuple[Float[Array, "b k r t"], Bool[Array, "#b 1 r t"]]:
    """Scaled scores of a block's grouped queries with the keys it may see, and which of them are visible."""
    count = rows.stop - rows.start
    group = queries.shape[2] // count
    visible = causal(count, seen, seen - count)[None, None] if mask is None else mask[:, :, rows, :seen]
    visible = jnp.tile(visible, (1, 1, group, 1))
    scores = _einsum("bkrd,bktd->bkrt", queries, keys[:, :, :seen]) * queries.shape[3] ** -0.5
    return jnp.where(visible, scores, _HIDDEN), visible


def _group(x: Float[Array, "b s n d"], rows: slice, heads: int) -> Float[Array, "b k r d"]:
    """Rows of the heads that share a key/value head, one matrix for each: head by head, r = group x rows."""
    b, _, n, d = x.shape
    x = x[:, rows].reshape(b, -1, heads, n // heads, d)
    return x.transpose(0, 2, 3, 1, 4).reshape(b, heads, -1, d)


def _ungroup(x: Float[Array, "b k r d"], rows: slice) -> Float[Array, "b s n d"]:
    """The inverse of `_group`: back to [batch, rows, heads, width]."""
    b, heads, _, d = x.shape
    count = rows.stop - rows.start
    return x.reshape(b, heads, -1, count, d).transpose(0, 3, 1, 2, 4).reshape(b, count, -1, d)
