r"""Beam search, equal to transformers' `generate` (5.24) without sampling.

One compiled program reads the prompts and then generates tokens in a loop on the device, which ends as soon as no row
can change. A program serves every call of the same shape: prompts are padded on the left to the length of
`length_bucket`, the batch to the size of `batch_bucket`.

The beams of one item share one key/value cache. It holds the prompt once, then one slot for every beam of every step,
and is only ever appended to. When the beams are reordered, no keys or values move: a beam attends to those slots of the
earlier steps that its own tokens came through (`_visible_slots`). A prefix that all prompts share can be read once for
all items. With one beam, the search is greedy.
"""

import functools
import numbers
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rora_theory.errors import InputError
from rora_theory.lab.llama import rope
from rora_theory.lab.llama.attention import attend_segments
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import (
    Adapter,
    NoAdapter,
    Params,
    apply_window,
    decoder_layer,
    embed,
    forward_cached,
    init_cache,
    rms_norm,
    slot_positions,
    unembed,
    windowed_layers,
)
from rora_theory.lab.llama.quantised import to_dense
from rora_theory.scaling import check_integer

EXCLUDED = -1e9
"""Number added to a score to exclude a candidate: transformers' own constant, so that even ties are the same."""


def beam_search(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    num_beams: int = 4,
    pad_id: int | None = None,
    shared: int = 0,
    adapter: Adapter | None = None,
) -> list[list[int]]:
    r"""Generate text by beam search.

    With W beams and E end tokens, each step considers the :math:`W \max(2, 1 + E)` most likely continuations of all
    beams. The first W of them that do not end become the next beams. Those that end, if they are among the first W of
    all, compete for W places among the finished sequences; at ``max_new_tokens`` every continuation ends. The score of
    a finished sequence is the log-probability of its n new tokens divided by n. An item stops if it has W finished
    sequences and the best beam at its present length would not beat the worst of them; with one beam, at its first end.

    Args:
      prompts: Token ids of each item, of any lengths from 1 on; all items run together.
      max_new_tokens: Maximum number of tokens to generate, at least 1.
      eos_ids: Tokens that end a text; may be empty.
      num_beams: Number of beams W, at least 1.
      pad_id: Padding of short prompts; None is 0. No token attends to it, so it does not change the result.
      shared: Number of leading tokens that all prompts share, to be read once for all of them. Each number compiles
        anew, so pass the same one in every call of a task (`shared_prompt.shared_length` with ``spare=1``).

    Returns:
      The new tokens of each prompt's best sequence, up to and including the one that ends it.

    Raises:
      InputError: ``num_beams`` is below 1 or too large for the vocabulary; there are no prompts; a prompt is empty or
        leaves no room for ``max_new_tokens`` within ``max_position_embeddings``; a token is outside the vocabulary;
        ``max_new_tokens`` is below 1; or the ``shared`` tokens differ between prompts or are all of a prompt.
    """
    # Validate the settings. A step needs as many candidates as `_advance_search` chooses from.
    batch = _make_batch(prompts, config, max_new_tokens, eos_ids, pad_id, shared)
    check_integer("num_beams", num_beams)
    if (candidates := num_beams * max(2, 1 + batch.eos.size)) > config.vocab_size:
        raise InputError(
            f"num_beams must leave at most {config.vocab_size} candidates a step, the size of the vocabulary; "
            f"{num_beams} beams and {batch.eos.size} end tokens make {candidates}"
        )
    tokens, lengths = _run_beam_search(params, adapter, *batch, config=config, count=max_new_tokens, beams=num_beams)
    return _remove_padding(tokens, lengths, len(prompts))


