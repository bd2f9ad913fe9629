r"""Tokenizers rebuilt from what is not a `tokenizer.json`: a sentencepiece model, or the metadata of a GGUF
file.

Two families cover the checkpoints of the architectures that are read:

* *sentencepiece* (LLaMA 1 and 2, Gemma): a space is written ``▁``, one more is put before the text, and characters
  that are not in the vocabulary become their UTF-8 bytes. Sentencepiece joins the neighbours whose union has
  the best score; as a list of merges that is every way to cut a piece in two, best score first.
* *byte-level* (LLaMA 3, SmolLM2, Qwen): the text is cut by a regular expression, the pieces are spelled in 256
  printable characters, one a byte, and merged by a list. A GGUF file names the expression
  (``tokenizer.ggml.pre``) instead of holding it.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rora_theory import extras
from rora_theory.errors import InputError

try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
except ImportError as error:
    AddedToken = Regex = Tokenizer = decoders = models = normalizers = pre_tokenizers = extras.missing(error)  # type: ignore[misc]

SPACE = "▁"

# Types of a piece, numbered alike in sentencepiece's format and in GGUF's `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; its id is its position."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePiece:
    """What a sentencepiece BPE model says.

    Attributes:
      pieces: the vocabulary.
      add_dummy_prefix: a space is put before the text.
      remove_extra_whitespaces: runs of spaces become one, those at the ends none.
      charsmap: precompiled normalisation of characters; empty for LLaMA.
      bos_id, eos_id, pad_id: None where the model has none.
    """

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def sentencepiece_tokenizer(model: SentencePiece) -> Tokenizer:
    """The `tokenizers` object that encodes as sentencepiece does.

    Where two cuts of one piece compete at the same time, sentencepiece joins the leftmost and the list of
    merges cannot say so: the cut with the longer left part comes first, as in the checkpoints' own
    `tokenizer.json`.

    Raises:
      InputError: a piece that is there twice, or no unknown piece.
    """
    vocab = _numbered([piece.text for piece in model.pieces])
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise InputError("sentencepiece vocabulary has no unknown piece; accepted is a LLaMA vocabulary")
    scores = {p.text: p.score for p in model.pieces if p.kind in (NORMAL, USER_DEFINED)}
    cuts = [
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    cuts.sort(key=lambda cut: cut[:2])
    tokenizer = _tokenizer(
        vocab=vocab,
        merges=[(left, right) for _, _, left, right in cuts],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in model.pieces),
    )
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, *prefix, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    undo += [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(undo)
    # A literal U+2581 counts as a space in a user-defined run of spaces: such pieces are found in the normalised text.
    # Steps other than the replacement would change the pieces themselves.
    _add_whole_tokens(tokenizer, model.pieces, normalized=not (steps or model.add_dummy_prefix))
    return tokenizer


def parse_sentencepiece(data: bytes) -> SentencePiece:
    """Read a sentencepiece ``tokenizer.model``: protocol buffers, of which four messages and a dozen fields
    matter.

    Raises:
      InputError: bytes that are not such a model, or a model that is not BPE.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                entry = dict(_fields(value))
                (score,) = struct.unpack("<f", entry.get(2, bytes(4)))
                pieces.append(Piece(entry[1].decode(), score, entry.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, struct.error):
        raise InputError(
            "not a sentencepiece model; accepted is a LLaMA 1 or 2 tokenizer.model, or a tokenizer.json"
        ) from None
    kind = trainer.get(3, 1)
    if kind != 2:
        raise InputError(f"sentencepiece model type is {kind}; accepted is 2 (BPE)")
    if not normalizer.get(5, 1):
        raise InputError("sentencepiece model does not escape whitespace; accepted is one that does")

    def token_id(field: int, default: int) -> int | None:
        number = _signed(trainer.get(field, default))
        return number if 0 <= number < len(pieces) else None

    return SentencePiece(
        tuple(pieces),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
        bos_id=token_id(41, 1),
        eos_id=token_id(42, 2),
        pad_id=token_id(43, -1),
    )


def byte_level_tokenizer(pieces: Sequence[Piece], merges: Iterable[str], split: str) -> Tokenizer:
    """The `tokenizers` object of a byte-level vocabulary.

    Args:
      pieces: vocabulary, spelled in the byte alphabet.
      merges: ``"left right"``, first merged first.
      split: the name under which GGUF files know how text is cut, one of `SPLITS`.

    Raises:
      InputError: an unknown split, a malformed merge, or a piece that is there twice.
    """
    if split not in SPLITS:
        raise InputError(f"pre-tokenizer is {split!r}; accepted are {', '.join(SPLITS)}, or a tokenizer.json")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        bad = next(index for index, pair in enumerate(pairs) if len(pair) != 2)
        raise InputError(f"merge {bad} has {len(pairs[bad])} parts; accepted is two, with one space between")
    steps, whole_words = SPLITS[split]
    tokenizer = _tokenizer(vocab=_numbered([piece.text for piece in pieces]), merges=pairs, ignore_merges=whole_words)
    cut = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, pieces)
    return tokenizer


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_CUT = ((_LLAMA3,), True)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one

SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    # SmolLM2's tokenizer.json cuts out single digits before GPT-2's expression sees the text, so that a run
    # of spaces before a digit stays whole.
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "falcon3": _LLAMA3_CUT,
    "qwen2": ((_QWEN2,), False),
    "gpt-2": ((_GPT2,), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
"""GGUF's names of the ways to cut text: expressions applied one after the other, each to the parts the last
one left, and whether a part that is in the vocabulary is taken whole even where no merges lead to it."""


def _tokenizer(**model: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(**model))
    except Exception as error:  # the extension raises plain Exception
        raise InputError(f"vocabulary and merges do not fit together: {error}") from None


def _numbered(texts: Sequence[str]) -> dict[str, int]:
    vocab = {text: number for number, text in enumerate(texts)}
    if len(vocab) != len(texts):
        number = next(number for number, text in enumerate(texts) if vocab[text] != number)
        raise InputError(
            f"vocabulary has {texts[number]!r} as ids {number} and {vocab[texts[number]]}; accepted is once"
        )
    return vocab


def _add_whole_tokens(tokenizer: Tokenizer, pieces: Iterable[Piece], *, normalized: bool = False) -> None:
    """Make control and user-defined pieces be found in the text before it is cut, and control pieces not be decoded.

    Args:
      tokenizer: Tokenizer to change.
      pieces: Vocabulary.
      normalized: Whether user-defined pieces are found in the normalised text rather than in the text itself.
    """
    whole = [
        AddedToken(piece.text, normalized=normalized and piece.kind == USER_DEFINED, special=piece.kind != USER_DEFINED)
        for piece in pieces
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    # In one call: each call rebuilds the search for all added tokens.
    tokenizer.add_tokens(whole)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of one protocol-buffer message: number, and an int (varint) or the raw bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("truncated")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("varint too long")


def _signed(value: int) -> int:
    """A 64-bit two's complement number: how -1 is written."""
    return value - (1 << 64) if value >= 1 << 63 else value
