"""Preview of a training prompt: the decoded tokens, with marks around the parts in the loss."""

from typing import Any

import numpy as np

from rora_theory.lab.data.batches import Examples

LOSS_BEGIN, LOSS_END = "⟦", "⟧"
"""Marks around tokens in the loss."""


def preview_prompt(examples: Examples, index: int, tokenizer: Any) -> str:
    """Return the text of a prompt with `LOSS_BEGIN` and `LOSS_END` around the parts in the loss."""
    tokens, is_target = examples[index].tolist(), examples.target_mask(index)
    full_text = tokenizer.decode(tokens, skip_special=False)
    # Cut the tokens where the mask changes.
    piece_ends = [*(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(tokens)]
    text, begin = "", 0
    for piece_end in piece_ends:
        # Decode from the start, because some tokenizers drop the space that a text begins with.
        is_last = piece_end == len(tokens)
        end = len(full_text) if is_last else len(tokenizer.decode(tokens[:piece_end], skip_special=False))
        piece = full_text[begin:end]
        text += f"{LOSS_BEGIN}{piece}{LOSS_END}" if is_target[piece_end - 1] else piece
        begin = end
    return text
