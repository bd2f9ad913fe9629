"""Text to token ids and back, equal to transformers' tokenizers for LLaMA checkpoints.

Where a checkpoint has a `tokenizer.json` that file decides everything, its beginning and end of text
included. The other sources are in `rora_theory.llama.vocabulary`.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rora_theory import extras
from rora_theory.errors import InputError
from rora_theory.io.files import read_bytes, read_object
from rora_theory.llama import vocabulary
from rora_theory.llama.gguf_file import END_TOKENS, open_gguf, read_value

try:
    import tokenizers
    from gguf import GGUFReader
except ImportError as error:
    tokenizers = GGUFReader = extras.missing(error)  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids that a model needs from it.

    Attributes:
      backend: the `tokenizers` object.
      bos_id, eos_id, pad_id, unk_id: None where the checkpoint names none.
      eos_ids: every id that ends a generated text; ``eos_id`` alone unless the checkpoint lists more.
      prefix, suffix: ids that the checkpoint puts before and after every text.
      chat_template: Jinja source that makes a text of messages; None where the checkpoint has none.
      where: the file or folder it was read from, for messages.
      rows: how many embeddings the model has that it is used with; None is enough for every id.
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
    where: str = "tokenizer"
    rows: int | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's embedding may have more rows, never fewer."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
          text: special tokens written out in it, such as ``</s>``, are recognised.
          add_bos: None puts before and after the text what the checkpoint puts there; True puts ``bos_id``
            before it, False nothing.

        Raises:
          InputError: ``add_bos`` is True and the checkpoint has no beginning-of-text token; the text has a token
            that the model has no embedding for; or the tokenizer fails on it.

        Examples:
          >>> tokenizer.encode("The sky", add_bos=True)  # doctest: +SKIP
          [1, 450, 14744]
        """
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool | None = None) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        if add_bos and self.bos_id is None:
            raise InputError("add_bos is True, but the checkpoint names no beginning-of-text token")
        before, after = self.prefix, self.suffix
        if add_bos is not None:
            before, after = ((self.bos_id,) if add_bos and self.bos_id is not None else ()), ()
        with _failing(f"{self.where}: the tokenizer cannot read a text"):
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return self._checked([[*before, *one.ids, *after] for one in encoded])

    def encode_with_letters(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "n 2"]]]:
        """Token ids of texts with nothing before and after them, and the letters that each token stands for: the index
        of its first, and that after its last. Tokens of one letter's bytes stand for that letter each.

        Raises:
          InputError: as `encode`.
        """
        with _failing(f"{self.where}: the tokenizer cannot read a text"):
            encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        ids = self._checked([one.ids for one in encoded])
        return [(own, np.array(one.offsets, int).reshape(-1, 2)) for own, one in zip(ids, encoded, strict=True)]

    def _checked(self, ids: list[list[int]]) -> list[list[int]]:
        """Raise `InputError` for a token that the model has no embedding for."""
        largest = max(map(max, filter(None, ids)), default=0) if self.rows is not None else 0
        if self.rows is not None and largest >= self.rows:
            raise InputError(
                f"{self.where}: the tokenizer makes {self.backend.id_to_token(largest)!r} of a text, id {largest}; the "
                f"model has {self.rows} embeddings: accepted is the model's own tokenizer"
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids, by default without special tokens."""
        return self.backend.decode([int(one) for one in ids], skip_special_tokens=skip_special)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a folder in Hugging Face layout.

        Read are ``tokenizer.json``, or a sentencepiece ``tokenizer.model`` where there is none; and, for the
        special tokens, the first of ``tokenizer_config.json``, ``special_tokens_map.json``, the sentencepiece
        model, ``generation_config.json`` and ``config.json`` that names them.

        Raises:
          InputError: neither tokenizer file is there, or one of the files cannot be read or contradicts
          another.
        """
        folder = Path(folder)
        settings = _read_object(folder / "tokenizer_config.json")
        named = _read_object(folder / "special_tokens_map.json")
        generation = _read_object(folder / "generation_config.json")
        config = _read_object(folder / "config.json")
        ids: dict[str, int | None] = {}
        if os.path.exists(path := folder / "tokenizer.json"):
            backend = _read_backend(path)
            adds_bos = False
        elif os.path.exists(path := folder / "tokenizer.model"):
            try:
                model = vocabulary.parse_sentencepiece(read_bytes(path))
                backend = vocabulary.sentencepiece_tokenizer(model)
            except InputError as error:
                raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
            ids = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}
            adds_bos = True  # LLaMA's habit where tokenizer_config.json does not say
        else:
            raise InputError(f"{folder} has no tokenizer; accepted is tokenizer.json or tokenizer.model")
        tokens = {
            name: _content(settings.get(f"{name}_token")) or _content(named.get(f"{name}_token"))
            for name in ("bos", "eos", "unk", "pad")
        }
        _add_missing(backend, settings.get("added_tokens_decoder"), tokens.values(), folder)
        for name, token in tokens.items():
            if token is not None:
                ids[name] = backend.token_to_id(token)
            for source in (generation, config):
                if ids.get(name) is None:
                    ids[name] = _first(source.get(f"{name}_token_id"))
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        if backend.post_processor is None:
            prefix = _ids(ids["bos"]) if settings.get("add_bos_token", adds_bos) else ()
            suffix = _ids(ids["eos"]) if settings.get("add_eos_token", False) else ()
        else:
            with _failing(f"{path}: the tokenizer cannot read a text"):
                prefix, suffix = _surroundings(backend)
        return cls(
            backend,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            unk_id=ids["unk"],
            eos_ids=_ids(ends) or _ids(ids["eos"]),
            prefix=prefix,
            suffix=suffix,
            chat_template=_chat_template(folder, settings),
            where=str(path),
        )

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFReader, where: str | None = None) -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata, given its path, or an open reader and the path for messages.

        Agrees with the checkpoint's own `tokenizer.json`; where transformers' reading of a GGUF file differs
        from that (SmolLM2: runs of spaces before a digit; LLaMA 3: words without merges), this one follows
        the checkpoint.

        Raises:
          InputError: not a GGUF file, a vocabulary that is neither ``llama`` nor ``gpt2``, a way to cut text
            that is missing or unknown, or a malformed vocabulary.
        """
        where = str(source) if isinstance(source, str | Path) else where or "GGUF file"
        reader = source if isinstance(source, GGUFReader) else open_gguf(Path(source))

        def read(key: str, kind: Any, default: Any = None) -> Any:
            return read_value(reader, where, f"tokenizer.ggml.{key}", kind, default)

        kind, split = read("model", str), read("pre", str)
        tokens, merges = read("tokens", list[str], []), read("merges", list[str], [])
        kinds = read("token_type", list[int]) or [vocabulary.NORMAL] * len(tokens)
        scores = read("scores", list[float]) or [0.0] * len(tokens)
        spaces = read("add_space_prefix", bool, True), read("remove_extra_whitespaces", bool, False)
        try:
            if not len(tokens) == len(kinds) == len(scores) > 0:
                raise InputError(f"{len(tokens)} tokens, {len(kinds)} types, {len(scores)} scores; accepted is as many")
            unknown = read("unknown_token_id", int)
            if vocabulary.UNKNOWN not in kinds and unknown is not None and 0 <= unknown < len(kinds):
                kinds[unknown] = vocabulary.UNKNOWN  # Gemma's files have it as a control piece
            pieces = tuple(map(vocabulary.Piece, tokens, scores, kinds))
            if kind == "llama":
                backend = vocabulary.sentencepiece_tokenizer(
                    vocabulary.SentencePiece(pieces, add_dummy_prefix=spaces[0], remove_extra_whitespaces=spaces[1])
                )
            elif kind == "gpt2":
                if split is None:
                    raise InputError(
                        "tokenizer.ggml.pre is missing: the file does not say how text is cut; accepted is a "
                        "file converted again, or the checkpoint's tokenizer.json"
                    )
                backend = vocabulary.byte_level_tokenizer(pieces, merges, split)
            else:
                raise InputError(f"tokenizer.ggml.model is {kind!r}; accepted are 'llama', 'gpt2'")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        ids = {
            name: number if number is not None and 0 <= number < len(pieces) else None
            for name, number in (
                ("bos", read("bos_token_id", int, 1 if kind == "llama" else None)),
                ("eos", read("eos_token_id", int, 2 if kind == "llama" else None)),
                ("pad", read("padding_token_id", int)),
                ("unk", unknown),
            )
        }
        ends = [read_value(reader, where, name, int, None) for name in END_TOKENS[1:]]
        begins = kind == "llama" or vocabulary.SPLITS[split][1]  # what the format assumes where the file is silent
        return cls(
            backend,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            unk_id=ids["unk"],
            eos_ids=tuple(dict.fromkeys(_ids([ids["eos"], *ends]))),
            prefix=_ids(ids["bos"]) if read("add_bos_token", bool, begins) else (),
            suffix=_ids(ids["eos"]) if read("add_eos_token", bool, False) else (),
            chat_template=read_value(reader, where, "tokenizer.chat_template", str, None),
            where=where,
        )


def _read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no such file."""
    return read_object(path) if os.path.exists(path) else {}


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    data = read_bytes(path)
    with _failing(f"{path}: not a tokenizer.json"), _quiet_panics():
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()  # some checkpoints were saved with a training run's settings
        backend.no_padding()
        with suppress(Exception):  # a vocabulary without the letter; what panics now would panic on every text
            backend.encode("a")
        backend.decode([0])
    return backend


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """What the tokenizers library raises, as one line: plain Exception, and where it panics an exception of its own
    that is not even one."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, InputError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{what}: {lines[0]}") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Keep a panic's many lines off standard error, where the library writes them by itself; all else is passed on."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing to keep clean
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            if not panicked and (text := caught.read()):
                os.write(2, text)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template in a file of its own, or in ``tokenizer_config.json``: one, or a list with one named default."""
    if os.path.exists(path := folder / "chat_template.jinja"):
        return read_bytes(path).decode(errors="replace")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    """A special token's text, written plainly or as an object; None for none, which some files write
    ``""``."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _add_missing(backend: tokenizers.Tokenizer, listed: Any, named: Iterable[str | None], folder: Path) -> None:
    """Make every token of ``added_tokens_decoder`` and every named special token one that is found in
    texts."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = listed if isinstance(listed, Mapping) else {}
    entries = sorted((int(number), token) for number, token in listed.items() if re.fullmatch("[0-9]{1,9}", number))
    missing: list[tokenizers.AddedToken] = []
    for _, token in entries:
        if (content := _content(token)) is not None and content not in known:
            flags = ("lstrip", "rstrip", "single_word", "special", "normalized")
            given = token if isinstance(token, Mapping) else {}
            missing.append(tokenizers.AddedToken(content, **{flag: bool(given.get(flag)) for flag in flags}))
            known.add(content)
    missing += [
        tokenizers.AddedToken(content, special=True, normalized=False)
        for content in dict.fromkeys(named)
        if content is not None and content not in known
    ]
    backend.add_tokens(missing)
    for number, token in entries:
        if (content := _content(token)) is not None and backend.token_to_id(content) != number:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has {content!r} as id {number}; "
                f"the tokenizer has it as id {backend.token_to_id(content)}"
            )


def _surroundings(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False)
    whole = backend.encode("a")
    at = whole.special_tokens_mask.index(0) if 0 in whole.special_tokens_mask else 0
    return tuple(whole.ids[:at]), tuple(whole.ids[at + len(plain.ids) :])


def _first(number: Any) -> int | None:
    return next(iter(_ids(number)), None)


def _ids(numbers: Any) -> tuple[int, ...]:
    """The integers in an id, a list of ids, or None; below 0 is older checkpoints' way to say none."""
    listed = numbers if isinstance(numbers, list | tuple) else (numbers,)
    return tuple(one for one in listed if isinstance(one, int) and not isinstance(one, bool) and one >= 0)
