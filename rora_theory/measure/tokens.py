"""Which tokens of two batches modules are read at: those of the held-out batch tell something of new text only where
it was not trained on.

With causal attention a module's input at a token depends on that token and those before it. Where a held-out record
begins as a trained one does (the beginning token, a prompt's template), its inputs are the trained record's own: they
were seen. And a token with a huge input, an attention sink, has nearly the same input whatever the text, and alone
decides a mean over tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rora_theory.errors import InputError

SINK = 10.0
"""A token is a sink of a module where its input's norm is above so many times the median over the split's tokens."""

NOTHING = -1
"""In rows of tokens: padding, which is the beginning of nothing."""


class Chosen(NamedTuple):
    """The tokens at which a module is read.

    Attributes:
      indices: which of all tokens, ascending.
      counts: how many there are (``all``), were ``seen``, are ``sinks`` besides, and are ``read``.
    """

    indices: Int[np.ndarray, " read"]
    counts: dict[str, int]


def beginnings(rows: Int[np.ndarray, "B S"], trained: Sequence[Int[np.ndarray, "_B _S"]]) -> Bool[np.ndarray, "B S"]:
    """Tokens up to which a row is the beginning of a trained row.

    Args:
      rows: token ids.
      trained: token ids, `NOTHING` where there is padding.
    """
    found = np.zeros(rows.shape, bool)
    for other in trained:
        width = min(rows.shape[1], other.shape[1])
        found[:, :width] |= (rows[:, None, :width] == other[None, :, :width]).cumprod(axis=2).any(axis=1)
    return found


def sinks(norms: Float[np.ndarray, " tokens"]) -> Bool[np.ndarray, " tokens"]:
    """Tokens whose input to a module has a norm above `SINK` times the median."""
    return norms > SINK * np.median(norms)


def sample(count: int, seed: int | Sequence[int], masked: Bool[np.ndarray, " all"]) -> Int[np.ndarray, " read"]:
    """At most ``count`` tokens that are not masked, without replacement, the same ones for the same mask and seed."""
    order = np.random.default_rng(seed).permutation(len(masked))
    return np.sort(order[~masked[order]][:count])


def choose_tokens(
    norms: Float[np.ndarray, " tokens"],
    seen: Bool[np.ndarray, " tokens"] | None,
    *,
    count: int,
    seed: int | Sequence[int],
    name: str,
) -> Chosen:
    """The tokens at which a module is read.

    Args:
      norms: of its inputs at all tokens.
      seen: `beginnings` of a held-out batch, whose sinks are then left out too; None leaves out nothing.
      count, seed: see `sample`.
      name: of the module, for the error.

    Raises:
      InputError: none is left.
    """
    huge = np.zeros(len(norms), bool)
    if seen is None:
        seen = huge
    else:
        huge = sinks(norms) & ~seen
    indices = sample(count, seed, seen | huge)
    counts = {"all": len(norms), "seen": int(seen.sum()), "sinks": int(huge.sum()), "read": len(indices)}
    if not len(indices):
        raise InputError(
            f"of {counts['all']} held-out tokens {counts['seen']} begin as the training batch does and "
            f"{counts['sinks']} are sinks of {name}, which leaves none; accepted are held-out records that differ, "
            "or no mask"
        )
    return Chosen(indices, counts)
