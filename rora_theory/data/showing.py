"""Prompts as a model reads them: token ids decoded, what is in the loss between two marks."""

from typing import Any, NamedTuple

import numpy as np

from rora_theory.data.batches import Examples

BEGIN, END = "⟦", "⟧"
"""What stands around tokens in the loss."""


class Shown(NamedTuple):
    """One prompt.

    Attributes:
      text: its decoded tokens with `BEGIN` and `END` around those in the loss.
      tokens: their ids.
      in_loss: 1 for each that is in the loss, else 0.
    """

    text: str
    tokens: list[int]
    in_loss: list[int]


def prompts(examples: Examples, tokenizer: Any, count: int) -> list[Shown]:
    """The first ``count`` prompts, or all where there are fewer.

    Args:
      examples: tokenized records.
      tokenizer: with ``decode(ids, skip_special=False)``.
      count: how many.
    """
    return [_shown(examples, tokenizer, index) for index in range(min(count, len(examples)))]


def _shown(examples: Examples, tokenizer: Any, index: int) -> Shown:
    tokens, learned = examples[index].tolist(), examples.learned_of(index)
    whole, text, before = tokenizer.decode(tokens, skip_special=False), "", 0
    for at in [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]:
        # Decoded from the start: some tokenizers drop the space that a text begins with.
        after = len(whole) if at == len(tokens) else len(tokenizer.decode(tokens[:at], skip_special=False))
        piece, before = whole[before:after], after
        text += f"{BEGIN}{piece}{END}" if learned[at - 1] else piece
    return Shown(text, tokens, learned.astype(int).tolist())
