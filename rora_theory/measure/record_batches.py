"""Batches of real records for what is measured of a model without training it: one to step on, and one held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from rora_theory.data.batches import TextEncoder
from rora_theory.data.chat import ChatTemplate
from rora_theory.data.formats import AnyRecord, TrainTemplate
from rora_theory.errors import InputError
from rora_theory.finetune import Batch, Batches, Examples, choose_widths, split, tokenize
from rora_theory.finetune.config import LossOn
from rora_theory.measure.unseen import apart_from
from rora_theory.validation.ranges import Count, Plural, check_ranges


@dataclass(frozen=True)
class PairConfig:
    """How many records of what length.

    Raises:
      InputError: a value out of range.
    """

    batch_size: Count = 8
    """records of the batch that gives the gradient"""
    held_out: Count = 8
    """records it is read at"""
    cutoff: Plural = 256
    """longest record in tokens"""
    loss_on: LossOn = "all"
    """tokens in the loss: all (the protocol), or the answer alone"""

    def __post_init__(self) -> None:
        check_ranges(self)


class Pair(NamedTuple):
    """What a step is taken on, what it is read at, and the records of the first as tokens."""

    train: Batch
    held_out: Batch
    examples: Examples


def pair(
    config: PairConfig,
    records: Sequence[AnyRecord],
    tokenizer: TextEncoder,
    *,
    template: str | None = None,
    chat: ChatTemplate | None = None,
    seed: int = 0,
) -> Pair:
    """A training batch and a batch of other records, each padded to its longest.

    Args:
      config: of how many records.
      records: which are split.
      tokenizer, template, chat: see `tokenize`.
      seed: of the split.

    Raises:
      InputError: fewer records than are asked for, or than the cutoff leaves a token to learn of; or as `tokenize`.
    """
    needed = config.batch_size + config.held_out
    if len(records) < needed:
        raise InputError(f"data hold {len(records)} records; accepted are {needed} or more")
    rest, held_out = split(records, config.held_out, seed)
    answer_only = config.loss_on == "answer"

    def one(part: Sequence[AnyRecord]) -> Batches:
        found = tokenize(part, tokenizer, cutoff=config.cutoff, template=template, answer_only=answer_only, chat=chat)
        if len(found) < len(part):
            raise InputError(
                f"{len(found)} of {len(part)} records of a batch have a token to learn within --cutoff "
                f"{config.cutoff}; accepted are all: a larger --cutoff, or --loss-on all"
            )
        widths = choose_widths(np.asarray(found.sizes), 1)
        return Batches(found, widths, batch_size=len(found), answer_only=answer_only)

    train = one(rest[: config.batch_size])
    return Pair(train[0], one(held_out)[0], train.examples)


@dataclass(frozen=True)
class BatchConfig:
    """Which records the steps are taken on and read at.

    Raises:
      InputError: a value out of range.
    """

    batches: Literal["fixed", "fresh"] = "fixed"
    """fixed: every step on one batch; fresh: each on a batch of its own"""
    batch_size: Count = 4
    """records a batch"""
    held_out: Count = 64
    """records set aside, from which each seed's held-out batch is taken"""
    cutoff: Plural = 64
    """most tokens of a record"""
    template: TrainTemplate | None = None
    """training prompt: train (published, to the byte), clean, chat (the model's chat template) or plain (the response
    at once behind the prompt); none is the data format's: train for alpaca, chat for chats and prompt-response, else
    plain"""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class SeedBatches:
    """The batches of one seed; a last one that is not full is left out.

    Attributes:
      train: to step on.
      held_out: to read at.
      fresh: whether each step has a batch of its own.
    """

    train: Batches
    held_out: Batch
    fresh: bool

    def at(self, step: int) -> Batch:
        """The batch of a step, from 0.

        Raises:
          InputError: there are fewer batches.
        """
        steps, index = self.train.full_steps, step if self.fresh else 0
        if index >= len(steps):
            raise InputError(f"step {index} of {len(steps)} fresh batches; accepted are fewer steps or more records")
        return self.train[steps[index]]


def by_seed(
    config: BatchConfig,
    records: Sequence[AnyRecord],
    tokenizer: TextEncoder,
    *,
    seeds: Sequence[int],
    steps: int,
    chat: ChatTemplate | None = None,
) -> dict[int, SeedBatches]:
    """Batches of one width, each seed's own; no record is in both splits.

    Where a held-out record begins as a trained one does (the prompt's opening), its inputs are the trained record's
    own, causal attention seeing nothing else: those tokens are not read.

    Args:
      config: which batches.
      records: which are split in one way for all seeds.
      tokenizer: the model's.
      seeds: of the batches' order.
      steps: how many batches a seed trains on, where they are fresh.
      chat: of the template ``chat``; None is the tokenizer's own.

    Raises:
      InputError: fewer records than all batches have rows, or no held-out token that is apart.
    """
    trained, apart = split(list(records), config.held_out, 0)
    train, held_out = (
        tokenize(part, tokenizer, cutoff=config.cutoff, template=config.template, chat=chat)
        for part in (trained, apart)
    )
    fresh = config.batches == "fresh"
    count, size = (steps if fresh else 1), config.batch_size
    if len(train) < count * size:
        raise InputError(
            f"data leave {len(train)} records to train on; accepted are {count * size} or more, {count} batches of "
            f"--batch-size {size}"
        )
    if len(held_out) < size:
        raise InputError(f"data have {len(held_out)} held-out records; accepted are --batch-size {size} or more")
    widths = choose_widths(np.concatenate([train.sizes, held_out.sizes]), 1)
    found = {}
    for seed in seeds:
        own, read = (Batches(part, widths, batch_size=size, seed=seed) for part in (train, held_out))
        batches = SeedBatches(own, read[read.full_steps[0]], fresh)
        seen = [batches.at(step) for step in range(count)]
        found[seed] = replace(batches, held_out=apart_from(batches.held_out, seen))
    return found
