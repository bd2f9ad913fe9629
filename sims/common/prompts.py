"""Read the records and the model of a command, print a summary of them, and save the first training prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rora_theory.lab import llama
from rora_theory.lab.data import prompt_preview
from rora_theory.lab.data import records as training_records
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.data.formats import TrainTemplate
from rora_theory.lab.data.records import DataConfig, RecordSet
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder
from sims.common import cli, tables

FILE = "prompts.jsonl"
SAVED_PROMPTS = 3
"""Minimum number of prompts that a run folder contains."""


@dataclass(frozen=True)
class Inputs:
    """Records and the model that reads them. The weights are loaded when `model` is first used.

    Attributes:
      records: Records that were read.
      template: Template of the prompts.
      origin: Files of the model.
      tokenizer: Tokenizer of the model.
      dtype: Type of the weights.
      chat: Chat template of the prompts.
      devices: Devices of the run, one for the model.
    """

    records: RecordSet
    template: TrainTemplate
    origin: llama.ModelSource
    tokenizer: Any
    dtype: str
    chat: Any
    devices: list[Any]

    @property
    def identity(self) -> dict[str, Any]:
        """Entries that identify a run on these records and this model."""
        return self.origin.identity() | self.records.identity(self.chat)

    @cached_property
    def model(self) -> llama.Model:
        """Model, loaded on first use; its notes are printed.

        Raises:
          InputError: If the weights cannot be loaded.
        """
        loaded = llama.load(self.origin, self.dtype)
        cli.print_notes(loaded.remarks)
        return loaded

    def texts(self) -> dict[str, Any]:
        """Return the arguments with which `rora_theory.measure.record_batches` makes batches of the records."""
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
    """Read records and a model without its weights, and print a summary.

    Args:
      data: Files of training records.
      model: Name or path of the model.
      config: Format of the records and chat template.
      template: Template of the prompts; by default, the one of the records' format.
      dtype: Type of the weights.
      revision: Branch, tag or commit of a model on the hub.

    Returns:
      The records and the model.

    Raises:
      InputError: If the records or the model cannot be read.
    """
    records = training_records.read_record_set(data, config)
    chosen = records.template(template)
    run_devices = devices.pick(1)  # before any other work of JAX, which would fix the devices
    origin = llama.locate(model, revision)
    tokenizer = llama.model_tokenizer(origin)
    print_summary(records, chosen)
    return Inputs(records, chosen, origin, tokenizer, dtype, records.chat(tokenizer, chosen), run_devices)


def print_summary(records: RecordSet, template: str | None) -> None:
    """Print the number of records, their format and the template of the prompts."""
    cli.print_notes(records.notes)
    tables.print_text(f"{records.summary}; template {template}")


def save_prompts(folder: RunFolder, examples: Examples, tokenizer: Any, *, show: int) -> None:
    """Write the first prompts to `FILE`, and print some of them.

    Args:
      folder: Run folder.
      examples: Tokenized examples.
      tokenizer: Tokenizer of the model.
      show: Number of prompts to print.
    """
    prompts = prompt_preview.preview_prompts(examples, tokenizer, max(show, SAVED_PROMPTS))
    folder.write(FILE, "".join(json.dumps(prompt._asdict(), ensure_ascii=False) + "\n" for prompt in prompts))
    for number, prompt in enumerate(prompts[:show], start=1):
        counts = f"{len(prompt.tokens)} tokens, {sum(prompt.in_loss)} in the loss"
        marks = f"between {prompt_preview.LOSS_BEGIN} and {prompt_preview.LOSS_END}"
        head = f"prompt {number} of {len(examples)}: {counts}, {marks}"
        print(tables.printable(f"{head}\n{prompt.text}\n", keep="\n\t"))
