"""Training and held-out batches of records for measurements of a model, as tensors of PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rora_theory.defaults import MEASURE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.batches import Examples, split_records
from rora_theory.lab.data.formats import AnyRecord
from rora_theory.lab.finetune.config import LossOn
from rora_theory.validation.ranges import AtLeastTwo, Count, check_ranges
from sims.common.inputs import ModelInputs

Batch = dict[str, Any]
"""Tensors ``input_ids``, ``attention_mask`` and ``labels``."""


@dataclass(frozen=True)
class PairConfig:
    """Sizes of a training batch and a held-out batch.

    Raises:
      InputError: If a value is out of range.
    """

    batch_size: Count = MEASURE_BATCH_SIZE
    """Number of records in the batch that yields the gradient"""
    held_out: Count = MEASURE_BATCH_SIZE
    """Number of held-out records at which the change is measured"""
    cutoff: AtLeastTwo = 256
    """Maximum number of tokens of a record"""
    loss_on: LossOn = "all"
    """Tokens in the loss: all (the paper's protocol), or answer for those of the answer only"""

    def __post_init__(self) -> None:
        check_ranges(self)


class BatchPair(NamedTuple):
    """Training batch and held-out batch.

    Attributes:
      train: Training batch.
      held_out: Batch of other records.
      examples: Tokenized records of the training batch.
    """

    train: Batch
    held_out: Batch
    examples: Examples


def make_batch_pair(config: PairConfig, inputs: ModelInputs, *, seed: int = 0) -> BatchPair:
    """Create a training batch and a batch of other records, each padded to its longest record.

    Args:
      config: Sizes of the batches.
      inputs: Records to split and the model's tokenizer.
      seed: Seed of the split.

    Returns:
      The two batches and the tokenized records of the training batch.

    Raises:
      InputError: If there are too few records, or a record has no target within the cutoff.
    """
    records, required = inputs.records.records, config.batch_size + config.held_out
    if len(records) < required:
        raise InputError(
            f"data must hold at least {required} records (--batch-size and --held-out), got {len(records)} records"
        )
    # No record is in both batches.
    train_records, held_out = split_records(records, config.held_out, seed)
    answer_only = config.loss_on == "answer"

    def encode(batch_records: Sequence[AnyRecord]) -> Examples:
        examples = inputs.encode(batch_records, cutoff=config.cutoff, answer_only=answer_only)
        # A record without a target would silently make the batch smaller, so it is an error.
        if len(examples) < len(batch_records):
            raise InputError(
                f"only {len(examples)} of {len(batch_records)} records of a batch have a target within --cutoff "
                f"{config.cutoff}. Raise --cutoff, or use --loss-on all."
            )
        return examples

    train = encode(train_records[: config.batch_size])
    return BatchPair(make_batch(train), make_batch(encode(held_out)), train)


def make_batch(examples: Examples, indices: Sequence[int] | None = None) -> Batch:
    """Return a batch of examples, padded on the right. Padding and tokens outside the loss have no label.

    Args:
      examples: Tokenized records.
      indices: Indices of the records; None uses all.
    """
    from rora_theory.measure.batches import IGNORED_LABEL, pad_rows

    rows = []
    for index in range(len(examples)) if indices is None else indices:
        ids, is_target = examples[index].tolist(), examples.target_mask(index).tolist()
        rows.append((ids, [token if is_used else IGNORED_LABEL for token, is_used in zip(ids, is_target, strict=True)]))
    return pad_rows(rows, None)
