"""Records of a run: set apart, made tokens and planned in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rora_theory.data import texts
from rora_theory.data.batches import Batches, Examples, TextEncoder, choose_widths, split, tokenize
from rora_theory.data.chat import ChatTemplate
from rora_theory.data.formats import AnyRecord
from rora_theory.data.records import RecordSet
from rora_theory.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
      train: batches of all epochs.
      validation: batches of the held-out records, once; None where there are none.
      summary: what became of the records: how many were read, trained on, held out, cut or skipped.
    """

    train: Batches
    validation: Batches | None
    summary: dict[str, Any]


def prepare(
    records: RecordSet | Sequence[AnyRecord],
    tokenizer: TextEncoder,
    config: FinetuneConfig,
    chat: ChatTemplate | None = None,
) -> TrainingData:
    """Hold records out, then tokenize and plan both parts.

    Args:
      records: all of them. A `RecordSet` knows its formats' template, which counts where the configuration names none;
        of a list it is that of the records' kind.
      tokenizer: the model's.
      config: of the run.
      chat: of the template ``chat``; None is the record set's, or the tokenizer's own.

    Raises:
      InputError: no more records than are held out, none that is left after tokenizing, or records of kinds
        with different templates where none is named.
    """
    template: str | None = config.template
    if isinstance(records, RecordSet):
        template = records.template(template)
        chat = records.chat(tokenizer, template) if chat is None else chat
        records = records.records
    template = template or texts.default_template(records)
    answer_only = config.loss_on == "answer"
    train, held_out = (
        tokenize(part, tokenizer, cutoff=config.cutoff, template=template, answer_only=answer_only, chat=chat)
        if part
        else None
        for part in split(records, config.held_out, config.seed)
    )
    assert train is not None
    found = [examples for examples in (train, held_out) if examples is not None]
    widths = choose_widths(np.concatenate([examples.sizes for examples in found]), config.widths)

    def batches(examples: Examples, **order: int) -> Batches:
        return Batches(examples, widths, batch_size=config.batch_size, answer_only=answer_only, **order)

    trained = batches(train, epochs=config.epochs, seed=config.seed)
    summary = {
        "records": len(records),
        "trained_on": len(train),
        "validated_on": 0 if held_out is None else len(held_out),
        "truncated": sum(examples.truncated for examples in found),
        "skipped": sum(examples.skipped for examples in found),
        "steps_per_epoch": trained.steps_per_epoch,
        "widths": widths,
        "padding": trained.padding,
    }
    return TrainingData(trained, None if held_out is None else batches(held_out), summary)
