"""Print a summary of the records of a command, and save the first training prompts."""

import json
from typing import Any

from rora_theory.lab.data import prompt_preview
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.data.records import RecordSet
from rora_theory.runs.folder import RunFolder
from sims.common import tables

FILE = "prompts.jsonl"
SAVED_PROMPTS = 3
"""Minimum number of prompts that a run folder contains."""


def print_summary(records: RecordSet, template: str | None) -> None:
    """Print the number of records, their format and the template of the prompts."""
    tables.print_text(f"{records.summary}; template {template}")


def save_prompts(folder: RunFolder, examples: Examples, tokenizer: Any, *, show: int) -> None:
    """Write the first prompts to `FILE`, and print some of them."""
    prompts = prompt_preview.preview_prompts(examples, tokenizer, max(show, SAVED_PROMPTS))
    folder.write(FILE, "".join(json.dumps(prompt._asdict(), ensure_ascii=False) + "\n" for prompt in prompts))
    for number, prompt in enumerate(prompts[:show], start=1):
        counts = f"{len(prompt.tokens)} tokens, {sum(prompt.in_loss)} in the loss"
        marks = f"between {prompt_preview.LOSS_BEGIN} and {prompt_preview.LOSS_END}"
        head = f"prompt {number} of {len(examples)}: {counts}, {marks}"
        print(f"{head}\n{prompt.text}\n")
