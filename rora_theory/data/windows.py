"""Plain text in windows of one length, for what reads a model on text: calibration and perplexity."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rora_theory.data.batches import TextEncoder
from rora_theory.data.formats import AnyRecord, Chat, Text
from rora_theory.data.prompts import training_text
from rora_theory.data.records import FormatConfig, read_records
from rora_theory.errors import InputError
from rora_theory.io import files


def read_texts(sources: Sequence[str], config: FormatConfig | None = None) -> list[str]:
    """The documents of several files: .txt files whole, and training records: a prompt and its response as published,
    what the turns of a chat say, an empty line between.

    Args:
      sources: the files.
      config: how records are written; None is told by the first one's keys.

    Raises:
      InputError: a file that is missing, unreadable or empty.
    """
    found: list[str] = []
    for source in sources:
        if not source.endswith(".txt"):
            found += map(_document, read_records([source], config))
            continue
        text = files.read_text(source)
        if not text.strip():
            raise InputError(f"{source}: is empty; accepted is a text file")
        found.append(text)
    return found


def _document(record: AnyRecord) -> str:
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Chat):
        return "\n\n".join(message["content"] for message in record.messages)
    return training_text(record.instruction, record.output, "train", input=record.input)


def cut(
    texts: Sequence[str], tokenizer: TextEncoder, *, seq: int, windows: int, held_out: int, seed: int = 0
) -> tuple[Int[np.ndarray, "windows seq"], Int[np.ndarray, "held_out seq"]]:
    """Windows of ``seq`` tokens, and others held out, chosen at random without overlap.

    Documents follow one another with the end token between them.

    Raises:
      InputError: too little text.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens = [token for ids in tokenizer.encode_batch(list(texts)) for token in (*ids, *end)]
    count, wanted = len(tokens) // seq, windows + held_out
    if count < wanted:
        raise InputError(
            f"text has {len(tokens):,} tokens, {count} windows of {seq}; accepted is enough for {wanted}, "
            "--windows and --held-out together"
        )
    pieces = np.asarray(tokens[: count * seq], np.int32).reshape(count, seq)
    order = np.random.default_rng(seed).permutation(count)[:wanted]
    return pieces[order[:windows]], pieces[order[windows:]]
