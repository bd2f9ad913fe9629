r"""Greedy and beam generation, equal to transformers' `generate` (5.24) without sampling.

One compiled program reads the prompts, then adds tokens in a loop on the device that ends as soon as no row
can change. A program serves every call of the same shape bucket: prompts are padded on the left to the next
length of `length_bucket`, the batch to the next size of `batch_bucket`.

The beams of one item are rows of one tree, not copies of a sequence. Its cache holds the prompt once, then a
slot for every beam of every step, and is only ever appended to: after the beams have been reordered, a beam
attends to those slots of the earlier steps that its own tokens came through (`_visible`). So the prompt is
read once and not once a beam, and nothing is moved when beams change places. What all prompts begin with can be read
once for all of them, and is kept once. Greedy generation is the same with one beam.
"""

import functools
import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rora_theory.errors import InputError
from rora_theory.llama import rope
from rora_theory.llama.attention import attend_parts
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.model import (
    Adapter,
    NoAdapter,
    Params,
    decoder_layer,
    embed,
    forward_cached,
    init_cache,
    rms_norm,
    slot_positions,
    unembed,
    windowed_layers,
    within_window,
)
from rora_theory.llama.quantised import dense

NEVER_CHOSEN = -1e9
"""Added to a score to take it out of the running: the reference's own constant, so that even its ties are
kept."""


