"""One batch of real data and another of held-out records, for the experiments that measure a model without training."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rora_theory import digests
from rora_theory.data.batches import TextEncoder
from rora_theory.errors import InputError
from rora_theory.finetune import Batch, Batches, Examples, choose_widths, read_records, split, tokenize
from rora_theory.scaling import check_integer

LossOn = Literal["all", "answer"]


class Pair(NamedTuple):
    """What a step is taken on, and what it is read at."""

    train: Batch
    heldout: Batch


def digest(data: Sequence[str]) -> str:
    """SHA-256 of the records of some files. Raises `InputError` as `read_records`."""
    return digests.of_json(read_records(data))


def batches(
    data: Sequence[str],
    tokenizer: TextEncoder,
    *,
    items: int,
    heldout_items: int,
    cutoff: int = 256,
    loss_on: LossOn = "all",
    seed: int = 0,
) -> Pair:
    """A training batch of ``items`` records and a batch of ``heldout_items`` others, each padded to its longest.

    Prompts are the fine-tuning protocol's (template ``train``).

    Raises:
      InputError: a file or record that can't be read, or fewer records than are asked for.
    """
    for name, value in (("items", items), ("heldout_items", heldout_items)):
        check_integer(name, value)
    records = read_records(data)
    if len(records) < items + heldout_items:
        raise InputError(f"{' '.join(data)}: hold {len(records)} records; accepted are {items + heldout_items} or more")
    rest, heldout = split(records, heldout_items, seed)
    answer_only = loss_on == "answer"

    def one(part: Any) -> Batch:
        found: Examples = tokenize(part, tokenizer, cutoff=cutoff, answer_only=answer_only)
        widths = choose_widths(np.asarray(found.sizes), 1)
        return Batches(found, widths, batch=len(found), answer_only=answer_only)[0]

    return Pair(one(rest[:items]), one(heldout))
