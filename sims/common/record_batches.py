"""Training and held-out batches of records for measurements of a model, as tensors of PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from rora_theory.defaults import MEASURE_BATCH_SIZE, SMALL_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.batches import Examples, split_records
from rora_theory.lab.data.formats import AnyRecord, TrainTemplate
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

    Returns:
      The two batches and the tokenized records of the training batch.

    Raises:
      InputError: If there are too few records, or a record has no target within the cutoff.
    """
    records, required = inputs.records.records, config.batch_size + config.held_out
    if len(records) < required:
        raise InputError(
            f"data must hold at least {required} records (batch_size and held_out), got {len(records)} records"
        )
    # No record is in both batches.
    train_records, held_out = split_records(records, config.held_out, seed)
    answer_only = config.loss_on == "answer"

    def encode(batch_records: Sequence[AnyRecord]) -> Examples:
        examples = inputs.encode(batch_records, cutoff=config.cutoff, answer_only=answer_only)
        # A record without a target would silently make the batch smaller, so it is an error.
        if len(examples) < len(batch_records):
            raise InputError(
                f"only {len(examples)} of {len(batch_records)} records of a batch have a target within cutoff "
                f"{config.cutoff}. Raise cutoff, or set loss_on to all."
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


@dataclass(frozen=True)
class BatchConfig:
    """Settings of the batches of a coordinate check.

    Raises:
      InputError: If a value is out of range.
    """

    batches: Literal["fixed", "fresh"] = "fixed"
    """Batches of the steps: fixed uses the same batch in every step, fresh a new batch in each"""
    batch_size: Count = SMALL_BATCH_SIZE
    """Number of records in a batch"""
    held_out: Count = 64
    """Number of records to set aside, from which each seed draws its held-out batch"""
    cutoff: AtLeastTwo = 64
    """Maximum number of tokens of a record"""
    template: TrainTemplate | None = None
    """Training prompt: train (as published, byte for byte), clean, chat (the model's chat template) or plain (prompt
    and response without anything between). The default depends on the data format: train for alpaca, chat for
    chats, otherwise plain"""

    def __post_init__(self) -> None:
        check_ranges(self)


class SeedBatches(NamedTuple):
    """Batches of one seed.

    Attributes:
      train: Training batches, one for each step or one for all steps.
      held_out: Held-out batch.
      examples: Tokenized records that training batches are drawn from.
    """

    train: list[Batch]
    held_out: Batch
    examples: Examples


def make_seed_batches(
    config: BatchConfig, inputs: ModelInputs, *, seeds: Sequence[int], steps: int
) -> dict[int, SeedBatches]:
    """Create training and held-out batches for every seed. No record is in both splits.

    Args:
      config: Settings of the batches.
      inputs: Records, split in the same way for all seeds, and the model's tokenizer.
      seeds: Seeds of the order of the records.
      steps: Number of batches that a seed trains on if they are fresh.

    Raises:
      InputError: If there are too few records.
    """
    parts = split_records(list(inputs.records.records), config.held_out, 0)
    train, held_out = (inputs.encode(part, cutoff=config.cutoff) for part in parts)
    # Fresh batches use other records in every step; otherwise each step repeats one batch.
    count, size = (steps if config.batches == "fresh" else 1), config.batch_size
    if len(train) < count * size:
        raise InputError(
            f"data must leave at least {count * size} records to train on ({count} batches of batch_size {size}), "
            f"got {len(train)}"
        )
    if len(held_out) < size:
        raise InputError(f"data must have at least batch_size {size} held-out records, got {len(held_out)}")
    seed_batches = {}
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(train))
        chosen = np.random.default_rng([seed, 1]).permutation(len(held_out))[:size]
        batches = [make_batch(train, order[step * size : (step + 1) * size].tolist()) for step in range(count)]
        seed_batches[seed] = SeedBatches(batches, make_batch(held_out, chosen.tolist()), train)
    return seed_batches
