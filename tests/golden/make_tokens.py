"""Golden token ids: `tokenizers.json` (tiny vocabularies, in full) and `tokens.json` (the real ones, as
digests).

    python tests/golden/make_tokens.py --data COMMONSENSE --smollm2 FILE.gguf [--llama2 FILE.gguf --llama3
    FILE.gguf]
    python tests/golden/make_tokens.py --data COMMONSENSE --gemma3 FILE.gguf

Needs transformers, sentencepiece, protobuf and llama-cpp-python. The ids are the reference's own:
sentencepiece for LLaMA 2, transformers on the checkpoint's `tokenizer.json` for LLaMA 3 and SmolLM2. Each is
asserted equal to llama.cpp, which has its own code for all of them; so a golden file is written only where
independent routes agree. Gemma 3's ids are sentencepiece's, asserted equal to transformers' reading of the GGUF file;
`--gemma3` adds them to the digests that are there, and needs no llama-cpp-python.

transformers is asked for `PreTrainedTokenizerFast`, which keeps a `tokenizer.json` as it is. Its
`GPT2Tokenizer` (the class named by SmolLM2's configuration) and its reading of GGUF files cut text with
GPT-2's expression alone in version 5.24 and differ on 120 of the texts below; its `LlamaTokenizer` differs on
texts that begin with a space.
"""

import argparse
import base64
import hashlib
import io
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
}
TEXTS = [
    "",
    " ",
    "a",
    "Answer1: gravity Answer2: 42\n\nAnswer format: answer1/answer2",
    " begins with a space",
    "   three spaces, then 3   and   45  6789 digits 0.5",
    "ends with spaces   ",
    "line\nline\n\nline\r\n\t tab \n 7\n\n8",
    "it's IT'S we'll WE'LL they've d'accord 'tis",
    "naïve café ½ cup, ² ٣ 漢字かな 한국어 русский",
    "emoji 😀👩‍👩‍👧 and \u200b zero width",
    "____ ---- ==== !!?? <>|~^+$ #hash @at (x)[y]{z}",
    "▁literal▁ underscore ▁",
    "<0x41> is not a byte, <unk> <s> </s> <|end|> <|begin|> are",
    "x" * 40 + " " * 33 + "\n" * 9,
    "The correct answer is answer1",
]


def corpus(data: Path) -> dict[str, list[str]]:
    """Return every instruction, output and published training prompt, by file."""
    from rora_theory.lab.data import prompts

    texts = {}
    for path in sorted(data.glob("*/t*.json")):
        records = json.loads(path.read_text())
        pairs = [(record["instruction"], record["output"]) for record in records]
        texts[f"{path.parent.name}/{path.name}"] = [
            text for pair in pairs for text in (*pair, prompts.prompt(pair[0], "train") + pair[1])
        ]
    return texts


def digest(ids: list[list[int]]) -> str:
    """Compute the SHA-256 of the lengths and ids of all texts, as little-endian 32-bit integers."""
    flat = np.array([n for text_ids in ids for n in (len(text_ids), *text_ids)], "<i4")
    return hashlib.sha256(flat.tobytes()).hexdigest()


def digests_of(texts: dict[str, list[str]], encode, other) -> dict[str, str]:
    """Return the digest of each file's ids, on which two encoders agree."""
    digests = {}
    for file, lines in texts.items():
        ids = encode(lines)
        assert ids == other(lines), file
        digests[file] = digest(ids)
        print(file, len(lines), digests[file][:12], flush=True)
    return digests


def llama_cpp_ids(path: Path, texts: list[str]) -> list[list[int]]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    model.close()
    return ids


