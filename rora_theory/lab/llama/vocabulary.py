r"""Tokenizers rebuilt from a sentencepiece model or from the metadata of a GGUF file, without a `tokenizer.json`.

Two families cover the supported architectures:

* *sentencepiece* (LLaMA 1 and 2, Gemma): a space is written ``▁``, one more is put before the text, and characters
  outside the vocabulary become their UTF-8 bytes. Sentencepiece merges the neighbours whose union has the best score.
  As a list of merges, that is every way to cut a piece in two, best score first.
* *byte-level* (LLaMA 3, SmolLM2, Qwen): the text is cut by a regular expression, the parts are spelled in 256 printable
  characters, one for each byte, and merged by a list. A GGUF file names the expression (``tokenizer.ggml.pre``) and
  does not contain it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rora_theory import extras
from rora_theory.errors import InputError

try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
except ImportError as error:
    AddedToken = Regex = Tokenizer = decoders = models = normalizers = pre_tokenizers = extras.missing(error)  # type: ignore[misc]

SPACE = "▁"

# Types of a piece, with the same numbers in sentencepiece's format and in GGUF's `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Piece:
    """Entry of a vocabulary; its id is its position.

    Attributes:
      text: Text of the piece, as the vocabulary spells it.
      score: Sentencepiece's score; pieces with higher scores are merged first.
      kind: Type of the piece, such as `NORMAL` or `CONTROL`.
    """

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """Content of a sentencepiece BPE model.

    Attributes:
      pieces: Entries of the vocabulary.
      add_dummy_prefix: Whether a space is put before the text.
      is_legacy: Whether that space is put before every part of a text between special tokens too.
      remove_extra_whitespaces: Whether runs of spaces become one space, and those at the ends are removed.
      charsmap: Precompiled normalisation of characters; empty for LLaMA.
      bos_id: Id of the beginning of a text; None if the model has none.
      eos_id: Id of the end of a text; None if the model has none.
      pad_id: Id of the padding; None if the model has none.
    """

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool = True
    is_legacy: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def sentencepiece_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """Build the `tokenizers` object that encodes like sentencepiece.

    If two cuts of one piece compete, sentencepiece merges the leftmost, which a list of merges cannot express. The cut
    with the longer left part comes first, as in the checkpoints' own `tokenizer.json`.

    Raises:
      InputError: A piece occurs twice, or there is no unknown piece.
    """
    vocab = _index_pieces([piece.text for piece in model.pieces])
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise InputError("the sentencepiece vocabulary has no unknown piece, which LLaMA's and Gemma's have")

    # Merges: every cut of a piece into two pieces, ordered by the piece's score, then by the length of the left part.
    scores = {p.text: p.score for p in model.pieces if p.kind in (NORMAL, USER_DEFINED)}
    cuts = [
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    cuts.sort(key=lambda cut: cut[:2])
    tokenizer = _bpe_tokenizer(
        vocab=vocab,
        merges=[(left, right) for _, _, left, right in cuts],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in model.pieces),
    )

    # Normalisation before the merges: characters, runs of spaces, the space before the text, the spelling of spaces.
    cleaning: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        cleaning += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix and model.is_legacy else []
    tokenizer.normalizer = normalizers.Sequence([*cleaning, *prefix, normalizers.Replace(" ", SPACE)])
    # A normalizer does not know whether a part is the first, a pre-tokenizer does.
    if model.add_dummy_prefix and not model.is_legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)

    # Decoding: spaces, bytes of unknown characters, one text, without the space before it.
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    decoding += [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(decoding)

    # Sentencepiece finds user-defined pieces in the normalised text, where a literal U+2581 counts as a space. This is
    # possible here only if the spelling of spaces is the whole normalisation; other steps would change the pieces too.
    _add_special_tokens(tokenizer, model.pieces, normalized=not (cleaning or model.add_dummy_prefix))
    return tokenizer


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parse a sentencepiece ``tokenizer.model``.

    Args:
      data: Content of the file, a protocol buffer.

    Raises:
      InputError: The bytes are not such a model, or the model is not BPE.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InputError("not a sentencepiece model. Use a LLaMA 1 or 2 tokenizer.model, or tokenizer.json.") from None
    # Bytes of another format can parse as a model without pieces.
    if not model.pieces:
        raise InputError("the sentencepiece model has no pieces. Use a LLaMA 1 or 2 tokenizer.model.")
    # Only BPE with escaped spaces can be rebuilt as a `tokenizers` object.
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        model_type = trainer.ModelType.Name(trainer.model_type)
        raise InputError(f"the type of the sentencepiece model must be BPE, got {model_type}")
    if not normalizer.escape_whitespaces:
        raise InputError("escape_whitespaces of the sentencepiece model must be true, got false")

    # sentencepiece writes -1 for a special token that the model lacks.
    def drop_missing(token_id: int) -> int | None:
        return token_id if 0 <= token_id < len(model.pieces) else None

    return SentencePieceModel(
        tuple(Piece(piece.piece, piece.score, piece.type) for piece in model.pieces),
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
        bos_id=drop_missing(trainer.bos_id),
        eos_id=drop_missing(trainer.eos_id),
        pad_id=drop_missing(trainer.pad_id),
    )


def byte_level_tokenizer(pieces: Sequence[Piece], merges: Iterable[str], split: str) -> Tokenizer:
    """Build the `tokenizers` object of a byte-level vocabulary.

    Args:
      pieces: Vocabulary, spelled in the byte alphabet.
      merges: Pairs ``"left right"`` in the order in which they are merged.
      split: GGUF's name of the expressions that cut text, a key of `PRE_TOKENIZERS`.

    Raises:
      InputError: The split is unknown, a merge is malformed, or a piece occurs twice.
    """
    if split not in PRE_TOKENIZERS:
        raise InputError(
            f"pre-tokenizer must be one of {', '.join(PRE_TOKENIZERS)}, got {split!r}. Use the model's tokenizer.json."
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for number, pair in enumerate(pairs):
        if len(pair) != 2:
            raise InputError(f"merge {number} must have two parts with one space between them, got {len(pair)} parts")
    pre_tokenizer = PRE_TOKENIZERS[split]
    vocab = _index_pieces([piece.text for piece in pieces])
    tokenizer = _bpe_tokenizer(vocab=vocab, merges=pairs, ignore_merges=pre_tokenizer.ignores_merges)

    # A text is normalised, cut by the expressions and spelled in the byte alphabet. Decoding reverses the spelling.
    if pre_tokenizer.applies_nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre_tokenizer.expressions]
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Cut first, so that no merge crosses a boundary between words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, pieces)
    return tokenizer


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one


class PreTokenizer(NamedTuple):
    """Steps of a byte-level tokenizer that its vocabulary and merges do not determine.

    Attributes:
      expressions: Regular expressions that cut a text, applied one after the other.
      ignores_merges: Whether a part in the vocabulary becomes one token even if no merges lead to it.
      adds_bos: Whether a text begins with the beginning-of-text token, unless the file states otherwise.
      applies_nfc: Whether a text is brought into Unicode's normal form NFC before it is cut.
    """

    expressions: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    applies_nfc: bool = False


_LLAMA3_PRE_TOKENIZER = PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True)

PRE_TOKENIZERS = {
    # SmolLM2's tokenizer.json isolates single digits before it applies GPT-2's expression, so that a run of spaces
    # before a digit stays whole.
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3_PRE_TOKENIZER,
    "llama3": _LLAMA3_PRE_TOKENIZER,
    "llama-v3": _LLAMA3_PRE_TOKENIZER,
    "falcon3": _LLAMA3_PRE_TOKENIZER,
    "qwen2": PreTokenizer((_QWEN2,), applies_nfc=True),
    "gpt-2": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""Pre-tokenizers by GGUF's names (``tokenizer.ggml.pre``), as llama.cpp defines them."""


def _bpe_tokenizer(**model: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(**model))
    except Exception as error:  # the extension raises plain Exception
        raise InputError(f"vocabulary and merges do not match: {error}") from None


def _index_pieces(texts: Sequence[str]) -> dict[str, int]:
    vocab = {text: number for number, text in enumerate(texts)}
    if len(vocab) != len(texts):
        number = next(number for number, text in enumerate(texts) if vocab[text] != number)
        raise InputError(
            f"vocabulary entries must be unique, got {texts[number]!r} as ids {number} and {vocab[texts[number]]}"
        )
    return vocab


def _add_special_tokens(tokenizer: Tokenizer, pieces: Iterable[Piece], *, normalized: bool = False) -> None:
    """Register the pieces that are recognised in a text before it is cut; decoding omits control pieces.

    Args:
      tokenizer: Tokenizer to change.
      pieces: Entries of the vocabulary.
      normalized: Whether user-defined pieces are found in the normalised text instead of the original text.
    """
    tokens = [
        AddedToken(piece.text, normalized=normalized and piece.kind == USER_DEFINED, special=piece.kind != USER_DEFINED)
        for piece in pieces
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    # In one call, because each call rebuilds the search for all added tokens.
    tokenizer.add_tokens(tokens)
