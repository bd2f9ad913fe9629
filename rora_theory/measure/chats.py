"""Collator of chats with labels at the assistant's tokens and the end token of each of its turns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rora_theory.chat_templates import ChatTemplate, mark_tokens
from rora_theory.errors import InputError
from rora_theory.measure.batches import IGNORED_LABEL, pad_rows
from rora_theory.scaling import check_integer


class ChatCollator:
    """Collator that builds batches of chats with labels at the assistant's tokens only.

    Labels are located in the text that the tokenizer's chat template renders. An end token therefore has a label even
    if it is also the padding token. Padding is on the right and has no label.

        collate = ChatCollator(tokenizer, max_length=1024)
        batch = collate([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}])
        Trainer(model, TrainingArguments("out", remove_unused_columns=False), collate, chats)

    Args:
      tokenizer: Fast tokenizer of transformers with a chat template, with or without a padding token.
      max_length: Maximum number of tokens of a chat; longer chats are truncated.

    Raises:
      InputError: If the tokenizer has no chat template or does not return offsets.
    """

    def __init__(self, tokenizer: Any, max_length: int = 1024) -> None:
        check_integer("max_length", max_length, minimum=2)
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"tokenizer must be a fast tokenizer of transformers, got {type(tokenizer).__name__}")
        # A tokenizer may have several templates by name.
        source = tokenizer.chat_template
        if isinstance(source, Mapping):
            source = source.get("default")
        if source is None:
            raise InputError("tokenizer has no chat_template. Load the tokenizer of a chat model.")
        tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._template = ChatTemplate(source, tokens=tokens)
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, chats: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` of a batch of chats.

        Args:
          chats: Objects with ``messages`` and, optionally, ``tools``, in the format of transformers'
            ``apply_chat_template`` and TRL. A message with ``"weight": 0``, as in OpenAI's format, has no labels.

        Raises:
          InputError: If a chat has no messages or the template refuses it, or if no chat has a token of the assistant
            within ``max_length``.
        """
        rows = [self._encode(chat) for chat in chats]
        batch = pad_rows(rows, self._tokenizer.pad_token_id)
        # Labels are shifted by one, so the first token has no prediction.
        if not bool((batch["labels"][:, 1:] != IGNORED_LABEL).any()):
            raise InputError(
                f"none of {len(rows)} chats has a token of the assistant within max_length {self._max_length}. "
                "Raise max_length."
            )
        return batch

    def _encode(self, chat: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        if not isinstance(chat, Mapping) or not chat.get("messages"):
            raise InputError(f"a chat must be an object with messages, got {type(chat).__name__} without")
        text, spans = self._template.render_with_spans(chat["messages"], chat.get("tools") or ())
        # The rendered text already contains the special tokens.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # Trim white space that a template adds after the end token: it belongs to no turn.
        turns = [(begin, begin + len(text[begin:end].rstrip())) for begin, end in spans]
        # Label every token that overlaps a turn.
        ids, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"], int).reshape(-1, 2)
        in_turn = mark_tokens(offsets, turns).tolist()
        labels = [token if learned else IGNORED_LABEL for token, learned in zip(ids, in_turn, strict=True)]
        return ids[: self._max_length], labels[: self._max_length]