def greedy(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int | None = None,
    shared: int = 0,
    adapter: Adapter | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again.

    Args:
      params, config: the model.
      prompts: token ids of each item, of any lengths >= 1; all are run together.
      max_new_tokens: most tokens to add, >= 1.
      eos_ids: tokens that end a text; may be empty.
      pad_id: fills up short prompts. It is never looked at, so it changes no result; None is 0.
      shared: how many tokens, with which all prompts begin, to read once for all; each number compiles anew, so give
        every call of a task the same (`shared_prompt.shared_length` with ``spare=1``).
      adapter: run beside the weights; a pytree.

    Returns:
      for each prompt the new tokens alone, up to and including the first that is in ``eos_ids``.

    Raises:
      InputError: before work starts: no prompts, an empty one, one that leaves no room for ``max_new_tokens``
        within ``max_position_embeddings``, a token outside the vocabulary, ``max_new_tokens`` below 1, or ``shared``
        tokens that are not shared or are all of a prompt.
    """
    batch = _batch(prompts, config, max_new_tokens, eos_ids, pad_id, shared)
    tokens, lengths = _greedy(params, adapter, *batch, config=config, count=max_new_tokens)
    return _unpadded(tokens, lengths, len(prompts))


def beam(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    num_beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    pad_id: int | None = None,
    shared: int = 0,
    adapter: Adapter | None = None,
) -> list[list[int]]:
    r"""The best finished sequence of a beam search.

    With W beams and E end tokens, each step takes the :math:`W \max(2, 1 + E)` likeliest continuations of all
    beams. The first W of them that do not end go on. Those that end, if among the first W of all (at
    ``max_new_tokens`` every continuation ends), compete for W places among the finished sequences, by the
    log-probability of their n new tokens divided by :math:`n^{length\_penalty}`.

    Args:
      params, config, prompts, max_new_tokens, eos_ids, pad_id, shared, adapter: as `greedy`.
      num_beams: W >= 1.
      length_penalty: above 0 favours long sequences.
      early_stopping: when an item is done. True: W sequences are finished. False: also the best running beam
        would, at its present length, not beat the worst of them. ``"never"``: nor could it at any length up
        to ``max_new_tokens``, supposing its log-probability falls no further.

    Returns:
      for each prompt the new tokens of the best sequence, up to and including the one that ends it.

    Raises:
      InputError: as `greedy`; ``num_beams`` below 1 or too many for the vocabulary, a ``length_penalty`` that
        is not finite, or an unknown ``early_stopping``.
    """
    batch = _batch(prompts, config, max_new_tokens, eos_ids, pad_id, shared)
    if not _is_int(num_beams) or num_beams < 1:
        raise InputError(f"num_beams is {num_beams!r}; accepted is an integer of 1 or more")
    if (kept := num_beams * max(2, 1 + batch.eos.size)) > config.vocab_size:
        raise InputError(
            f"num_beams is {num_beams}, with {batch.eos.size} end tokens {kept} candidates a step; accepted is at "
            f"most {config.vocab_size}, the size of the vocabulary"
        )
    if (
        isinstance(length_penalty, bool)
        or not isinstance(length_penalty, numbers.Real)
        or not math.isfinite(length_penalty)
    ):
        raise InputError(f"length_penalty is {length_penalty!r}; accepted is a finite number")
    if early_stopping not in (True, False, "never"):
        raise InputError(f"early_stopping is {early_stopping!r}; accepted are True, False, 'never'")
    penalties = np.arange(1, max_new_tokens + 1).astype(np.float64) ** float(length_penalty)
    # The length at which a running beam is compared with the finished ones.
    supposed = np.full_like(penalties, penalties[-1]) if early_stopping == "never" and length_penalty > 0 else penalties
    tokens, lengths = _beam(
        params,
        adapter,
        *batch,
        penalties.astype(np.float32),
        supposed.astype(np.float32),
        config=config,
        count=max_new_tokens,
        beams=num_beams,
        stop_when_full=early_stopping is True,
    )
    return _unpadded(tokens, lengths, len(prompts))


def length_bucket(length: int) -> int:
    """The padded length of a prompt: a multiple of an eighth of the next power of two, and of 16 at least.

    Examples:
      >>> [length_bucket(n) for n in (1, 16, 17, 100, 129, 300)]
      [16, 16, 32, 112, 160, 320]
    """
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def batch_bucket(size: int) -> int:
    """The padded size of a batch: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    Examples:
      >>> [batch_bucket(n) for n in (1, 5, 7, 9, 13)]
      [1, 6, 8, 12, 16]
    """
    power = 2 ** (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


_Kept: TypeAlias = tuple[Float[Array, "... k d _"], Float[Array, "... k _ d"]]
"""Keys and values of tokens, as the products of attention take them."""


class _Batch(NamedTuple):
    """What all prompts begin with, and their padded rests; rows that fill up the batch are one pad token and ``wanted``
    False."""

    beginning: Int[np.ndarray, " p"]
    tokens: Int[np.ndarray, "b s"]
    real: Bool[np.ndarray, "b s"]
    wanted: Bool[np.ndarray, " b"]
    eos: Int[np.ndarray, " e"]


class _Beams(NamedTuple):
    """The search's state after ``step`` tokens. W rows an item; one before the first step."""

    step: Int[Array, ""]
    open: Bool[Array, " b"]  # whether a running beam could still improve on the finished ones
    tokens: Int[Array, "b w t"]  # of running beams
    ancestry: Int[Array, "b w t"]  # which beam's cache slot holds each of those tokens; -1 where there is none
    scores: Float[Array, "b w"]  # log-probabilities of running beams, best first
    done_tokens: Int[Array, "b w t"]  # of finished sequences, best first
    done_lengths: Int[Array, "b w"]
    done_scores: Float[Array, "b w"]
    done: Bool[Array, "b w"]  # whether the place is taken


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _greedy(
    params: Params,
    adapter: Adapter | None,
    beginning: Array,
    tokens: Array,
    real: Array,
    wanted: Array,
    eos: Array,
    *,
    config: LlamaConfig,
    count: int,
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    logits, prompts, real = _read_prompts(params, adapter, beginning, tokens, real, config)
    batch = len(real)
    read = jnp.sum(real.astype(jnp.int32), axis=1)
    slots_at = _slot_positions(config, real, count, 1)

    def choose(logits: Array, out: Array, lengths: Array, running: Array, step: Array) -> tuple[Array, ...]:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        out = jnp.where(running[:, None], _set_column(out, token, step), out)
        lengths = lengths + running.astype(jnp.int32)
        return token, out, lengths, running & ~jnp.isin(token, eos), step + 1

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        (token, out, lengths, running, step), cache = state
        filled = jnp.arange(count)[None, None] < step
        visible = jnp.concatenate([real[:, None], jnp.broadcast_to(filled, (batch, 1, count))], axis=-1)
        logits, cache = _read(
            params, adapter, token[:, None], read + step - 1, slots_at, prompts, cache, step - 1, visible, config
        )
        return choose(logits[:, 0], out, lengths, running, step), cache

    def unfinished(state: tuple[Any, ...]) -> Array:
        (_, _, _, running, step), _ = state
        return (step < count) & jnp.any(running)

    zeros = jnp.zeros((batch,), jnp.int32)
    first = choose(logits, jnp.zeros((batch, count), jnp.int32), zeros, wanted, jnp.zeros((), jnp.int32))
    (_, out, lengths, _, _), _ = jax.lax.while_loop(unfinished, body, (first, _room(prompts[-1], count)))
    return out, lengths


@functools.partial(jax.jit, static_argnames=("config", "count", "beams", "stop_when_full"))
def _beam(
    params: Params,
    adapter: Adapter | None,
    beginning: Array,
    tokens: Array,
    real: Array,
    wanted: Array,
    eos: Array,
    penalties: Array,
    supposed: Array,
    *,
    config: LlamaConfig,
    count: int,
    beams: int,
    stop_when_full: bool,
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    logits, prompts, real = _read_prompts(params, adapter, beginning, tokens, real, config)
    batch = len(real)
    read = jnp.sum(real.astype(jnp.int32), axis=1)
    slots_at = _slot_positions(config, real, count, beams)
    choose = functools.partial(
        _choose, eos=eos, penalties=penalties, supposed=supposed, beams=beams, stop_when_full=stop_when_full
    )

    def body(state: tuple[_Beams, Any]) -> tuple[_Beams, Any]:
        search, cache = state
        last = search.step - 1
        token = jax.lax.dynamic_index_in_dim(search.tokens, last, 2, keepdims=False)
        visible = _visible(real, search.ancestry)
        at = last * beams
        logits, cache = _read(params, adapter, token, read + last, slots_at, prompts, cache, at, visible, config)
        return choose(search, logits), cache

    def unfinished(state: tuple[_Beams, Any]) -> Array:
        search, _ = state
        running = search.open & ~jnp.all(search.done, axis=1) if stop_when_full else search.open
        return (search.step < count) & jnp.any(running)

    start = _Beams(
        step=jnp.zeros((), jnp.int32),
        open=wanted,
        tokens=jnp.zeros((batch, 1, count), jnp.int32),
        ancestry=jnp.full((batch, 1, count), -1, jnp.int32),
        scores=jnp.zeros((batch, 1), jnp.float32),
        done_tokens=jnp.zeros((batch, beams, count), jnp.int32),
        done_lengths=jnp.zeros((batch, beams), jnp.int32),
        done_scores=jnp.full((batch, beams), NEVER_CHOSEN, jnp.float32),
        done=jnp.zeros((batch, beams), bool),
    )
    first = choose(start, logits[:, None])
    end, _ = jax.lax.while_loop(unfinished, body, (first, _room(prompts[-1], count * beams)))
    return end.done_tokens[:, 0], end.done_lengths[:, 0]


def _choose(
    search: _Beams,
    logits: Float[Array, "b w v"],
    *,
    eos: Int[Array, " e"],
    penalties: Float[Array, " t"],
    supposed: Float[Array, " t"],
    beams: int,
    stop_when_full: bool,
) -> _Beams:
    """One step of the search: from the logits after every running beam to the next running and finished
    ones."""
    batch, count = logits.shape[0], penalties.shape[0]
    kept = beams * max(2, 1 + eos.shape[0])
    # The best of each beam, then the best of those: the best of all without normalising every logit. Two
    # axes, and the maximum by itself: else XLA on CPU takes top_k for a sort of the whole vocabulary.
    top, token = jax.lax.top_k(logits.reshape(-1, logits.shape[-1]), kept)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    normaliser = jnp.log(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True))
    total = (top.reshape(batch, -1, kept) - highest) - normaliser + search.scores[..., None]
    total, index = jax.lax.top_k(total.reshape(batch, -1), kept)
    parent = index // kept
    token = jnp.take_along_axis(token.reshape(batch, -1), index, axis=1)
    tokens = _set_column(_rows(search.tokens, parent), token, search.step)
    ends = jnp.isin(token, eos) | (search.step + 1 == count)

    going = total + jnp.where(ends, NEVER_CHOSEN, 0.0)
    scores, chosen = jax.lax.top_k(going, beams)
    ancestry = _rows(search.ancestry, jnp.take_along_axis(parent, chosen, axis=1))
    own_slot = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[None], (batch, beams))

    may_finish = search.open
    if stop_when_full:
        may_finish = may_finish & ~jnp.all(search.done, axis=1)
    new = ends & (jnp.arange(kept) < beams)[None]
    done_scores = jnp.concatenate(
        [
            search.done_scores,
            total / penalties[search.step]
            + jnp.where(may_finish[:, None], 0.0, NEVER_CHOSEN)
            + jnp.where(new, 0.0, NEVER_CHOSEN),
        ],
        axis=1,
    )
    done_scores, place = jax.lax.top_k(done_scores, beams)
    length = jnp.broadcast_to(search.step + 1, (batch, kept))
    done = _rows(jnp.concatenate([search.done, new], axis=1), place)
    worst = jnp.where(done, jnp.min(done_scores, axis=1, keepdims=True), NEVER_CHOSEN)
    improvable = jnp.any(scores[:, :1] / supposed[search.step] > worst, axis=1)
    return _Beams(
        step=search.step + 1,
        open=search.open & improvable,
        tokens=_rows(tokens, chosen),
        ancestry=_set_column(ancestry, own_slot, search.step),
        scores=scores,
        done_tokens=_rows(jnp.concatenate([search.done_tokens, tokens], axis=1), place),
        done_lengths=_rows(jnp.concatenate([search.done_lengths, length], axis=1), place),
        done_scores=done_scores,
        done=done,
    )


def _visible(real: Bool[Array, "b s"], ancestry: Int[Array, "b w t"]) -> Bool[Array, "b w n"]:
    """Which of the s + t w slots each beam attends to: the prompt's real tokens and those its tokens came
    through."""
    batch, beams, count = ancestry.shape
    through = ancestry[..., None] == jnp.arange(beams)[None, None, None]
    prompt = jnp.broadcast_to(real[:, None], (batch, beams, real.shape[1]))
    return jnp.concatenate([prompt, through.reshape(batch, beams, count * beams)], axis=-1)


def _slot_positions(config: LlamaConfig, real: Bool[Array, "b s"], count: int, beams: int) -> Int[Array, "b n"] | None:
    """Position of the token in each of the s + t w slots, the prompt's, then one a step for every beam; None where no
    sliding window asks."""
    if config.sliding_window is None:
        return None
    prompt = slot_positions(real)
    return jnp.concatenate([prompt, prompt[:, -1:] + 1 + jnp.repeat(jnp.arange(count), beams)[None]], axis=1)


def _read_prompts(
    params: Params, adapter: Adapter | None, beginning: Array, tokens: Array, real: Array, config: LlamaConfig
) -> tuple[Float[Array, "b v"], list[_Kept], Bool[Array, "b s"]]:
    """Logits after each prompt; keys and values of the beginning, if there is one, and of the rests; which slots are
    real."""
    (batch, length), shared = tokens.shape, beginning.shape[0]
    dtype = params["embed_tokens"].dtype
    cache = init_cache(config, batch, shared + length, dtype)
    prompts = []
    if shared:
        _, one = forward_cached(params, beginning[None], init_cache(config, 1, shared, dtype), config, adapter)
        prompts.append(_kept(one["k"], one["v"]))
        cache = {name: cache[name].at[:, :, :shared].set(one[name]) for name in ("k", "v")} | {
            "real": cache["real"].at[:, :shared].set(True),
            "length": one["length"],
        }
    logits, cache = forward_cached(params, tokens, cache, config, adapter, attention_mask=real.astype(jnp.int32))
    prompts.append(_kept(cache["k"][:, :, shared:], cache["v"][:, :, shared:]))
    return logits, prompts, cache["real"]


def _kept(k: Float[Array, "... n k d"], v: Float[Array, "... n k d"]) -> _Kept:
    """Turned once, where every token that is added would turn them."""
    return jnp.moveaxis(k, -3, -1), jnp.moveaxis(v, -3, -2)


def _room(like: _Kept, slots: int) -> _Kept:
    """Empty slots for the keys and values of what is added to such prompts."""
    keys, values = like
    return (
        jnp.zeros((*keys.shape[:4], slots), keys.dtype),
        jnp.zeros((*values.shape[:3], slots, values.shape[4]), values.dtype),
    )


def _read(
    params: Params,
    adapter: Adapter | None,
    tokens: Int[Array, "b w"],
    positions: Int[Array, " b"],
    slots_at: Int[Array, "b n"] | None,
    prompts: Sequence[_Kept],
    cache: _Kept,
    slot: Int[Array, ""],
    visible: Bool[Array, "b w n"],
    config: LlamaConfig,
) -> tuple[Float[Array, "b w v"], _Kept]:
    """Logits after one more token of every beam, whose keys and values go to the w slots of the cache from ``slot``
    on; ``visible`` has the prompts' slots and then the cache's."""
    adapter = NoAdapter() if adapter is None else adapter
    queries_at = jnp.broadcast_to(positions[:, None], tokens.shape)
    angles = rope.layer_angles(config, queries_at)

    def body(carry: tuple[Array, _Kept], xs: tuple[Array, Params, Any, Any, Array | None]) -> tuple[Any, None]:
        x, cache = carry
        layer, weights, slices, parts, windowed = xs

        def apply(name: str, u: Array) -> Array:
            module = weights[name]
            return adapter.linear(name, u, dense(module["weight"]), module.get("bias"), slices, key=None)

        def attend_all(q: Array, k: Array, v: Array) -> Array:
            nonlocal cache
            zero = jnp.zeros((), jnp.int32)
            starts = (layer, zero, zero, zero, slot), (layer, zero, zero, slot, zero)
            keys, values = (
                jax.lax.dynamic_update_slice(kept, new[None].astype(kept.dtype), at)
                for kept, new, at in zip(cache, _kept(k, v), starts, strict=True)
            )
            cache = keys, values
            seen = [*parts, tuple(jax.lax.dynamic_index_in_dim(kept, layer, 0, keepdims=False) for kept in cache)]
            wide = visible[:, None]
            if (prefix := adapter.prefix(slices)) is not None:
                keys, values = _kept(*prefix)
                seen = [(keys[None].astype(q.dtype), values[None].astype(q.dtype)), *seen]
                wide = jnp.pad(wide, ((0, 0), (0, 0), (0, 0), (keys.shape[2], 0)), constant_values=True)
            near = within_window(config, wide, queries_at, slots_at, wide.shape[3], windowed)
            return attend_parts(q, seen, cast(Array, near))

        return (decoder_layer(x, weights, config, angles(windowed), apply, attend_all), cache), None

    index = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    xs = (index, params["layers"], adapter.layers(), list(prompts), windowed_layers(config))
    (x, cache), _ = jax.lax.scan(body, (embed(params, tokens, config), cache), xs)
    return unembed(params, rms_norm(x, params["norm"], config), config), cache


def _rows(x: Array, index: Int[Array, "b k"]) -> Array:
    """``x[b, index[b, i]]``: the rows of each item that were chosen."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _set_column(x: Array, value: Array, step: Array) -> Array:
    """``x`` with ``x[..., step] = value``."""
    return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), step, x.ndim - 1)


def _batch(
    prompts: Sequence[Sequence[int]],
    config: LlamaConfig,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int | None,
    shared: int,
) -> _Batch:
    """Check the input of a generation, and pad it."""
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; accepted is an integer of 1 or more")
    if not len(prompts):
        raise InputError("prompts is empty; accepted is one prompt or more")
    room = config.max_position_embeddings - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= room:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; accepted are 1 to {room}, max_position_embeddings "
                "less max_new_tokens"
            )
    named = [(f"prompt {number} has a token", prompt) for number, prompt in enumerate(prompts)]
    for what, ids in [*named, ("eos_ids has", eos_ids), ("pad_id is", [] if pad_id is None else [pad_id])]:
        for one in ids:
            if not _is_int(one) or not 0 <= one < config.vocab_size:
                raise InputError(
                    f"{what} {one!r}; accepted are integers from 0 to {config.vocab_size - 1}, the vocabulary"
                )
    if not _is_int(shared) or not 0 <= shared < min(map(len, prompts)):
        raise InputError(
            f"shared is {shared!r}; accepted is an integer of 0 or more, less than the shortest prompt's "
            f"{min(map(len, prompts))} tokens"
        )
    beginning = list(prompts[0][:shared])
    for number, prompt in enumerate(prompts):
        if list(prompt[:shared]) != beginning:
            raise InputError(f"shared is {shared}; accepted are fewer, prompt {number} begins otherwise than prompt 0")
    prompts = [prompt[shared:] for prompt in prompts]
    longest = max(map(len, prompts))
    shape = (batch_bucket(len(prompts)), min(length_bucket(longest), config.max_position_embeddings - shared))
    tokens = np.full(shape, pad_id or 0, np.int32)
    real = np.zeros(shape, bool)
    real[:, -1] = True  # a row that fills up the batch has one token, so that its attention is defined
    for number, prompt in enumerate(prompts):
        tokens[number, -len(prompt) :] = prompt
        real[number, -len(prompt) :] = True
    wanted = np.arange(shape[0]) < len(prompts)
    return _Batch(np.array(beginning, np.int32), tokens, real, wanted, np.array(sorted(set(eos_ids)), np.int32))


def _unpadded(tokens: Array, lengths: Array, count: int) -> list[list[int]]:
    rows = zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist(), strict=True)
    return [row[:length] for row, length in rows][:count]


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
