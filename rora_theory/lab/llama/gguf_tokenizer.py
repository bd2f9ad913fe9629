r"""Tokenizer of a GGUF file, built from the vocabulary in the file's metadata.

transformers reads GGUF tokenizers too, but only with PyTorch installed, and differently from the checkpoints: version
5.24 cuts SmolLM2's and LLaMA 3's texts with other expressions than their own `tokenizer.json`. Every other tokenizer is
loaded by transformers, see `tokenizer`.

Two kinds of vocabulary cover the supported architectures:

* *sentencepiece* (LLaMA 1 and 2, Gemma): a space is written ``▁``, one more is put before the text, and characters
  outside the vocabulary become their UTF-8 bytes. Sentencepiece merges the neighbours whose union has the best score.
  As a list of merges, that is every way to cut a piece in two, best score first.
* *byte-level* (LLaMA 3, SmolLM2, Qwen): the text is cut by a regular expression, the parts are spelled in 256 printable
  characters, one for each byte, and merged by a list. A GGUF file names the expression (``tokenizer.ggml.pre``) and
  does not contain it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rora_theory import extras
from rora_theory.errors import InputError
from rora_theory.lab.llama.gguf_file import read_metadata

try:
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
except ImportError as error:
    AddedToken = Regex = Tokenizer = decoders = models = normalizers = pre_tokenizers = extras.missing(error)  # type: ignore[misc]
    GGUFReader = extras.missing(error)  # type: ignore[misc]

SPACE = "▁"

# Types of a piece, the numbers of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Piece(NamedTuple):
    """Entry of a vocabulary; its id is its position.

    Attributes:
      text: Text of the piece, as the vocabulary spells it.
      score: Sentencepiece's score; pieces with higher scores are merged first.
      kind: Type of the piece, such as `NORMAL` or `CONTROL`.
    """

    text: str
    score: float = 0.0
    kind: int = NORMAL


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


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one

PRE_TOKENIZERS = {
    # SmolLM2's tokenizer.json isolates single digits before it applies GPT-2's expression, so that a run of spaces
    # before a digit stays whole.
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((_QWEN2,), applies_nfc=True),
    "gpt-2": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""Pre-tokenizers by GGUF's names (``tokenizer.ggml.pre``), as llama.cpp defines them."""