def byte_level(vocab: dict[str, int], merges: list, special: list[str], pre: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a checkpoint as its `tokenizer.json` is built."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(s, normalized=False, special=True) for s in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_model(pieces: list[tuple[str, float, int]], *, add_dummy_prefix: bool = True) -> bytes:
    """Build the `tokenizer.model` of LLaMA 2 or Gemma 3 from its pieces."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in pieces:
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def write_gguf(path: Path, model: str, pre: str, tokens: list[str], kinds: list[int], scores=None, merges=None):
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 8),
        (writer.add_head_count, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, model),
        (writer.add_tokenizer_pre, pre),
        (writer.add_token_list, tokens),
        (writer.add_token_types, kinds),
        (writer.add_token_scores, scores),
        (writer.add_token_merges, merges),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
    ):
        if value is not None:
            add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def tiny_llama2(text: str, work: Path) -> dict:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=out,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    model = out.getvalue()
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [
        (
            reference.id_to_piece(i),
            reference.get_score(i),
            2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1,
        )
        for i in range(reference.get_piece_size())
    ]
    # Special tokens in the text are beyond sentencepiece, which takes them for plain text.
    plain = [text for text in TEXTS if "<s>" not in text]
    ids = reference.encode(plain)
    tokens, scores, kinds = map(list, zip(*pieces, strict=True))
    write_gguf(work / "llama2.gguf", "llama", "default", tokens, kinds, scores)
    assert ids == llama_cpp_ids(work / "llama2.gguf", plain)
    (work / "tokenizer.model").write_bytes(model)
    theirs = LlamaTokenizer.from_pretrained(work)
    for text, text_ids in zip(plain, ids, strict=True):
        if not text.startswith((" ", "▁")):
            assert theirs(text, add_special_tokens=False).input_ids == text_ids, text
    return {
        "model": base64.b64encode(model).decode(),
        "pieces": pieces,
        "texts": plain,
        "ids": ids,
        "decoded": [reference.decode(text_ids) for text_ids in ids],
    }


def tiny_byte_level(text: str, pre: str, work: Path) -> dict:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    special = ["<|unknown|>", "<|begin|>", "<|end|>"]
    backend.train_from_iterator(
        text.splitlines(keepends=True),
        tokenizers.trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(merge) for merge in model["merges"]]
    if pre == "llama-bpe":  # words that no merges lead to: LLaMA 3 takes them whole
        tokens += ["Ġgravity", "Ġanswer"]
        tokens = list(dict.fromkeys(tokens))
    reference = byte_level({t: i for i, t in enumerate(tokens)}, merges, special, pre)
    ids = reference(TEXTS, add_special_tokens=False).input_ids
    kinds = [3 if token in special else 1 for token in tokens]
    joined = [" ".join(merge) for merge in merges]
    write_gguf(work / f"{pre}.gguf", "gpt2", pre, tokens, kinds, merges=joined)
    assert ids == llama_cpp_ids(work / f"{pre}.gguf", TEXTS)
    return {
        "tokens": tokens,
        "kinds": kinds,
        "merges": joined,
        "texts": TEXTS,
        "ids": ids,
        "decoded": [reference.decode(text_ids, skip_special_tokens=True) for text_ids in ids],
    }


def real(path: Path, name: str, texts: dict[str, list[str]]) -> dict[str, str]:
    fields = gguf.GGUFReader(path).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    if name == "llama2":
        scores = fields["tokenizer.ggml.scores"].contents()
        reference = sentencepiece.SentencePieceProcessor(
            model_proto=sentencepiece_model(list(zip(tokens, scores, kinds, strict=True)))
        )
        encode = reference.encode
    else:
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        pre = {"smollm2": "smollm", "llama3": "llama-bpe"}[name]
        reference = byte_level({t: i for i, t in enumerate(tokens)}, merges, special, pre)

        def encode(texts: list[str]) -> list[list[int]]:
            return reference(texts, add_special_tokens=False).input_ids

    return digests_of(texts, encode, lambda lines: llama_cpp_ids(path, lines))


def gemma3(path: Path, texts: dict[str, list[str]]) -> dict[str, str]:
    """Return digests of the ids of Gemma 3's vocabulary, on which sentencepiece and transformers agree."""
    fields = gguf.GGUFReader(path).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    kinds[fields["tokenizer.ggml.unknown_token_id"].contents()] = 2  # the file has it as a control piece
    # llama.cpp's converter writes the spaces of user-defined pieces plainly.
    pieces = [token.replace(" ", "▁") if kind == 4 else token for token, kind in zip(tokens, kinds, strict=True)]
    model = sentencepiece_model(list(zip(pieces, scores, kinds, strict=True)), add_dummy_prefix=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    peer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return digests_of(texts, reference.encode, lambda lines: peer(lines, add_special_tokens=False).input_ids)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    for name in ("smollm2", "llama2", "llama3", "gemma3"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    if args.gemma3 is not None:
        digests = json.loads((HERE / "tokens.json").read_text())
        digests["gemma3"] = gemma3(args.gemma3, corpus(args.data))
        (HERE / "tokens.json").write_text(json.dumps(digests, indent=1) + "\n")
        return
    text = (HERE.parents[1] / "LICENSE").read_text() * 2 + "\n".join(TEXTS)
    with tempfile.TemporaryDirectory() as work:
        tiny = {
            "llama2": tiny_llama2(text, Path(work)),
            **{pre: tiny_byte_level(text, pre, Path(work)) for pre in PRE_TOKENIZERS},
        }
        # llama.cpp's own way to cut text, which no tokenizer.json has: llama.cpp alone is the reference.
        path, gpt2 = Path(work) / "default.gguf", tiny["gpt-2"]
        write_gguf(path, "gpt2", "default", gpt2["tokens"], gpt2["kinds"], merges=gpt2["merges"])
        tiny["default"] = gpt2 | {"ids": llama_cpp_ids(path, TEXTS)}
    (HERE / "tokenizers.json").write_text(json.dumps(tiny, ensure_ascii=False, separators=(",", ":")) + "\n")
    if args.data is not None:
        texts = corpus(args.data)
        digests = {
            name: real(path, name, texts) for name in ("smollm2", "llama2", "llama3") if (path := getattr(args, name))
        }
        (HERE / "tokens.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
