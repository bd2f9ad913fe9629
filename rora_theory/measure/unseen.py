"""Batches whose held-out tokens tell something of text that was not trained on, see `rora_theory.measure.tokens`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.measure.layers.model_layers import real_tokens
from rora_theory.measure.tokens import NOTHING, beginnings


def seen(batch: Batch, trained: Sequence[Batch]) -> Bool[np.ndarray, "B S"]:
    """Tokens up to which a row of ``batch`` is the beginning of a trained row."""
    rows = [np.where(real_tokens(part), part.inputs, NOTHING) for part in trained]
    return beginnings(np.asarray(batch.inputs), rows)


def check_unseen(batch: Batch, trained: Sequence[Batch]) -> None:
    """Raise `InputError` where every token of ``batch`` is, so far, the beginning of a trained row."""
    real, known = real_tokens(batch), seen(batch, trained)
    if not (real & ~known).any():
        raise InputError(
            f"all {int(real.sum())} held-out tokens begin as the training batch does, and none tells of other text; "
            "accepted are records that differ, a larger --cutoff, or --no-mask"
        )


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
