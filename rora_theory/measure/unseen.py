"""Masks of held-out batches that leave out tokens seen in training, see `rora_theory.measure.tokens`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from rora_theory.errors import InputError
from rora_theory.lab.data.batches import Batch
from rora_theory.measure.layers.model_layers import real_tokens
from rora_theory.measure.tokens import PADDING_ID, mark_repeats


def mark_seen(batch: Batch, trained: Sequence[Batch]) -> Bool[np.ndarray, "B S"]:
    """Mark the tokens up to which a row of ``batch`` is identical to a row of a training batch."""
    rows = [np.where(real_tokens(training_batch), training_batch.inputs, PADDING_ID) for training_batch in trained]
    return mark_repeats(np.asarray(batch.inputs), rows)


def check_unseen(batch: Batch, trained: Sequence[Batch]) -> None:
    """Raise `InputError` if every token of ``batch`` repeats the beginning of a training record."""
    real, is_seen = real_tokens(batch), mark_seen(batch, trained)
    if not (real & ~is_seen).any():
        raise InputError(
            f"all {int(real.sum())} held-out tokens repeat the beginning of a training record, so they carry no "
            "information about new text. Pass different records, a larger --cutoff, or --no-mask."
        )


def mask_seen(batch: Batch, trained: Sequence[Batch]) -> Batch:
    """Return a batch with weight 0 at the tokens that repeat the beginning of a training record.

    Args:
      batch: Batch with a target at every position.
      trained: Training batches.

    Raises:
      InputError: If no token is left.
    """
    weights = np.where(mark_seen(batch, trained), np.float32(0), batch.weights)
    if not weights.any():
        raise InputError(
            "every held-out token within --cutoff repeats the beginning of a training record. Raise --cutoff."
        )
    return batch._replace(weights=weights)
