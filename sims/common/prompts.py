"""How a command reads records and a model and says what it read, and shows and keeps prompts as they go in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rora_theory import llama
from rora_theory.data import prompt_preview
from rora_theory.data import records as training_records
from rora_theory.data.batches import Examples
from rora_theory.data.formats import TrainTemplate
from rora_theory.data.records import DataConfig, RecordSet
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder
from sims.common import cli, tables

FILE = "prompts.jsonl"
KEPT = 3
"""Prompts that every run keeps."""


@dataclass(frozen=True)
class Inputs:
    """Records, and the model that they go into, whose weights are read when they are asked for.

    Attributes:
      origin, tokenizer, dtype: the model's.
      places: the device that the model is on.
    """

    records: RecordSet
    template: TrainTemplate
    origin: llama.ModelSource
    tokenizer: Any
    dtype: str
    chat: Any
    places: list[Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that reads them is known by."""
        return self.origin.identity() | self.records.identity(self.chat)

    @cached_property
    def model(self) -> llama.Model:
        """The model, and what is to be told of it is told. Raises `InputError` as `llama.load`."""
        loaded = llama.load(self.origin, self.dtype)
        cli.tell(loaded.remarks)
        return loaded

    def texts(self) -> dict[str, Any]:
        """What makes batches of them, see `rora_theory.measure.record_batches`."""
        texts = {"records": self.records.records, "tokenizer": self.tokenizer}
        return texts | {"template": self.template, "chat": self.chat}


def read_inputs(
    data: Sequence[str],
    model: str,
    config: DataConfig | None = None,
    *,
    template: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> Inputs:
    """Read records, then a model but for its weights, and tell what was read. Raises `InputError` as they do."""
    found = training_records.read_record_set(data, config)
    chosen = found.template(template)
    places = devices.pick(1)
    origin = llama.locate(model, revision)
    tokenizer = llama.model_tokenizer(origin)
    tell(found, chosen)
    return Inputs(found, chosen, origin, tokenizer, dtype, found.chat(tokenizer, chosen), places)


def tell(found: RecordSet, template: str | None) -> None:
    """Print how many records there are, how they are written and what makes prompts of them."""
    cli.tell(found.notes)
    tables.print_text(f"{found.summary}; template {template}")


def keep(folder: RunFolder, examples: Examples, tokenizer: Any, *, show: int) -> None:
    """Write the first prompts to `FILE`, and print ``show`` of them."""
    found = prompt_preview.preview_prompts(examples, tokenizer, max(show, KEPT))
    folder.write(FILE, "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in found))
    for number, one in enumerate(found[:show], start=1):
        marks = f"between {prompt_preview.LOSS_BEGIN} and {prompt_preview.LOSS_END}"
        counts = f"{len(one.tokens)} tokens, {sum(one.in_loss)} in the loss, {marks}"
        print(tables.printable(f"prompt {number} of {len(examples)}: {counts}\n{one.text}\n", but="\n\t"))
