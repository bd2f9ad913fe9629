"""Cut plain text into windows of equal length, for calibration and perplexity."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rora_theory.errors import InputError
from rora_theory.lab.data.batches import TextEncoder
from rora_theory.lab.data.formats import AnyRecord, Chat, Text
from rora_theory.lab.data.prompts import prompt
from rora_theory.lab.data.records import FormatConfig, check_named_once, read_record_set
from rora_theory.runs import files


def read_texts(sources: Sequence[str], config: FormatConfig | None = None) -> list[str]:
    """Read documents from text files and training records.

    A .txt file is one document. A training record becomes the published prompt with its response, the contents of a
    chat's turns separated by empty lines, or its text.

    Args:
      sources: Files and splits, see `read_record_set`.
      config: Format of the records; None detects it from the first record's keys.

    Raises:
      InputError: A file is missing, unreadable or empty, or is named twice.
    """
    documents: list[str] = []
    check_named_once("text", sources)
    for source in sources:
        if source.endswith(".txt"):
            text = files.read_text(source)
            if not text.strip():
                raise InputError(f"{source}: is empty. Pass a file with text.")
            documents.append(text)
        else:
            documents += map(_document, read_record_set([source], config).records)
    return documents


def _document(record: AnyRecord) -> str:
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Chat):
        return "\n\n".join(message["content"] for message in record.messages)
    return prompt(record.instruction, "train", input=record.input) + record.output


def sample_windows(
    texts: Sequence[str], tokenizer: TextEncoder, *, seq: int, windows: int | None, held_out: int, seed: int = 0
) -> tuple[Int[np.ndarray, "windows seq"], Int[np.ndarray, "held_out seq"]]:
    """Sample windows of tokens without overlap from concatenated documents.

    Args:
      texts: Documents, which are joined by the end-of-sequence token.
      seq: Number of tokens in a window.
      windows: Number of windows; None takes all that are not held out.
      held_out: Number of held-out windows.

    Raises:
      InputError: The documents have too few tokens.
    """
    # An end token, which some tokenizers put after a text themselves, separates each document from the next.
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = tokenizer.encode_batch(list(texts))
    tokens = [token for ids in encoded for token in (ids if ids[-1:] == end else (*ids, *end))]
    available = len(tokens) // seq
    count = max(available - held_out, 1) if windows is None else windows
    if available < (required := count + held_out):
        raise InputError(
            f"text must have at least {required} windows of {seq} tokens (windows and held_out together), got "
            f"{available} ({len(tokens):,} tokens)"
        )
    # Cut the tokens into windows and draw the required number of them.
    candidates = np.asarray(tokens[: available * seq], np.int32).reshape(available, seq)
    order = np.random.default_rng(seed).permutation(available)[:required]
    return candidates[order[:count]], candidates[order[count:]]
