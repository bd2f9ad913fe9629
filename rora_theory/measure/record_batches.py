"""Training and held-out batches of records for measurements of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from rora_theory.chat_templates import ChatTemplate
from rora_theory.defaults import MEASURE_BATCH_SIZE, SMALL_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.batches import TextEncoder
from rora_theory.lab.data.formats import AnyRecord, TrainTemplate
from rora_theory.lab.finetune import Batch, Batches, Examples, choose_widths, split_records, tokenize
from rora_theory.lab.finetune.config import LossOn
from rora_theory.measure.unseen import mask_seen
from rora_theory.validation.ranges import AtLeastTwo, Count, check_ranges


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


def make_batch_pair(
    config: PairConfig,
    records: Sequence[AnyRecord],
    tokenizer: TextEncoder,
    *,
    template: str | None = None,
    chat: ChatTemplate | None = None,
    seed: int = 0,
) -> BatchPair:
    """Create a training batch and a batch of other records, each padded to its longest record.

    Args:
      config: Sizes of the batches.
      records: Records to split.
      tokenizer: Tokenizer of the model.
      template: Training prompt, see `tokenize`.
      chat: Chat template, see `tokenize`.
      seed: Seed of the split.

    Returns:
      The two batches and the tokenized records of the training batch.

    Raises:
      InputError: If there are too few records, a record has no target within the cutoff, or `tokenize` refuses an
        argument.
    """
    required = config.batch_size + config.held_out
    if len(records) < required:
        raise InputError(
            f"data must hold at least {required} records (--batch-size and --held-out), got {len(records)} records"
        )
    # No record is in both batches.
    train_records, held_out = split_records(records, config.held_out, seed)
    answer_only = config.loss_on == "answer"

    def make_batch(batch_records: Sequence[AnyRecord]) -> Batches:
        examples = tokenize(
            batch_records, tokenizer, cutoff=config.cutoff, template=template, answer_only=answer_only, chat=chat
        )
        # A record without a target would silently make the batch smaller, so it is an error.
        if len(examples) < len(batch_records):
            raise InputError(
                f"only {len(examples)} of {len(batch_records)} records of a batch have a target within --cutoff "
                f"{config.cutoff}. Raise --cutoff, or use --loss-on all."
            )
        widths = choose_widths(np.asarray(examples.input_lengths), 1)
        return Batches(examples, widths, batch_size=len(examples), answer_only=answer_only)

    train = make_batch(train_records[: config.batch_size])
    return BatchPair(train[0], make_batch(held_out)[0], train.examples)


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
    and response without anything between). The default depends on the data format: train for alpaca, chat for chats
    and prompt-response records, otherwise plain"""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class SeedBatches:
    """Batches of one seed, without a last batch that is not full.

    Attributes:
      train: Training batches.
      held_out: Held-out batch.
      fresh: Whether each step has a new batch.
    """

    train: Batches
    held_out: Batch
    fresh: bool

    def at(self, step: int) -> Batch:
        """Return the training batch of a step.

        Args:
          step: Index of the step, from 0.

        Raises:
          InputError: If there are fewer batches.
        """
        steps, index = self.train.full_steps, step if self.fresh else 0
        if index >= len(steps):
            raise InputError(
                f"step {index} needs {index + 1} fresh batches, got {len(steps)}. Use fewer steps or more records."
            )
        return self.train[steps[index]]


def make_seed_batches(
    config: BatchConfig,
    records: Sequence[AnyRecord],
    tokenizer: TextEncoder,
    *,
    seeds: Sequence[int],
    steps: int,
    chat: ChatTemplate | None = None,
) -> dict[int, SeedBatches]:
    """Create training and held-out batches of one width for every seed.

    No record is in both splits. Held-out tokens that repeat the beginning of a training record (the prompt's opening)
    are masked, because with causal attention their inputs equal those of the training record.

    Args:
      config: Settings of the batches.
      records: Records, split in the same way for all seeds.
      tokenizer: Tokenizer of the model.
      seeds: Seeds of the order of the batches.
      steps: Number of batches that a seed trains on if they are fresh.
      chat: Chat template for the training prompt ``chat``; None uses the tokenizer's own.

    Returns:
      The batches of every seed.

    Raises:
      InputError: If there are too few records, or if no held-out token is left.
    """
    train_records, held_out_records = split_records(list(records), config.held_out, 0)
    train, held_out = (
        tokenize(part_records, tokenizer, cutoff=config.cutoff, template=config.template, chat=chat)
        for part_records in (train_records, held_out_records)
    )
    # Fresh batches use other records in every step; otherwise each step repeats one batch.
    fresh = config.batches == "fresh"
    count, size = (steps if fresh else 1), config.batch_size
    if len(train) < count * size:
        raise InputError(
            f"data must leave at least {count * size} records to train on ({count} batches of --batch-size {size}), "
            f"got {len(train)}"
        )
    if len(held_out) < size:
        raise InputError(f"data must have at least --batch-size {size} held-out records, got {len(held_out)}")
    # One width for all batches, so that the step compiles once.
    widths = choose_widths(np.concatenate([train.input_lengths, held_out.input_lengths]), 1)
    seed_batches = {}
    for seed in seeds:
        train_batches, held_out_batches = (
            Batches(examples, widths, batch_size=size, seed=seed) for examples in (train, held_out)
        )
        # Only a full batch, so that all sizes are over the same number of records.
        batches = SeedBatches(train_batches, held_out_batches[held_out_batches.full_steps[0]], fresh)
        # Mask the held-out tokens that any of the seed's training batches has seen.
        trained = [batches.at(step) for step in range(count)]
        seed_batches[seed] = replace(batches, held_out=mask_seen(batches.held_out, trained))
    return seed_batches
