"""Print a summary of the records of a command, and its first training prompts."""

from typing import Any

from rora_theory.lab.data.batches import Examples
from rora_theory.lab.data.prompt_preview import LOSS_BEGIN, LOSS_END, preview_prompt
from rora_theory.lab.data.records import RecordSet
from sims.common import tables


def print_summary(records: RecordSet, template: str | None) -> None:
    """Print the number of records, their format and the template of the prompts."""
    tables.print_text(f"{records.summary}; template {template}")


def print_prompts(examples: Examples, tokenizer: Any, count: int) -> None:
    """Print the first prompts with the parts in the loss marked."""
    for index in range(min(count, len(examples))):
        counts = f"{len(examples[index])} tokens, {examples.target_mask(index).sum()} in the loss"
        head = f"prompt {index + 1} of {len(examples)}: {counts}, between {LOSS_BEGIN} and {LOSS_END}"
        print(f"{head}\n{preview_prompt(examples, index, tokenizer)}\n")
