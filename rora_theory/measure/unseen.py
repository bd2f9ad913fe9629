"""Which tokens of a held-out batch tell something of text that was not trained on.

With causal attention a module's input at a token depends on that token and those before it. Where a held-out record
begins as a trained one does (the beginning token, a prompt's template), its inputs are the trained record's own: they
were seen. And a token with a huge input, an attention sink, has nearly the same input whatever the text, and alone
decides a mean over tokens.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.measure.model_layers import real_tokens

SINK = 10.0
"""A token is a sink of a module where its input's norm is above so many times the median over the split's tokens."""


def seen(batch: Batch, trained: Sequence[Batch]) -> Bool[np.ndarray, "B S"]:
    """Tokens up to which a row of ``batch`` is the beginning of a trained row."""
    inputs = np.asarray(batch.inputs)
    found = np.zeros(inputs.shape, bool)
    for part in trained:
        rows, width = np.where(real_tokens(part), part.inputs, -1), min(inputs.shape[1], part.inputs.shape[1])
        found[:, :width] |= (inputs[:, None, :width] == rows[None, :, :width]).cumprod(axis=2).any(axis=1)
    return found


def sinks(inputs: Float[np.ndarray, "tokens p_in"]) -> Bool[np.ndarray, " tokens"]:
    """Tokens whose input to a module has a norm above `SINK` times the median."""
    norms = np.linalg.norm(inputs.astype(np.float64), axis=1)
    return norms > SINK * np.median(norms)


def apart_from(batch: Batch, trained: Sequence[Batch]) -> Batch:
    """``batch`` with weight 0 wherever a row is, so far, the beginning of a trained row.

    Args:
      batch: with a target at every position.
      trained: what it is kept apart from.

    Raises:
      InputError: nothing is left.
    """
    weights = np.where(seen(batch, trained), np.float32(0), batch.weights)
    if not weights.any():
        raise InputError("--cutoff leaves no token of a held-out record apart from the trained ones; accepted is more")
    return batch._replace(weights=weights)
