"""How a command tells what records it read, and shows and keeps prompts as they go into the model."""

import json
import sys
from typing import Any

from rora_theory.data import showing
from rora_theory.data.batches import Examples
from rora_theory.data.records import RecordSet
from rora_theory.runs.folder import RunFolder
from sims.common import cli, tables

FILE = "prompts.jsonl"
KEPT = 3
"""Prompts that every run keeps."""


def tell(found: RecordSet, template: str | None) -> None:
    """Print how many records there are, how they are written and what makes prompts of them."""
    cli.tell(found.notes)
    tables.print_text(f"{found.said}; template {template}")


def keep(folder: RunFolder, examples: Examples, tokenizer: Any, *, show: int) -> None:
    """Write the first prompts to `FILE`, and print ``show`` of them."""
    found = showing.prompts(examples, tokenizer, max(show, KEPT))
    folder.write(FILE, "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in found))
    for number, one in enumerate(found[:show], start=1):
        counts = f"{len(one.tokens)} tokens, {sum(one.in_loss)} in the loss, between {showing.BEGIN} and {showing.END}"
        print(_printable(f"prompt {number} of {len(examples)}: {counts}\n{one.text}\n"))


def _printable(text: str) -> str:
    """A text as a terminal may show it: no control characters but line ends and tabs, and no letter it has not."""
    plain = "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)
