"""Training data of a run: the validation split, tokenization and batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rora_theory.chat_templates import ChatTemplate
from rora_theory.lab.data import texts
from rora_theory.lab.data.batches import Batches, Examples, TextEncoder, choose_widths, split_records, tokenize
from rora_theory.lab.data.formats import AnyRecord
from rora_theory.lab.data.records import RecordSet
from rora_theory.lab.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class TrainingData:
    """Training and validation batches of a run.

    Attributes:
      train: Training batches of all epochs.
      validation: Batches of one pass over the held-out records, or None.
      summary: Numbers of records that were read, trained on, held out, truncated and skipped, and details of the
        batches.
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
    """Hold out validation records, then tokenize and batch both parts.

    Args:
      records: Records to train on and to hold out. If the configuration names no template, it is the default of
        the records' kind.
      tokenizer: Tokenizer of the model.
      config: Fine-tuning configuration.
      chat: Chat template for the template ``chat``; None uses the record set's or the tokenizer's.

    Raises:
      InputError: If no record remains after the split or the tokenization, or if the configuration names no template
        and the records have different ones.
    """
    # Template of the prompts: the configuration's, or the default of the records' format.
    template: str | None = config.template
    if isinstance(records, RecordSet):
        template = records.template(template)
        chat = records.chat(tokenizer, template) if chat is None else chat
        records = records.records
    template = template or texts.default_template(records)
    answer_only = config.loss_on == "answer"
    # Split the records, then tokenize both parts.
    train, held_out = (
        tokenize(part, tokenizer, cutoff=config.cutoff, template=template, answer_only=answer_only, chat=chat)
        if part
        else None
        for part in split_records(records, config.held_out, config.seed)
    )
    assert train is not None
    # Both parts share the padded lengths, so that the model is compiled for as few shapes as possible.
    splits = [examples for examples in (train, held_out) if examples is not None]
    widths = choose_widths(np.concatenate([examples.input_lengths for examples in splits]), config.widths)

    def batches(examples: Examples, **order: Any) -> Batches:
        return Batches(examples, widths, batch_size=config.batch_size, answer_only=answer_only, **order)

    train_batches = batches(train, epochs=config.epochs, steps=config.steps, seed=config.seed)
    summary = {
        "records": len(records),
        "trained_on": len(train),
        "validated_on": 0 if held_out is None else len(held_out),
        "truncated": sum(examples.truncated for examples in splits),
        "skipped": sum(examples.skipped for examples in splits),
        "steps_per_epoch": train_batches.steps_per_epoch,
        "widths": widths,
        "padding": train_batches.padding_share,
    }
    return TrainingData(train_batches, None if held_out is None else batches(held_out), summary)