def length_bucket(length: int) -> int:
    """Return the padded length of a prompt: a multiple of an eighth of the next power of two, and of 16 at least.

    Examples:
      >>> [length_bucket(n) for n in (1, 16, 17, 100, 129, 300)]
      [16, 16, 32, 112, 160, 320]
    """
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def batch_bucket(size: int) -> int:
    """Return the padded size of a batch: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    Examples:
      >>> [batch_bucket(n) for n in (1, 5, 7, 9, 13)]
      [1, 6, 8, 12, 16]
    """
    power = 2 ** (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


_KeysAndValues: TypeAlias = tuple[Float[Array, "... k d _"], Float[Array, "... k _ d"]]
"""Keys and values of tokens, in the layout that `attend_segments` multiplies without transposing."""


class _Batch(NamedTuple):
    """Prompts as padded arrays.

    Attributes:
      shared: Tokens that all prompts begin with.
      tokens: Rest of each prompt, padded on the left.
      real: True for the prompts' tokens, False for padding.
      is_item: True for rows with a prompt. Rows that fill up the batch consist of one padding token.
      eos: Tokens that end a text.
    """

    shared: Int[np.ndarray, " p"]
    tokens: Int[np.ndarray, "b s"]
    real: Bool[np.ndarray, "b s"]
    is_item: Bool[np.ndarray, " b"]
    eos: Int[np.ndarray, " e"]


class _Beams(NamedTuple):
    """State of the search after ``step`` tokens, with W beams an item (one before the first step).

    Attributes:
      step: Number of tokens generated.
      is_open: Whether a running beam could still improve on the finished sequences.
      tokens: Tokens of the running beams.
      ancestry: Index of the beam whose cache slot holds each of those tokens; -1 for steps to come.
      scores: Log-probabilities of the running beams, best first.
      done_tokens: Tokens of the finished sequences, best first.
      done_lengths: Lengths of the finished sequences.
      done_scores: Scores of the finished sequences, log-probability divided by the length.
      done: Whether the place of a finished sequence is taken.
    """

    step: Int[Array, ""]
    is_open: Bool[Array, " b"]
    tokens: Int[Array, "b w t"]
    ancestry: Int[Array, "b w t"]
    scores: Float[Array, "b w"]
    done_tokens: Int[Array, "b w t"]
    done_lengths: Int[Array, "b w"]
    done_scores: Float[Array, "b w"]
    done: Bool[Array, "b w"]


@functools.partial(jax.jit, static_argnames=("config", "count", "beams"))
def _run_beam_search(
    params: Params,
    adapter: Adapter | None,
    shared: Array,
    tokens: Array,
    real: Array,
    is_item: Array,
    eos: Array,
    *,
    config: LlamaConfig,
    count: int,
    beams: int,
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Run beam search on a padded batch; return the tokens of each row's best sequence and their number."""
    # Read the prompts once; all beams of an item share the keys and values of its prompt.
    logits, prompts, real = _read_prompts(params, adapter, shared, tokens, real, config)
    batch = len(real)
    prompt_lengths = jnp.sum(real.astype(jnp.int32), axis=1)
    cached_positions = _slot_positions(config, real, count, beams)
    advance = functools.partial(_advance_search, eos=eos, beams=beams)

    def body(state: tuple[_Beams, Any]) -> tuple[_Beams, Any]:
        search, cache = state
        # Last token of every beam, [b, w]; its keys and values are written to the next W slots of the cache.
        last = search.step - 1
        token = jax.lax.dynamic_index_in_dim(search.tokens, last, 2, keepdims=False)
        positions, slot = prompt_lengths + last, last * beams
        # The beams of an item share the cache: a beam sees the slots of its own ancestors only.
        visible = _visible_slots(real, search.ancestry)
        # Read these tokens, then choose the next beams from the logits after them.
        logits, cache = _decode_step(
            params, adapter, token, positions, cached_positions, prompts, cache, slot, visible, config
        )
        return advance(search, logits), cache

    def is_unfinished(state: tuple[_Beams, Any]) -> Array:
        search, _ = state
        return (search.step < count) & jnp.any(search.is_open)

    # Before the first token, an item has one beam without tokens and no finished sequence.
    start = _Beams(
        step=jnp.zeros((), jnp.int32),
        is_open=is_item,
        tokens=jnp.zeros((batch, 1, count), jnp.int32),
        ancestry=jnp.full((batch, 1, count), -1, jnp.int32),
        scores=jnp.zeros((batch, 1), jnp.float32),
        done_tokens=jnp.zeros((batch, beams, count), jnp.int32),
        done_lengths=jnp.zeros((batch, beams), jnp.int32),
        done_scores=jnp.full((batch, beams), EXCLUDED, jnp.float32),
        done=jnp.zeros((batch, beams), bool),
    )
    # The prompts' logits give the first W beams; each turn of the loop adds one token to every beam.
    first = advance(start, logits[:, None])
    end, _ = jax.lax.while_loop(is_unfinished, body, (first, _empty_slots(prompts[-1], count * beams)))
    return end.done_tokens[:, 0], end.done_lengths[:, 0]


def _advance_search(
    search: _Beams,
    logits: Float[Array, "b w v"],
    *,
    eos: Int[Array, " e"],
    beams: int,
) -> _Beams:
    """Advance the search by one token.

    Returns:
      The state with W running beams of one more token.
    """
    batch, count = logits.shape[0], search.tokens.shape[2]
    length = search.step + 1
    candidates = beams * max(2, 1 + eos.shape[0])

    # Best tokens of each beam, [b w, c]. The logits have two axes here, and the maximum is computed by itself, because
    # XLA on a CPU otherwise turns top_k into a sort of the whole vocabulary.
    top_logits, top_tokens = jax.lax.top_k(logits.reshape(-1, logits.shape[-1]), candidates)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    normaliser = jnp.log(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True))
    # Their log-probabilities, added to those of their beams: [b, w, c].
    log_probabilities = (top_logits.reshape(batch, -1, candidates) - highest) - normaliser
    beam_totals = log_probabilities + search.scores[..., None]
    # Candidates: the best of those over all beams, [b, c]. No other token of a beam can be among the best c.
    total, index = jax.lax.top_k(beam_totals.reshape(batch, -1), candidates)
    parent = index // candidates
    token = jnp.take_along_axis(top_tokens.reshape(batch, -1), index, axis=1)
    tokens = _set_column(_take_rows(search.tokens, parent), token, search.step)
    ends = jnp.isin(token, eos) | (search.step + 1 == count)

    # Next beams: the best W candidates that do not end. The new token of a beam is in its own slot of this step.
    scores, chosen = jax.lax.top_k(total + jnp.where(ends, EXCLUDED, 0.0), beams)
    ancestry = _take_rows(search.ancestry, jnp.take_along_axis(parent, chosen, axis=1))
    new_slot = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[None], (batch, beams))

    # Finished sequences: the best W of the earlier ones and of those candidates among the first W that end now.
    is_new = ends & (jnp.arange(candidates) < beams)[None]
    new_scores = (
        total / length.astype(jnp.float32)
        + jnp.where(search.is_open[:, None], 0.0, EXCLUDED)
        + jnp.where(is_new, 0.0, EXCLUDED)
    )
    done_scores, finished_index = jax.lax.top_k(jnp.concatenate([search.done_scores, new_scores], axis=1), beams)
    new_lengths = jnp.broadcast_to(length, (batch, candidates))
    done = _take_rows(jnp.concatenate([search.done, is_new], axis=1), finished_index)

    # An item stays open if its best running beam would beat its worst finished sequence. Greedy search has no choice.
    worst = jnp.where(done, jnp.min(done_scores, axis=1, keepdims=True), EXCLUDED)
    can_improve = ~done[:, 0] if beams == 1 else jnp.any(scores[:, :1] / length.astype(jnp.float32) > worst, axis=1)
    return _Beams(
        step=search.step + 1,
        is_open=search.is_open & can_improve,
        tokens=_take_rows(tokens, chosen),
        ancestry=_set_column(ancestry, new_slot, search.step),
        scores=scores,
        done_tokens=_take_rows(jnp.concatenate([search.done_tokens, tokens], axis=1), finished_index),
        done_lengths=_take_rows(jnp.concatenate([search.done_lengths, new_lengths], axis=1), finished_index),
        done_scores=done_scores,
        done=done,
    )


