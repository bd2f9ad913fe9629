"""Conversion of text to token ids and back, equal to transformers' tokenizers for LLaMA checkpoints.

A `tokenizer.json` determines everything, the beginning and end of a text included. Checkpoints without one are read by
`rora_theory.lab.llama.vocabulary`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rora_theory import extras
from rora_theory.errors import InputError, first_line
from rora_theory.lab.llama import vocabulary
from rora_theory.lab.llama.gguf_file import END_TOKEN_KEYS, open_gguf, read_metadata
from rora_theory.runs.files import read_bytes, read_object

try:
    import tokenizers
    from gguf import GGUFReader
except ImportError as error:
    tokenizers = GGUFReader = extras.missing(error)  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids that a model needs from it.

    Attributes:
      backend: Object of the `tokenizers` library.
      bos_id: Id of the beginning of a text; None if the checkpoint has none.
      eos_id: Id of the end of a text; None if the checkpoint has none.
      pad_id: Id of the padding; None if the checkpoint has none.
      unk_id: Id of unknown text; None if the checkpoint has none.
      eos_ids: All ids that end a generated text; ``eos_id`` alone unless the checkpoint lists more.
      prefix: Ids that the checkpoint puts before every text.
      suffix: Ids that the checkpoint puts after every text.
      chat_template: Jinja source that formats messages as a text; None if the checkpoint has none.
      source: File or folder of the tokenizer, for error messages.
      embedding_rows: Number of embeddings of the model; None if the model has an embedding for every id.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    chat_template: str | None = None
    source: str = "tokenizer"
    embedding_rows: int | None = None

    @property
    def vocab_size(self) -> int:
        """Largest id plus one. A model's embedding may have more rows, never fewer."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Encode a text as token ids.

        Args:
          text: Text; special tokens spelled out in it, such as ``</s>``, are recognised.
          add_bos: Whether to put ``bos_id`` before the text, and nothing after it; None adds the checkpoint's prefix
            and suffix.

        Raises:
          InputError: ``add_bos`` is True and the checkpoint has no beginning-of-text token; the text contains a token
            that the model has no embedding for; or the tokenizer fails on the text.

        Examples:
          >>> tokenizer.encode("The sky", add_bos=True)  # doctest: +SKIP
          [1, 450, 14744]
        """
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool | None = None) -> list[list[int]]:
        """Encode many texts at once, in parallel; see `encode`."""
        if add_bos and self.bos_id is None:
            raise InputError("add_bos must be False or None, got True; the checkpoint has no beginning-of-text token")
        # An explicit add_bos replaces the tokenizer's own beginning and end.
        prefix, suffix = self.prefix, self.suffix
        if add_bos is not None:
            prefix, suffix = ((self.bos_id,) if add_bos and self.bos_id is not None else ()), ()
        # Special tokens are added here and not by the backend, which would add them by its post-processor.
        with _naming_failure(f"{self.source}: the tokenizer cannot read a text"):
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [[*prefix, *encoding.ids, *suffix] for encoding in encodings]
        self._check_embedded(ids)
        return ids

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "n 2"]]]:
        """Encode texts without prefix and suffix, with the characters that each token covers.

        Args:
          texts: Texts to encode.

        Returns:
          For each text its token ids and their offsets: the index of a token's first character, and the index after its
          last. Tokens that are bytes of one character have that character's offsets.

        Raises:
          InputError: The text contains a token that the model has no embedding for, or the tokenizer fails on it.
        """
        with _naming_failure(f"{self.source}: the tokenizer cannot read a text"):
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        encoded = [(encoding.ids, np.array(encoding.offsets, int).reshape(-1, 2)) for encoding in encodings]
        self._check_embedded([ids for ids, _ in encoded])
        return encoded

    def _check_embedded(self, sequences: list[list[int]]) -> None:
        """Raise `InputError` for a token that the model has no embedding for."""
        if self.embedding_rows is None:
            return
        largest = max(map(max, filter(None, sequences)), default=0)
        if largest >= self.embedding_rows:
            token = self.backend.id_to_token(largest)
            raise InputError(
                f"{self.source}: a text contains the token {token!r} with id {largest}, but the model has "
                f"{self.embedding_rows} embeddings. Use the model's own tokenizer."
            )

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode token ids as a text, by default without special tokens."""
        return self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Load the tokenizer of a folder in Hugging Face layout.

        The tokenizer is ``tokenizer.json``, or a sentencepiece ``tokenizer.model`` if that file is missing. A special
        token comes from the first of these files that names it: ``tokenizer_config.json``, ``special_tokens_map.json``,
        the sentencepiece model, ``generation_config.json`` and ``config.json``. Tokens that were added to the tokenizer
        come from ``tokenizer_config.json``, or from ``added_tokens.json`` in older checkpoints.

        Raises:
          InputError: There is no tokenizer file, or a file cannot be read or contradicts another.
        """
        # Files that may each name special tokens; all but the tokenizer itself are optional.
        folder = Path(folder)
        settings = _read_optional_object(folder / "tokenizer_config.json")
        special_tokens = _read_optional_object(folder / "special_tokens_map.json")
        generation = _read_optional_object(folder / "generation_config.json")
        config = _read_optional_object(folder / "config.json")

        # The tokenizer itself, and the ids that a sentencepiece model names.
        ids: dict[str, int | None] = {}
        adds_bos = False
        if os.path.exists(path := folder / "tokenizer.json"):
            backend = _read_backend(path)
        elif os.path.exists(path := folder / "tokenizer.model"):
            backend, ids = _read_sentencepiece(path, settings)
            adds_bos = True  # LLaMA's default if tokenizer_config.json has no entry
        else:
            raise InputError(f"{folder}: no tokenizer. The folder must contain tokenizer.json or tokenizer.model.")

        # Special tokens: by their texts first, then by the ids in the other files.
        tokens = {
            name: _token_text(settings.get(f"{name}_token")) or _token_text(special_tokens.get(f"{name}_token"))
            for name in ("bos", "eos", "unk", "pad")
        }
        # Further special tokens, which transformers 4 and 5 name differently.
        further_lists = (
            source.get(f"{name}_special_tokens")
            for source in (settings, special_tokens)
            for name in ("extra", "additional")
        )
        further = next((entry for entry in further_lists if isinstance(entry, list)), [])
        special_texts = [*tokens.values(), *map(_token_text, further)]
        added, where = settings.get("added_tokens_decoder"), f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
        if added is None:
            # Older checkpoints list the added tokens in a file of their own.
            where = str(folder / "added_tokens.json")
            added = {
                str(number): {"content": token, "special": token in special_texts}
                for token, number in _read_optional_object(Path(where)).items()
            }
        _add_missing_tokens(backend, added, special_texts, where)
        for name, token in tokens.items():
            if token is not None:
                ids[name] = backend.token_to_id(token)
            # Ids in other files apply only where no text names the token.
            for source in (generation, config):
                if ids.get(name) is None:
                    ids[name] = next(iter(_valid_ids(source.get(f"{name}_token_id"))), None)
        eos_ids = generation.get("eos_token_id", config.get("eos_token_id"))

        # Prefix and suffix: from the post-processor of tokenizer.json if there is one, otherwise from the settings.
        if backend.post_processor is None:
            prefix = _valid_ids(ids["bos"]) if settings.get("add_bos_token", adds_bos) else ()
            suffix = _valid_ids(ids["eos"]) if settings.get("add_eos_token", False) else ()
        else:
            with _naming_failure(f"{path}: the tokenizer cannot read a text"):
                prefix, suffix = _prefix_and_suffix(backend)
        return cls(
            backend,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            unk_id=ids["unk"],
            eos_ids=_valid_ids(eos_ids) or _valid_ids(ids["eos"]),
            prefix=prefix,
            suffix=suffix,
            chat_template=_chat_template(folder, settings),
            source=str(path),
        )

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFReader, where: str | None = None) -> "Tokenizer":
        """Load the tokenizer in a GGUF file's metadata.

        It agrees with the checkpoint's own `tokenizer.json`. If transformers reads a GGUF file in another way (SmolLM2:
        runs of spaces before a digit; LLaMA 3: words without merges), this function follows the checkpoint.

        Args:
          source: Path of the file, or an open reader.
          where: Name of the file of an open reader, for error messages.

        Raises:
          InputError: The file is not a GGUF file; its vocabulary is malformed or is neither ``llama`` nor ``gpt2``; or
            its pre-tokenizer is missing or unknown.
        """
        where = str(source) if isinstance(source, str | Path) else where or "GGUF file"
        reader = source if isinstance(source, GGUFReader) else open_gguf(Path(source))

        def read(key: str, kind: Any, default: Any = None) -> Any:
            return read_metadata(reader, where, f"tokenizer.ggml.{key}", kind, default)

        # Build the tokenizer: sentencepiece for llama, byte-level BPE for gpt2.
        model_type, split, merges = read("model", str), read("pre", str), read("merges", list[str], [])
        add_space_prefix = read("add_space_prefix", bool, True)
        remove_extra_whitespaces = read("remove_extra_whitespaces", bool, False)
        unk_id = read("unknown_token_id", int)
        pieces = _read_pieces(read, where, unk_id)
        try:
            if model_type == "llama":
                model = vocabulary.SentencePieceModel(
                    pieces, add_dummy_prefix=add_space_prefix, remove_extra_whitespaces=remove_extra_whitespaces
                )
                backend = vocabulary.sentencepiece_tokenizer(model)
            elif model_type == "gpt2":
                if split is None:
                    raise InputError(
                        "metadata lacks tokenizer.ggml.pre, the name of the pre-tokenizer. Convert the file again, or "
                        "use the checkpoint's tokenizer.json."
                    )
                backend = vocabulary.byte_level_tokenizer(pieces, merges, split)
            else:
                raise InputError(f"tokenizer.ggml.model must be 'llama' or 'gpt2', got {model_type!r}")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

        # Special tokens, with the format's defaults for files that do not name them.
        ids = {
            name: number if number is not None and 0 <= number < len(pieces) else None
            for name, number in (
                ("bos", read("bos_token_id", int, 1 if model_type == "llama" else None)),
                ("eos", read("eos_token_id", int, 2 if model_type == "llama" else None)),
                ("pad", read("padding_token_id", int)),
                ("unk", unk_id),
            )
        }
        # Chat models name further ends, such as that of a turn.
        further_eos_ids = [read_metadata(reader, where, name, int, None) for name in END_TOKEN_KEYS[1:]]
        adds_bos = model_type == "llama" or vocabulary.PRE_TOKENIZERS[split].adds_bos
        return cls(
            backend,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            unk_id=ids["unk"],
            eos_ids=tuple(dict.fromkeys(_valid_ids([ids["eos"], *further_eos_ids]))),
            prefix=_valid_ids(ids["bos"]) if read("add_bos_token", bool, adds_bos) else (),
            suffix=_valid_ids(ids["eos"]) if read("add_eos_token", bool, False) else (),
            chat_template=read_metadata(reader, where, "tokenizer.chat_template", str, None),
            source=where,
        )


def _read_optional_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; return an empty one if the file does not exist."""
    return read_object(path) if os.path.exists(path) else {}


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    data = read_bytes(path)
    with _naming_failure(f"{path}: not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(data)
        # Some checkpoints were saved with the settings of a training run.
        backend.no_truncation()
        backend.no_padding()
        # Some damage shows only in use, as a panic on every text. A plain exception may be due to this letter alone.
        with suppress(Exception):
            backend.encode("a")
        backend.decode([0])
    return backend


def _read_sentencepiece(path: Path, settings: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, int | None]]:
    """Read a sentencepiece ``tokenizer.model``, and the ids of its special tokens."""
    data = read_bytes(path)
    try:
        model = vocabulary.parse_sentencepiece(data)
        # The settings may limit the space before a text.
        has_prefix = model.add_dummy_prefix and settings.get("add_prefix_space") is not False
        model = replace(model, add_dummy_prefix=has_prefix, is_legacy=settings.get("legacy") is not False)
        backend = vocabulary.sentencepiece_tokenizer(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return backend, {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}


def _read_pieces(read: Callable[..., Any], where: str, unk_id: int | None) -> tuple[vocabulary.Piece, ...]:
    """Read the vocabulary in a GGUF file's metadata: texts, scores and types.

    Args:
      read: Function ``read(key, type, default)`` that returns the value of ``tokenizer.ggml.KEY``.
      where: Name of the file, for the error.
      unk_id: Id of unknown text.
    """
    # A file without types or scores has normal pieces of equal score.
    tokens = read("tokens", list[str], [])
    types = read("token_type", list[int]) or [vocabulary.NORMAL] * len(tokens)
    scores = read("scores", list[float]) or [0.0] * len(tokens)
    if not len(tokens) == len(types) == len(scores) > 0:
        raise InputError(
            f"{where}: tokens, types and scores must be equally many and not empty, "
            f"got {len(tokens)} tokens, {len(types)} types and {len(scores)} scores"
        )
    # Gemma's files have the unknown piece as a control piece.
    if vocabulary.UNKNOWN not in types and unk_id is not None and 0 <= unk_id < len(types):
        types[unk_id] = vocabulary.UNKNOWN
    return tuple(map(vocabulary.Piece, tokens, scores, types))


@contextmanager
def _naming_failure(message: str) -> Iterator[None]:
    """Turn exceptions of the tokenizers library into an `InputError` that begins with a message.

    The library raises plain Exception. On a Rust panic it raises PanicException, which derives from BaseException and
    cannot be imported, after it has written the panic to standard error.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message}: {first_line(error)}") from None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template in ``chat_template.jinja`` or in ``tokenizer_config.json``: one, or the default of a list."""
    if os.path.exists(path := folder / "chat_template.jinja"):
        return read_bytes(path).decode(errors="replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        templates = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = templates.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """Return the text of a special token, written as a string or an object; None for ``""``, which means no token."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, decoder_entries: Any, special_tokens: Iterable[str | None], where: str
) -> None:
    """Register tokens that the tokenizer's own file does not list, so that they are recognised in texts.

    Args:
      backend: Tokenizer to change.
      decoder_entries: Tokens by their ids, as ``added_tokens_decoder`` has them.
      special_tokens: Texts of the special tokens.
      where: File or entry with the ids, for the error.

    Raises:
      InputError: A token has another id in the tokenizer than in ``decoder_entries``.
    """
    # A token that the backend knows already keeps its id.
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder_entries = decoder_entries if isinstance(decoder_entries, Mapping) else {}
    # The tokenizer numbers new tokens in the order in which they are added, so add them in the order of their ids.
    entries = sorted(
        (int(number), token) for number, token in decoder_entries.items() if re.fullmatch("[0-9]{1,9}", number)
    )
    missing: list[tokenizers.AddedToken] = []
    for _, token in entries:
        if (content := _token_text(token)) is not None and content not in known:
            flags = ("lstrip", "rstrip", "single_word", "special", "normalized")
            values = token if isinstance(token, Mapping) else {}
            missing.append(tokenizers.AddedToken(content, **{flag: bool(values.get(flag)) for flag in flags}))
            known.add(content)
    # Special tokens that only the settings name get the next free ids.
    missing += [
        tokenizers.AddedToken(content, special=True, normalized=False)
        for content in dict.fromkeys(special_tokens)
        if content is not None and content not in known
    ]
    # The ids in the file are those that the model was trained with: the numbering must agree.
    backend.add_tokens(missing)
    for number, token in entries:
        if (content := _token_text(token)) is not None and backend.token_to_id(content) != number:
            raise InputError(
                f"{where} has {content!r} as id {number}, but the tokenizer has it as id {backend.token_to_id(content)}"
            )


def _prefix_and_suffix(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before and after a text."""
    # Encode one letter: the prefix ends at the first token that is not special, the suffix follows the letter's tokens.
    plain = backend.encode("a", add_special_tokens=False)
    processed = backend.encode("a")
    start = processed.special_tokens_mask.index(0) if 0 in processed.special_tokens_mask else 0
    return tuple(processed.ids[:start]), tuple(processed.ids[start + len(plain.ids) :])


def _valid_ids(value: Any) -> tuple[int, ...]:
    """Return the ids in an id, a list of ids, or None; older checkpoints write -1 for none."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(
        token_id
        for token_id in values
        if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0
    )
