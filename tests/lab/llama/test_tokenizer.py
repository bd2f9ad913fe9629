"""Tokenizers against golden ids of sentencepiece, transformers and llama.cpp
(`tests/golden/make_tokens.py`)."""

import base64
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support import gguf_files
from support.gguf_files import VOCABULARIES
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from rora_theory.errors import InputError
from rora_theory.lab.data import prompts
from rora_theory.lab.llama import gguf_tokenizer, hub
from rora_theory.lab.llama.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
LLAMA = {"model_type": "llama"}
BYTE_LEVEL = ("smollm", "llama-bpe", "gpt-2", "default")
SENTENCEPIECE_MODEL = base64.b64decode(VOCABULARIES["llama2"]["model"])


@pytest.fixture
def write(tmp_path):
    """Return ``write(name, **changes)``: a GGUF file with a golden vocabulary, see `gguf_files.tokenizer_fields`."""
    return lambda name, **changes: gguf_files.write(
        tmp_path / "x.gguf", gguf_files.tokenizer_fields(name, **changes), {}
    )


def sentencepiece_folder(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(SENTENCEPIECE_MODEL)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def json_folder(folder: Path, tokenizer: Tokenizer, **files: dict) -> Path:
    """Write the tokenizer's own file, and other files by their names without suffix."""
    folder.mkdir(exist_ok=True)
    tokenizer.backend.backend_tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_gemmas_pieces_encode_as_sentencepiece(write):
    """No space precedes the text, runs of spaces are pieces, and the unknown piece is a control piece.

    A literal U+2581 is a space to sentencepiece, alone and within a run.
    """
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "   ", "▁", "▁a", "a", "b", "ab"]
    kinds = [gguf_tokenizer.CONTROL] * 4 + [gguf_tokenizer.USER_DEFINED] * 2 + [gguf_tokenizer.NORMAL] * 5
    scores = [-1000.0] * 6 + [-5.0, -1.0, -3.0, -4.0, -2.0]
    pieces = {"tokens": tokens, "token_type": kinds, "scores": scores, "add_space_prefix": False}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3}
    tokenizer = Tokenizer.from_gguf(write("llama2", **pieces, **ids))
    # Reference: sentencepiece 0.2.3 on the same pieces, runs of spaces written in U+2581.
    expected = {"ab a": [10, 7], "a  b": [8, 4, 9], "a ▁b": [8, 4, 9], "   a": [5, 8], " ab": [7, 9], "z": [3]}
    assert {text: tokenizer.encode(text, add_bos=False) for text in expected} == expected
    assert tokenizer.encode("a") == [2, 8]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)
    assert tokenizer.decode([8, 4, 9, 5, 7]) == "a  b    a"


@pytest.mark.parametrize("name", ["llama2", *BYTE_LEVEL])
def test_a_vocabulary_encodes_as_sentencepiece_transformers_and_llama_cpp(name: str, write, tmp_path: Path):
    golden = VOCABULARIES[name]
    tokenizers = [Tokenizer.from_gguf(write(name))]
    tokenizers.append(Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizers[0])))
    if name == "llama2":
        tokenizers.append(Tokenizer.from_folder(sentencepiece_folder(tmp_path / "model")))
    for tokenizer in tokenizers:
        assert tokenizer.encode_batch(golden["texts"], add_bos=False) == golden["ids"]
        assert [tokenizer.decode(ids) for ids in golden["ids"]] == golden["decoded"]
        assert len(tokenizer.backend) == len(golden["pieces" if name == "llama2" else "tokens"])


@functools.cache
def smollm() -> Tokenizer:
    golden = VOCABULARIES["smollm"]
    kinds = zip(golden["tokens"], golden["kinds"], strict=True)
    pieces = [gguf_tokenizer.Piece(token, kind=kind) for token, kind in kinds]
    backend = gguf_tokenizer.byte_level_tokenizer(pieces, golden["merges"], "smollm")
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.slow
@given(st.text())
def test_byte_level_round_trip(text: str):
    assert smollm().decode(smollm().encode(text), skip_special=False) == text