def _visible_slots(real: Bool[Array, "b s"], ancestry: Int[Array, "b w t"]) -> Bool[Array, "b w n"]:
    """Return which of the s + t w slots each beam attends to: the prompt's tokens and the beam's own."""
    batch, beams, count = ancestry.shape
    is_ancestor = ancestry[..., None] == jnp.arange(beams)[None, None, None]
    prompt = jnp.broadcast_to(real[:, None], (batch, beams, real.shape[1]))
    return jnp.concatenate([prompt, is_ancestor.reshape(batch, beams, count * beams)], axis=-1)


def _slot_positions(config: LlamaConfig, real: Bool[Array, "b s"], count: int, beams: int) -> Int[Array, "b n"] | None:
    """Return the position of the token in each of the s + t w slots; None if no layer has a sliding window."""
    if config.sliding_window is None:
        return None
    # All beams of a step are at the same position.
    prompt = slot_positions(real)
    return jnp.concatenate([prompt, prompt[:, -1:] + 1 + jnp.repeat(jnp.arange(count), beams)[None]], axis=1)


def _read_prompts(
    params: Params, adapter: Adapter | None, shared_tokens: Array, tokens: Array, real: Array, config: LlamaConfig
) -> tuple[Float[Array, "b v"], list[_KeysAndValues], Bool[Array, "b s"]]:
    """Read the prompts.

    Returns:
      The logits after each prompt; keys and values of the shared tokens, if there are any, and of the rests; and which
      slots hold real tokens.
    """
    # Cache of the prompts alone: generated tokens get slots of their own.
    (batch, length), shared = tokens.shape, shared_tokens.shape[0]
    dtype = params["embed_tokens"].dtype
    cache = init_cache(config, batch, shared + length, dtype)
    prompts = []
    if shared:
        # Read the shared tokens in one row, then copy them to the cache of every row.
        one_row = init_cache(config, 1, shared, dtype)
        _, one_row = forward_cached(params, shared_tokens[None], one_row, config, adapter)
        prompts.append(_to_attention_layout(one_row["k"], one_row["v"]))
        cache = {name: cache[name].at[:, :, :shared].set(one_row[name]) for name in ("k", "v")} | {
            "real": cache["real"].at[:, :shared].set(True),
            "length": one_row["length"],
        }
    # Read the rests, padded on the left, behind the shared tokens.
    logits, cache = forward_cached(params, tokens, cache, config, adapter, attention_mask=real.astype(jnp.int32))
    prompts.append(_to_attention_layout(cache["k"][:, :, shared:], cache["v"][:, :, shared:]))
    return logits, prompts, cache["real"]


