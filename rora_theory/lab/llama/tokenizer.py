"""Conversion of text to token ids and back, by the tokenizers of transformers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rora_theory import extras
from rora_theory.errors import InputError, first_line
from rora_theory.lab.llama.gguf_file import END_TOKEN_KEYS, open_gguf, read_metadata
from rora_theory.runs.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokensWithOffsets(NamedTuple):
    """Tokens of a text, and the characters that each covers.

    Attributes:
      ids: Token ids.
      offsets: Index of each token's first character, and index after its last. Tokens that are bytes of one character
        have that character's offsets.
    """

    ids: list[int]
    offsets: Int[np.ndarray, "n 2"]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of transformers, and what generation and training need beyond it.

    Attributes:
      backend: Tokenizer of transformers.
      eos_ids: All ids that end a generated text; the end-of-text token alone unless the checkpoint lists more.
      source: File or folder of the tokenizer, for error messages.
      embedding_rows: Number of embeddings of the model; None if the model has an embedding for every id.
    """

    backend: "PreTrainedTokenizerFast"
    eos_ids: tuple[int, ...] = ()
    source: str = "tokenizer"
    embedding_rows: int | None = None

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a text; None if the checkpoint has none."""
        return self.backend.bos_token_id

    @property
    def eos_id(self) -> int | None:
        """Id of the end of a text; None if the checkpoint has none."""
        return self.backend.eos_token_id

    @property
    def pad_id(self) -> int | None:
        """Id of the padding; None if the checkpoint has none, or no embedding for it."""
        pad_id = self.backend.pad_token_id
        return pad_id if self.embedding_rows is None or pad_id is None or pad_id < self.embedding_rows else None

    @property
    def chat_template(self) -> str | None:
        """Jinja source that formats messages as a text: the default one of several; None if there is none."""
        template = self.backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Encode a text as token ids.

        Args:
          text: Text; special tokens spelled out in it, such as ``</s>``, are recognised.
          add_bos: Whether to put the beginning-of-text token before the text, and nothing after it; None adds what the
            checkpoint puts before and after a text.

        Raises:
          InputError: ``add_bos`` is True and the checkpoint has no beginning-of-text token; the text contains a token
            that the model has no embedding for; or the tokenizer fails on the text.

        Examples:
          >>> tokenizer.encode("The sky", add_bos=True)  # doctest: +SKIP
          [1, 450, 14744]
        """
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(
        self, texts: Sequence[str], add_bos: bool | None = None, *, add_end: bool = True
    ) -> list[list[int]]:
        """Encode many texts at once, in parallel.

        Args:
          add_bos: Beginning of each text, see `encode`.
          add_end: Whether to add what the checkpoint puts after a text, if ``add_bos`` is None. A text that the model
            continues must not end.

        Raises:
          InputError: See `encode`.
        """
        if add_bos and self.bos_id is None:
            raise InputError("add_bos must be False or None, got True; the checkpoint has no beginning-of-text token")
        ids = self._encode(texts, add_special_tokens=add_bos is None)["input_ids"]
        if add_bos is None and not add_end:
            return [text_ids[: len(text_ids) - self._end_length] for text_ids in ids]
        start = [] if self.bos_id is None or not add_bos else [self.bos_id]
        return [[*start, *text_ids] for text_ids in ids]

    @cached_property
    def _end_length(self) -> int:
        """Number of tokens that the checkpoint puts after a text."""
        letter, text = (self.backend("a", add_special_tokens=whole)["input_ids"] for whole in (False, True))
        return next(length for length in range(len(text)) if text[: len(text) - length][-len(letter) :] == letter)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[TokensWithOffsets]:
        """Encode texts without a beginning or end, with the characters that each token covers.

        Raises:
          InputError: A text contains a token that the model has no embedding for, or the tokenizer fails on it.
        """
        encoded = self._encode(texts, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [TokensWithOffsets(ids, np.array(offsets, int).reshape(-1, 2)) for ids, offsets in pairs]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode token ids as a text, by default without special tokens."""
        return self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)

    def _encode(self, texts: Sequence[str], **options: Any) -> Mapping[str, Any]:
        if not texts:
            return {"input_ids": [], "offset_mapping": []}
        try:
            # `verbose` would warn of texts that are longer than the model's context, which are cut later.
            encoded = self.backend(list(texts), return_attention_mask=False, verbose=False, **options)
        except Exception as error:  # the extension raises plain Exception
            raise InputError(f"{self.source}: the tokenizer cannot read a text: {first_line(error)}") from None
        # Tokens that were added to a tokenizer alone, such as one for padding, have no embedding.
        if self.embedding_rows is not None:
            largest = max(map(max, filter(None, encoded["input_ids"])), default=0)
            if largest >= self.embedding_rows:
                token = self.backend.convert_ids_to_tokens(largest)
                raise InputError(
                    f"{self.source}: a text contains the token {token!r} with id {largest}, but the model has "
                    f"{self.embedding_rows} embeddings. Use the model's own tokenizer."
                )
        return encoded

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Load the tokenizer of a folder in Hugging Face layout, with `tokenizer.json` as it is.

        `AutoTokenizer` may build another tokenizer from the vocabulary and the class that a checkpoint names:
        transformers 5.24 cuts digits differently with SmolLM2's ``GPT2Tokenizer`` than the model's own file. It also
        imports PyTorch where that is installed.

        Raises:
          InputError: There is no tokenizer file, or a file cannot be read.
        """
        folder = Path(folder)
        path = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()), None)
        if path is None:
            raise InputError(f"{folder}: no tokenizer. The folder must contain tokenizer.json or tokenizer.model.")
        # LLaMA puts the beginning-of-text token before a text unless its settings say otherwise. transformers has the
        # same default, but does not apply it to a sentencepiece file.
        options = {}
        if path.name == "tokenizer.model" and "add_bos_token" not in _read_optional(folder / "tokenizer_config.json"):
            options["add_bos_token"] = True
        fast_tokenizer = import_fast_tokenizer()
        try:
            backend = fast_tokenizer.from_pretrained(str(folder), local_files_only=True, **options)
        except Exception as error:  # of the extension and of the parsers of every file
            raise InputError(f"{path}: the tokenizer cannot be loaded: {first_line(error)}") from None
        # Generation may end at further tokens.
        for name in ("generation_config.json", "config.json"):
            eos_ids = _read_optional(folder / name).get("eos_token_id")
            if eos_ids is not None:
                break
        else:
            eos_ids = backend.eos_token_id
        return cls(backend, eos_ids=_as_tuple(eos_ids), source=str(path))

    @classmethod
    def from_gguf(cls, path: Path) -> "Tokenizer":
        """Load the tokenizer in a GGUF file's metadata, see `gguf_tokenizer`.

        Raises:
          InputError: The file is not a GGUF file; its vocabulary is malformed or is neither ``llama`` nor ``gpt2``; or
            its pre-tokenizer is missing or unknown.
        """
        from rora_theory.lab.llama.gguf_tokenizer import build_tokenizer

        reader, where = open_gguf(path), str(path)
        tokenizer, settings = build_tokenizer(reader, where)
        backend = import_fast_tokenizer()(tokenizer_object=tokenizer, **settings)
        # Chat models name further ends, such as that of a turn.
        further_ids = [read_metadata(reader, where, name, int, None) for name in END_TOKEN_KEYS[1:]]
        return cls(backend, eos_ids=_as_tuple([backend.eos_token_id, *further_ids]), source=where)


def import_fast_tokenizer() -> Any:
    """Import transformers' class of tokenizers, which needs no PyTorch."""
    return extras.import_extra("transformers").PreTrainedTokenizerFast


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _as_tuple(ids: Any) -> tuple[int, ...]:
    """Return an id, or a list of ids and None, as a tuple of ids; older checkpoints write -1 for none."""
    values = ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(value for value in values if isinstance(value, int) and value >= 0))