@pytest.mark.parametrize(
    ("config", "prefix", "suffix"),
    [
        (None, (1,), ()),
        ({"add_bos_token": True}, (1,), ()),
        ({"add_bos_token": False}, (), ()),
        ({"add_bos_token": True, "add_eos_token": True}, (1,), (2,)),
    ],
)
def test_beginning_and_end_of_a_sentencepiece_folder(config: dict | None, prefix, suffix, tmp_path: Path):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path, config))
    plain = tokenizer.encode("a", add_bos=False)
    assert tokenizer.encode("a") == [*prefix, *plain, *suffix]
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *plain]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids) == (1, 2, None, (2,))


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"legacy": False}, [263, 616, 2, 327, 599]),
        ({"legacy": True}, [263, 616, 2, 272]),
        ({}, [263, 616, 2, 272]),
    ],
)
def test_a_space_before_the_text_or_every_part(settings: dict, ids: list[int], tmp_path: Path):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path, settings))
    assert tokenizer.encode("ab</s>the", add_bos=False) == ids
    assert tokenizer.decode(tokenizer.encode("the", add_bos=False)) == "the"


def test_qwens_pre_tokenization_equals_transformers(write):
    """With LLaMA 3's tiny vocabulary: digits are single, letters composed, and words formed by merges alone."""
    golden = VOCABULARIES["llama-bpe"]
    # Beside it digits that could be merged, and a word that no merges lead to.
    more = {
        "tokens": [*golden["tokens"], "12", "Ġxyz"],
        "merges": [*golden["merges"], "1 2"],
        "token_type": [*golden["kinds"], 1, 1],
    }
    ours, llama3 = (Tokenizer.from_gguf(write("llama-bpe", pre=pre, **more)) for pre in ("qwen2", "llama-bpe"))
    vocab = {token: i for i, token in enumerate(more["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in more["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=golden["tokens"][0])
    texts = ["three words here", "12345 it's  7\n\n  x", "cafe\u0301 \u00e9", " a1b22\tc", "I'LL   go\r\n", " xyz"]
    for text in texts:
        assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False)["input_ids"], text
    for text in (texts[1], texts[2], texts[5]):
        assert ours.encode(text, add_bos=False) != llama3.encode(text, add_bos=False), text


def test_tokenizer_json_decides_beginning_and_end(write, tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(write("llama-bpe"))
    backend = tokenizer.backend.backend_tokenizer
    template = TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)])
    backend.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=30)
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    read = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer, tokenizer_config=settings))
    ids = read.encode("three words here", add_bos=False)
    assert len(ids) > 3  # neither truncated nor padded
    assert read.encode("three words here") == [1, *ids, 2]