def _to_attention_layout(k: Float[Array, "... n k d"], v: Float[Array, "... n k d"]) -> _KeysAndValues:
    """Transpose keys and values once, instead of at every step."""
    return jnp.moveaxis(k, -3, -1), jnp.moveaxis(v, -3, -2)


def _empty_slots(like: _KeysAndValues, slots: int) -> _KeysAndValues:
    """Return a cache of empty slots for the generated tokens of such prompts."""
    keys, values = like
    return (
        jnp.zeros((*keys.shape[:4], slots), keys.dtype),
        jnp.zeros((*values.shape[:3], slots, values.shape[4]), values.dtype),
    )


def _decode_step(
    params: Params,
    adapter: Adapter | None,
    tokens: Int[Array, "b w"],
    positions: Int[Array, " b"],
    cached_positions: Int[Array, "b n"] | None,
    prompts: Sequence[_KeysAndValues],
    cache: _KeysAndValues,
    slot: Int[Array, ""],
    visible: Bool[Array, "b w n"],
    config: LlamaConfig,
) -> tuple[Float[Array, "b w v"], _KeysAndValues]:
    """Read one more token of every beam.

    Args:
      tokens: Last token of each beam.
      positions: Position of those tokens, the same for all beams of an item.
      cached_positions: Position of the token in each slot, see `_slot_positions`.
      prompts: Keys and values of the prompts, in one or two segments.
      cache: Keys and values of the generated tokens.
      slot: First of the w slots of the cache that the tokens' keys and values are written to.
      visible: True if a beam attends to a slot, of the prompts and then of the cache.

    Returns:
      The logits after each token, and the cache with the tokens.
    """
    adapter = NoAdapter() if adapter is None else adapter
    # All beams of an item are at the same position, that of the token read.
    query_positions = jnp.broadcast_to(positions[:, None], tokens.shape)
    angles = rope.layer_angles(config, query_positions)

    def body(carry: tuple[Array, _KeysAndValues], xs: tuple[Array, Params, Any, Any, Array | None]) -> tuple[Any, None]:
        x, cache = carry
        layer, weights, slices, prompt_segments, windowed = xs

        def apply(name: str, u: Array) -> Array:
            module = weights[name]
            return adapter.linear(name, u, to_dense(module["weight"]), module.get("bias"), slices, key=None)

        def attend_to_all(q: Array, k: Array, v: Array) -> Array:
            nonlocal cache
            # Append the new keys and values to the cache of this layer, in place.
            zero = jnp.zeros((), jnp.int32)
            starts = (layer, zero, zero, zero, slot), (layer, zero, zero, slot, zero)
            keys, values = (
                jax.lax.dynamic_update_slice(stored, new[None].astype(stored.dtype), start)
                for stored, new, start in zip(cache, _to_attention_layout(k, v), starts, strict=True)
            )
            cache = keys, values
            # Segments of keys and values: the prompts, then this layer's part of the cache.
            generated = tuple(jax.lax.dynamic_index_in_dim(stored, layer, 0, keepdims=False) for stored in cache)
            segments = [*prompt_segments, generated]
            mask = visible[:, None]
            # A trained prefix comes first, and every query sees it.
            if (prefix := adapter.prefix(slices)) is not None:
                keys, values = _to_attention_layout(*prefix)
                segments = [(keys[None].astype(q.dtype), values[None].astype(q.dtype)), *segments]
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (keys.shape[2], 0)), constant_values=True)
            mask = cast(Array, apply_window(config, mask, query_positions, cached_positions, mask.shape[3], windowed))
            return attend_segments(q, segments, mask)

        return (decoder_layer(x, weights, config, angles(windowed), apply, attend_to_all), cache), None

    # The cache of all layers is carried through the scan and updated in place; everything else is sliced by layer.
    index = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    xs = (index, params["layers"], adapter.layers(), list(prompts), windowed_layers(config))
    (x, cache), _ = jax.lax.scan(body, (embed(params, tokens, config), cache), xs)
    return unembed(params, rms_norm(x, params["norm"], config), config), cache