def build_tokenizer(reader: GGUFReader, where: str) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer in a file's metadata.

    Returns:
      The object of the `tokenizers` library, and the arguments with which `transformers.PreTrainedTokenizerFast` wraps
      it: the special tokens, whether they are put before and after a text, and the chat template.

    Raises:
      InputError: The vocabulary is malformed or is neither ``llama`` nor ``gpt2``; or its pre-tokenizer is missing or
        unknown.
    """

    def read(key: str, kind: Any, default: Any = None) -> Any:
        return read_metadata(reader, where, f"tokenizer.ggml.{key}", kind, default)

    # Build the tokenizer: sentencepiece for llama, byte-level BPE for gpt2.
    model_type, split = read("model", str), read("pre", str)
    is_sentencepiece = model_type == "llama"
    merges, add_dummy_prefix = read("merges", list[str], []), read("add_space_prefix", bool, True)
    unk_id = read("unknown_token_id", int)
    pieces = _read_pieces(
        where, read("tokens", list[str], []), read("scores", list[float]), read("token_type", list[int]), unk_id
    )
    try:
        if is_sentencepiece:
            backend = sentencepiece_tokenizer(pieces, add_dummy_prefix=add_dummy_prefix)
        elif model_type == "gpt2":
            backend = byte_level_tokenizer(pieces, merges, split)
        else:
            raise InputError(f"tokenizer.ggml.model must be 'llama' or 'gpt2', got {model_type!r}")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None

    # Special tokens, with the format's defaults for files that do not name them.
    ids = {
        "bos_token": read("bos_token_id", int, 1 if is_sentencepiece else None),
        "eos_token": read("eos_token_id", int, 2 if is_sentencepiece else None),
        "pad_token": read("padding_token_id", int),
        "unk_token": unk_id,
    }
    tokens = {name: pieces[number].text for name, number in ids.items() if number is not None and number < len(pieces)}
    adds_bos = read("add_bos_token", bool, is_sentencepiece or PRE_TOKENIZERS[split].adds_bos)
    settings = {
        "add_bos_token": adds_bos and "bos_token" in tokens,
        "add_eos_token": read("add_eos_token", bool, False) and "eos_token" in tokens,
        "chat_template": read_metadata(reader, where, "tokenizer.chat_template", str, None),
    }
    return backend, tokens | settings


def _read_pieces(
    where: str, tokens: list[str], scores: list[float] | None, types: list[int] | None, unk_id: int | None
) -> tuple[Piece, ...]:
    # A file without types or scores has normal pieces of equal score.
    types, scores = types or [NORMAL] * len(tokens), scores or [0.0] * len(tokens)
    if not len(tokens) == len(types) == len(scores) > 0:
        raise InputError(
            f"{where}: tokens, types and scores must be equally many and not empty, "
            f"got {len(tokens)} tokens, {len(types)} types and {len(scores)} scores"
        )
    # Gemma's files have the unknown piece as a control piece.
    if UNKNOWN not in types and unk_id is not None and 0 <= unk_id < len(types):
        types[unk_id] = UNKNOWN
    return tuple(map(Piece, tokens, scores, types))


def sentencepiece_tokenizer(pieces: Sequence[Piece], *, add_dummy_prefix: bool = True) -> Tokenizer:
    """Build the `tokenizers` object that encodes like sentencepiece.

    If two cuts of one piece compete, sentencepiece merges the leftmost, which a list of merges cannot express. The cut
    with the longer left part comes first, as in the checkpoints' own `tokenizer.json`.

    Raises:
      InputError: A piece occurs twice, or there is no unknown piece.
    """
    vocab = _index_pieces([piece.text for piece in pieces])
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise InputError("the sentencepiece vocabulary has no unknown piece, which LLaMA's and Gemma's have")

    # Merges: every cut of a piece into two pieces, ordered by the piece's score, then by the length of the left part.
    scores = {piece.text: piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
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
        byte_fallback=any(piece.kind == BYTE for piece in pieces),
    )

    # A space before every part of a text between special tokens, and the spelling of spaces; decoding reverses both.
    spelling = normalizers.Replace(" ", SPACE)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_dummy_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spelling])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spelling
    tokenizer.decoder = decoders.Sequence(decoding)

    # Sentencepiece finds user-defined pieces in the normalised text, where a literal U+2581 counts as a space. This is
    # possible here only if the spelling of spaces is the whole normalisation: a prefix would change the pieces too.
    _add_special_tokens(tokenizer, pieces, normalized=not add_dummy_prefix)
    return tokenizer


def byte_level_tokenizer(pieces: Sequence[Piece], merges: Iterable[str], split: str | None) -> Tokenizer:
    """Build the `tokenizers` object of a byte-level vocabulary.

    Args:
      pieces: Vocabulary, spelled in the byte alphabet.
      merges: Pairs ``"left right"`` in the order in which they are merged.
      split: GGUF's name of the expressions that cut text, a key of `PRE_TOKENIZERS`.

    Raises:
      InputError: The split is missing or unknown, a merge is malformed, or a piece occurs twice.
    """
    if split is None:
        raise InputError(
            "metadata lacks tokenizer.ggml.pre, the name of the pre-tokenizer. Convert the file again, or use the "
            "checkpoint's tokenizer.json."
        )
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
      normalized: Whether user-defined pieces are found in the normalised text instead of the original text.
    """
    tokens = [
        AddedToken(piece.text, normalized=normalized and piece.kind == USER_DEFINED, special=piece.kind != USER_DEFINED)
        for piece in pieces
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    # In one call, because each call rebuilds the search for all added tokens.
    tokenizer.add_tokens(tokens)