def test_a_class_that_the_settings_name_does_not_change_the_tokenizer(write, tmp_path: Path):
    """The class that SmolLM2's settings name cuts digits in another way than its own file."""
    tokenizer = Tokenizer.from_gguf(write("smollm"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
    read = Tokenizer.from_folder(json_folder(tmp_path, tokenizer, tokenizer_config=settings, config=LLAMA))
    golden = VOCABULARIES["smollm"]
    assert read.encode_batch(golden["texts"], add_bos=False) == golden["ids"]


def test_a_text_ends_generation_at_every_id_that_the_folder_lists(tmp_path: Path):
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    files = {"generation_config": {"eos_token_id": [2, 7, 5]}, "config": LLAMA | {"eos_token_id": 3}}
    for names, eos_ids in ((("generation_config", "config"), (2, 7, 5)), (("config",), (3,)), ((), (2,))):
        chosen = {name: files[name] for name in names}
        folder = json_folder(tmp_path / str(len(names)), smollm(), tokenizer_config=settings, **chosen)
        read = Tokenizer.from_folder(folder)
        assert (read.bos_id, read.eos_id, read.pad_id, read.eos_ids) == (1, 2, None, eos_ids)


def test_chat_template_of_a_folder(tmp_path: Path):
    templates = [{"name": "rag", "template": "x"}, {"name": "default", "template": "t"}]
    for template, expected in (("template", "template"), (templates, "t")):
        folder = json_folder(tmp_path / "json", smollm(), tokenizer_config={"chat_template": template})
        assert Tokenizer.from_folder(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(folder).chat_template == "own file"


@pytest.mark.parametrize(
    ("name", "more", "prefix", "suffix"),
    [
        ("llama2", {}, (1,), ()),
        ("llama2", {"add_bos_token": False, "add_eos_token": True}, (), (2,)),
        ("llama-bpe", {}, (1,), ()),
        ("smollm", {}, (), ()),
        ("smollm", {"add_bos_token": True, "eot_token_id": 5, "eom_token_id": 2}, (1,), ()),
    ],
)
def test_beginning_and_end_of_a_gguf_file(name: str, more: dict, prefix, suffix, write):
    tokenizer = Tokenizer.from_gguf(write(name, **more))
    assert tokenizer.encode("a") == [*prefix, *tokenizer.encode("a", add_bos=False), *suffix]
    assert tokenizer.eos_ids == ((2, 5) if "eot_token_id" in more else (2,))


FOLDER_FAULTS = [
    ({}, "no tokenizer"),
    ({"tokenizer.json": "{"}, "tokenizer.json"),
    ({"tokenizer.json": '{"model": {}}'}, "tokenizer.json"),
    ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "tokenizer"),
    ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "tokenizer.model"),
    ({"tokenizer.model": SENTENCEPIECE_MODEL[: len(SENTENCEPIECE_MODEL) // 2].decode("latin-1")}, "tokenizer.model"),
]
GGUF_FAULTS = [
    ({"pre": "klingon"}, "pre-tokenizer .*'klingon'"),
    ({"pre": None}, "lacks tokenizer.ggml.pre"),
    ({"pre": 7}, "pre .* str, got 7"),
    ({"model": "bert"}, "tokenizer.ggml.model .*'bert'"),
    ({"merges": ["a b c"]}, "merge 0 .* 3"),
    ({"merges": ["qq zz"]}, "vocabulary and merges"),
    ({"merges": [1, 2]}, "merges"),
    ({"token_type": [1]}, "types"),
    ({"token_type": ["1"] * 3, "tokens": ["a", "b", "c"], "merges": []}, "token_type"),
    ({"tokens": [1, 2], "token_type": [1, 1], "merges": []}, r"tokens .* list of str.*\[1, 2\]"),
    ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1], "merges": ["a b"]}, "'a' as ids 0 and 2"),
    ({"model": "llama", "tokens": ["a", "b"], "token_type": [1, 1]}, "unknown piece"),
    ({"model": "llama", "scores": [1, 2]}, "scores .* list of float"),
    ({"model": "llama", "add_space_prefix": "yes"}, "add_space_prefix"),
    ({"bos_token_id": "1"}, "bos_token_id .* int, got '1'"),
    ({"unknown_token_id": True}, "unknown_token_id .* True"),
    ({"eot_token_id": "x" * 500}, "eot_token_id .*'xxx"),
    ({"add_bos_token": 1}, "add_bos_token .* bool, got 1"),
    ({"add_eos_token": "no"}, "add_eos_token"),
    ({"chat_template": 5}, r"tokenizer\.chat_template .* 5"),
]


@pytest.mark.parametrize(
    ("container", "content", "message"),
    [("folder", *fault) for fault in FOLDER_FAULTS] + [("gguf", *fault) for fault in GGUF_FAULTS],
)
def test_a_broken_tokenizer_is_refused(container: str, content: dict, message: str, write, tmp_path: Path):
    if container == "folder":
        path, load = tmp_path, Tokenizer.from_folder
        for name, text in content.items():
            (tmp_path / name).write_bytes(text.encode("latin-1"))
    else:
        path, load = write("smollm", **content), Tokenizer.from_gguf
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).count(str(path)) == 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_text_that_the_tokenizer_fails_on_is_refused(tmp_path: Path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer cannot read a text: WordLevel error"):
        tokenizer.encode("b")
    with pytest.raises(InputError, match="no beginning-of-text token"):
        tokenizer.encode("a", add_bos=True)


def _vocabulary_file(name: str) -> Path:
    if name in hub.BUILT_IN:
        return gguf_files.packaged(name)
    folder = os.environ.get("RORA_VOCABULARY_DIR")
    file = Path(folder or ".") / {"llama2": "ggml-vocab-llama-spm.gguf", "llama3": "ggml-vocab-llama-bpe.gguf"}[name]
    if not folder or not file.exists():
        pytest.skip(f"RORA_VOCABULARY_DIR names no folder with llama.cpp's models/{file.name}")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "llama2", "llama3", "gemma3-270m"])
def test_all_texts_of_the_commonsense_data(name: str, commonsense_dir: Path):
    """The SHA-256 is over the ids of every instruction, output and published training prompt."""
    tokenizer = Tokenizer.from_gguf(_vocabulary_file(name))
    golden = json.loads((GOLDEN / "tokens.json").read_text())[name.partition("-")[0]]
    present = {file: digest for file, digest in golden.items() if (commonsense_dir / file).exists()}
    assert present
    for file, digest in present.items():
        texts = []
        for record in json.loads((commonsense_dir / file).read_text()):
            instruction, output = record["instruction"], record["output"]
            texts += [instruction, output, prompts.prompt(instruction, "train") + output]
        encoded = tokenizer.encode_batch(texts, add_bos=False)
        flat = np.array([n for ids in encoded for n in (len(ids), *ids)], "<i4")
        assert hashlib.sha256(flat.tobytes()).hexdigest() == digest, file