def _take_rows(x: Array, index: Int[Array, "b k"]) -> Array:
    """Return ``x[b, index[b, i]]``, the chosen rows of each item."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _set_column(x: Array, value: Array, step: Array) -> Array:
    """Return ``x`` with ``x[..., step] = value``."""
    return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), step, x.ndim - 1)


def _make_batch(
    prompts: Sequence[Sequence[int]],
    config: LlamaConfig,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int | None,
    shared: int,
) -> _Batch:
    """Validate the input of a generation and pad the prompts."""
    # Number of tokens: at least one a prompt, and room for the new ones.
    check_integer("max_new_tokens", max_new_tokens)
    if not len(prompts):
        raise InputError("prompts must contain at least one prompt, got none")
    room = config.max_position_embeddings - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= room:
            raise InputError(
                f"prompt {number} must have 1 to {room} tokens (max_position_embeddings minus max_new_tokens), "
                f"got {len(prompt)}"
            )
    # Token ids: all in the vocabulary.
    id_lists = [(f"tokens of prompt {number}", prompt) for number, prompt in enumerate(prompts)]
    id_lists += [("eos_ids", list(eos_ids)), ("pad_id", [] if pad_id is None else [pad_id])]
    for name, ids in id_lists:
        for token_id in ids:
            if not _is_int(token_id) or not 0 <= token_id < config.vocab_size:
                largest = config.vocab_size - 1
                raise InputError(f"{name} must be in the vocabulary, integers from 0 to {largest}, got {token_id!r}")
    # Shared tokens: the same in all prompts, and not all of any.
    shortest = min(map(len, prompts))
    if not _is_int(shared) or not 0 <= shared < shortest:
        raise InputError(
            f"shared must be an integer from 0 to {shortest - 1} (the shortest prompt has {shortest} "
            f"tokens), got {shared!r}"
        )
    shared_tokens = list(prompts[0][:shared])
    for number, prompt in enumerate(prompts):
        if list(prompt[:shared]) != shared_tokens:
            raise InputError(
                f"shared must be at most the number of leading tokens that all prompts have in common, got {shared}; "
                f"prompt {number} differs from prompt 0"
            )
    # Pad the rests on the left to the shape of their bucket.
    rests = [prompt[shared:] for prompt in prompts]
    longest = max(map(len, rests))
    shape = (batch_bucket(len(rests)), min(length_bucket(longest), config.max_position_embeddings - shared))
    tokens = np.full(shape, pad_id or 0, np.int32)
    real = np.zeros(shape, bool)
    real[:, -1] = True  # a row that fills up the batch has one token, so that its attention is defined
    for number, rest in enumerate(rests):
        tokens[number, -len(rest) :] = rest
        real[number, -len(rest) :] = True
    is_item = np.arange(shape[0]) < len(rests)
    return _Batch(np.array(shared_tokens, np.int32), tokens, real, is_item, np.array(sorted(set(eos_ids)), np.int32))


def _remove_padding(tokens: Array, lengths: Array, count: int) -> list[list[int]]:
    rows = zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist(), strict=True)
    return [row[:length] for row, length in rows][:count]


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
