r"""Log-likelihoods of every choice of every item, from a forward pass over packed rows and a float32 log-softmax.

The prefix that all items share, such as a prompt's instructions, is processed once, and the rows continue it.

The score of a choice is :math:`\sum_t \log p(y_t \mid \text{context}, y_{<t})`. Only slots that predict a scored token
are projected to the vocabulary. Their hidden states h are projected in chunks, which are reduced at once to
:math:`z(h) = \log\sum_v e^{E_v\cdot h}`. A scored token y adds :math:`E_y\cdot h - z(h)`.
"""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rora_theory.lab.evaluate.choices import EncodedChoice
from rora_theory.lab.evaluate.packing import Block, build_trie, plan_blocks
from rora_theory.lab.llama import shared_prompt
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import Adapter, hidden_states, output_matrix

CPU_SHAPE = (2048, 64)
OTHER_SHAPE = (4096, 512)
"""Maximum number of slots per block, and slots per vocabulary chunk: large enough to use the device fully and to
amortise reading the weights, small enough to stay in its caches."""


def log_likelihoods(
    params: dict,
    config: LlamaConfig,
    items: Sequence[Sequence[EncodedChoice]],
    *,
    adapter: Adapter | None = None,
    batch_size: int = 1,
    done: Collection[int] = (),
    shape: tuple[int, int] | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """Yield each item's index and the log-likelihoods of its choices, a group of blocks at a time.

    The results do not depend on ``batch_size`` and ``done``, bit for bit: the plan and all shapes follow from
    ``items``.

    Args:
      items: Choices of each item, from `choices.encode_choices`.
      batch_size: Number of blocks in flight before waiting for results, at least 1; it hardly affects memory.
      done: Items that need no results. They are not yielded, and blocks with no other items are not computed.
      shape: Slots of a block and of a vocabulary chunk; None chooses by device.
    """
    block_tokens, chunk = shape or (CPU_SHAPE if jax.default_backend() == "cpu" else OTHER_SHAPE)
    skip = set(done)
    # Plan all items, so that the remaining blocks are the same whichever items are done.
    shared, blocks = plan_shared_blocks(items, block_tokens=block_tokens, chunk=chunk)
    blocks = [block for block in blocks if not skip.issuperset(block.items)]
    # The shared prefix becomes cached keys and values that the rows attend to.
    if shared and blocks:
        adapter = shared_prompt.read_prompt(params, items[0][0].tokens[:shared], config, adapter)
    # Dispatch a group of blocks before waiting for any of them.
    for start in range(0, len(blocks), batch_size):
        group = blocks[start : start + batch_size]
        scores = [_score(params, adapter, block, config, chunk) for block in group]
        for block, values in zip(group, jax.device_get(scores), strict=True):
            for item, totals in _choice_totals(block, values, items).items():
                if item not in skip:
                    yield item, totals


def plan_shared_blocks(
    items: Sequence[Sequence[EncodedChoice]], *, block_tokens: int, chunk: int
) -> tuple[int, list[Block]]:
    """Return the number of tokens that all contexts share, and the blocks of the tokens after them.

    Args:
      items: Choices of each item.
      block_tokens: Maximum number of slots per block, see `packing.plan_blocks`.
      chunk: Number of slots per vocabulary chunk, see `packing.plan_blocks`.
    """
    # Exclude the last token of each context, which predicts the first scored token.
    contexts = [choice.tokens[: -choice.count - 1] for choices in items for choice in choices]
    shared = shared_prompt.shared_length(contexts) if items else 0
    return shared, plan_blocks(build_trie(items, shared), block_tokens=block_tokens, chunk=chunk, start=shared)


def _choice_totals(
    block: Block, values: np.ndarray, items: Sequence[Sequence[EncodedChoice]]
) -> dict[int, list[float]]:
    """Sum the log-probabilities of each choice's tokens in float64."""
    totals = {item: [0.0] * len(items[item]) for item in block.items}
    for (item, choice), value in zip(block.owners, values[: len(block.owners)].tolist(), strict=True):
        totals[item][choice] += value
    return totals


def _score(params: dict, adapter: Adapter | None, block: Block, config: LlamaConfig, chunk: int) -> Array:
    return _score_block(
        params,
        adapter,
        block.tokens,
        block.end,
        block.position,
        block.slots,
        # Number of chunks with valid slots, as a dynamic value: the padding after them is not computed.
        np.int32(-(-block.used // chunk)),
        block.entries,
        config=config,
        chunk=chunk,
    )


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def _score_block(
    params: dict,
    adapter: Adapter | None,
    tokens: Int[Array, "r t"],
    end: Int[Array, "r t"],
    position: Int[Array, "r t"],
    slots: Int[Array, " s"],
    chunks: Int[Array, ""],
    entries: Int[Array, "e 2"],
    *,
    config: LlamaConfig,
    chunk: int,
) -> Float[Array, " e"]:
    """Compute the log-probability of each entry's token in float32; padding entries have arbitrary values."""
    hidden = hidden_states(params, tokens, config, adapter, positions=position, visible=visible(end))
    table = output_matrix(params, config)
    # Hidden states of the slots that predict a scored token.
    predicting = hidden.reshape(-1, hidden.shape[-1])[slots].astype(table.dtype)

    def normalise(number: Array, normalisers: Array) -> Array:
        hidden_chunk = jax.lax.dynamic_slice_in_dim(predicting, number * chunk, chunk)
        # With the vocabulary in rows, product and logsumexp are 1.3 times faster on a CPU than with it in columns.
        logits = jnp.einsum("vd,cd->vc", table, hidden_chunk, preferred_element_type=jnp.float32)
        z = jax.nn.logsumexp(logits, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(normalisers, z, number * chunk, 0)

    # Log-normalisers of the used slots, one chunk at a time; only one chunk's logits are held.
    normalisers = jax.lax.fori_loop(0, chunks, normalise, jnp.zeros(slots.shape, jnp.float32))
    slot, token = entries[:, 0], entries[:, 1]
    # Recompute the logits of the scored tokens as dot products: those of the chunks have been dropped.
    logit = jnp.einsum("ed,ed->e", predicting[slot], table[token], preferred_element_type=jnp.float32)
    return logit - normalisers[slot]


def visible(end: Int[Array, "r t"]) -> Bool[Array, "r t t"]:
    """Return whether each query (axis 1) may attend to each key (axis 2), see `packing`."""
    order = jnp.arange(end.shape[1])
    return (order[None, None, :] <= order[None, :, None]) & (order[None, :, None] < end[:, None, :])
