"""Choice of the tokens at which the inputs of modules are sampled.

With causal attention, a module's input at a token depends only on that token and those before it. Where a held-out
record repeats the beginning of a training record (the first token, a prompt's template), its inputs equal those of the
training record: these tokens were seen, and carry no information about new text. An attention sink, a token with a
huge input, has nearly the same input in any text and dominates a mean over tokens. Both are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rora_theory.errors import InputError

SINK_RATIO = 10.0
"""Ratio of a token's input norm to the median over the split's tokens above which the token is an attention sink."""

PADDING_ID = -1
"""Token id of padding, which differs from every id of a tokenizer."""


class TokenSample(NamedTuple):
    """Tokens at which the inputs of a module are sampled.

    Attributes:
      indices: Indices of the sampled tokens, in ascending order.
      counts: Numbers of tokens: ``all``; ``seen`` in training; ``sinks`` among the others; and ``read``, the sampled.
    """

    indices: Int[np.ndarray, " read"]
    counts: dict[str, int]


def mark_repeats(rows: Int[np.ndarray, "B S"], trained: Sequence[Int[np.ndarray, "_B _S"]]) -> Bool[np.ndarray, "B S"]:
    """Mark the tokens up to which a row is identical to a training row.

    Args:
      rows: Token ids.
      trained: Token ids of training rows, with `PADDING_ID` at padding.

    Returns:
      A mask that is true from the start of each row up to its first difference from every training row.
    """
    repeats = np.zeros(rows.shape, bool)
    for training_rows in trained:
        # Compare every row with every training row; the cumulative product stays 1 until the first difference.
        width = min(rows.shape[1], training_rows.shape[1])
        is_equal = rows[:, None, :width] == training_rows[None, :, :width]
        repeats[:, :width] |= is_equal.cumprod(axis=2).any(axis=1)
    return repeats


def mark_sinks(norms: Float[np.ndarray, " tokens"]) -> Bool[np.ndarray, " tokens"]:
    """Mark the tokens with an input norm above `SINK_RATIO` times the median of the norms that are not 0."""
    nonzero = norms[norms > 0]
    return norms > SINK_RATIO * (np.median(nonzero) if len(nonzero) else 0.0)


def sample_tokens(count: int, seed: int | Sequence[int], masked: Bool[np.ndarray, " all"]) -> Int[np.ndarray, " read"]:
    """Sample at most ``count`` tokens that are not masked, without replacement.

    Args:
      count: Maximum number of tokens.
      seed: Seed of the sample. The same seed and mask give the same tokens.
      masked: Mask of the tokens to leave out.

    Returns:
      The indices of the sampled tokens, in ascending order.
    """
    # The first unmasked tokens of a random order.
    order = np.random.default_rng(seed).permutation(len(masked))
    return np.sort(order[~masked[order]][:count])


def choose_tokens(
    norms: Float[np.ndarray, " tokens"],
    seen: Bool[np.ndarray, " tokens"] | None,
    *,
    count: int,
    seed: int | Sequence[int],
    name: str,
) -> TokenSample:
    """Sample the tokens at which the inputs of a module are used.

    Args:
      norms: Norms of the module's inputs at all tokens.
      seen: Mask of the tokens seen in training, see `mark_repeats`; sinks are then left out too. None leaves out
        neither.
      count: Maximum number of tokens.
      name: Name of the module for the error message.

    Returns:
      The sampled tokens with the numbers of tokens by kind.

    Raises:
      InputError: If no token is left.
    """
    if seen is None:
        is_seen = is_sink = np.zeros(len(norms), bool)
    else:
        # The few tokens with outlying norms would dominate every mean, and so hide the others.
        is_seen, is_sink = seen, mark_sinks(norms) & ~seen
    indices = sample_tokens(count, seed, is_seen | is_sink)
    counts = {"all": len(norms), "seen": int(is_seen.sum()), "sinks": int(is_sink.sum()), "read": len(indices)}
    if not len(indices):
        raise InputError(
            f"{name} has no usable token among {counts['all']} held-out tokens: {counts['seen']} repeat the beginning "
            f"of a training record and {counts['sinks']} are attention sinks. Pass different held-out records, or "
            "switch the mask off."
        )
    return TokenSample(indices, counts)
