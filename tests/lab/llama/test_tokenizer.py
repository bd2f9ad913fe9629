"""Tokenizers against golden ids of sentencepiece, transformers and llama.cpp
(`tests/golden/make_tokens.py`)."""

import base64
import functools
import hashlib
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import gguf_files
from support.gguf_files import VOCABULARIES

from rora_theory.errors import InputError
from rora_theory.lab.data import prompts
from rora_theory.lab.llama import hub, vocabulary
from rora_theory.lab.llama.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
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
    folder.mkdir(exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_gemmas_pieces_encode_as_sentencepiece(write):
    """No space precedes the text, runs of spaces are pieces, and the unknown piece is a control piece.

    A literal U+2581 is a space to sentencepiece, alone and within a run.
    """
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "   ", "▁", "▁a", "a", "b", "ab"]
    kinds = [vocabulary.CONTROL] * 4 + [vocabulary.USER_DEFINED] * 2 + [vocabulary.NORMAL] * 5
    scores = [-1000.0] * 6 + [-5.0, -1.0, -3.0, -4.0, -2.0]
    pieces = {"tokens": tokens, "token_type": kinds, "scores": scores, "add_space_prefix": False}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3}
    tokenizer = Tokenizer.from_gguf(write("llama2", **pieces, **ids))
    # Reference: sentencepiece 0.2.3 on the same pieces, runs of spaces written in U+2581.
    expected = {"ab a": [10, 7], "a  b": [8, 4, 9], "a ▁b": [8, 4, 9], "   a": [5, 8], " ab": [7, 9], "z": [3]}
    assert {text: tokenizer.encode(text, add_bos=False) for text in expected} == expected
    assert tokenizer.encode("a") == [2, 8]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (2, 1, 0, 3)
    assert tokenizer.decode([8, 4, 9, 5, 7]) == "a  b    a"


@pytest.mark.parametrize("name", ["llama2", *BYTE_LEVEL])
def test_a_vocabulary_encodes_as_sentencepiece_transformers_and_llama_cpp(name: str, write, tmp_path: Path):
    golden = VOCABULARIES[name]
    tokenizers = [Tokenizer.from_gguf(gguf.GGUFReader(write(name)))]
    tokenizers.append(Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizers[0])))
    if name == "llama2":
        tokenizers.append(Tokenizer.from_folder(sentencepiece_folder(tmp_path / "model")))
    for tokenizer in tokenizers:
        assert tokenizer.encode_batch(golden["texts"], add_bos=False) == golden["ids"]
        assert [tokenizer.decode(ids) for ids in golden["ids"]] == golden["decoded"]
        assert tokenizer.vocab_size == len(golden["pieces" if name == "llama2" else "tokens"])


@functools.cache
def smollm() -> Tokenizer:
    golden = VOCABULARIES["smollm"]
    pieces = [vocabulary.Piece(token, kind=kind) for token, kind in zip(golden["tokens"], golden["kinds"], strict=True)]
    return Tokenizer(vocabulary.byte_level_tokenizer(pieces, golden["merges"], "smollm"))


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
        ({"bos_token": "", "eos_token": {"content": "</s>"}}, (1,), ()),
        ({"bos_token": {"content": "</s>", "special": True}}, (2,), ()),
    ],
)
def test_beginning_and_end_of_a_sentencepiece_folder(config: dict | None, prefix, suffix, tmp_path: Path):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path, config))
    plain = tokenizer.encode("a", add_bos=False)
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    assert tokenizer.encode("a") == [*prefix, *plain, *suffix]
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *plain]
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (2, None, None)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"legacy": False}, [263, 616, 2, 327, 599]),
        ({"legacy": True}, [263, 616, 2, 272]),
        ({}, [263, 616, 2, 272]),
        ({"add_prefix_space": False}, [352, 2, 327, 599]),
    ],
)
def test_a_space_before_the_text_or_every_part_or_none(settings: dict, ids: list[int], tmp_path: Path):
    """Ids of transformers 5.24, which reads a missing ``legacy`` as false; transformers 4 reads true."""
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path, settings))
    assert tokenizer.encode("ab</s>the", add_bos=False) == ids
    assert tokenizer.decode(tokenizer.encode("the", add_bos=False)) == "the"


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_further_special_tokens_follow_those_with_a_role(key: str, file: str, tmp_path: Path):
    size = len(VOCABULARIES["llama2"]["pieces"])
    folder = sentencepiece_folder(tmp_path, {"pad_token": "<pad>"})
    entries = {"pad_token": "<pad>", key: ["<|x|>", {"content": "<|y|>"}]}
    (folder / file).write_text(json.dumps(entries))
    read = Tokenizer.from_folder(folder)
    assert read.encode("<|y|><|x|><pad>", add_bos=False) == [size + 2, size + 1, size]
    assert read.decode([size + 2, size + 1]) == ""


def test_qwens_pre_tokenization_equals_transformers(write):
    """With LLaMA 3's tiny vocabulary: digits are single, letters composed, and words formed by merges alone."""
    transformers = pytest.importorskip("transformers", "5.0")
    golden = VOCABULARIES["llama-bpe"]
    # Beside it digits that could be merged, and a word that no merges lead to.
    more = {
        "tokens": [*golden["tokens"], "12", "Ġxyz"],
        "merges": [*golden["merges"], "1 2"],
        "token_type": [*golden["kinds"], 1, 1],
    }
    ours, llama3 = (Tokenizer.from_gguf(write("llama-bpe", pre=pre, **more)) for pre in ("qwen2", "llama3"))
    vocab = {token: i for i, token in enumerate(more["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in more["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=golden["tokens"][0])
    texts = ["three words here", "12345 it's  7\n\n  x", "cafe\u0301 \u00e9", " a1b22\tc", "I'LL   go\r\n", " xyz"]
    for text in texts:
        assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False)["input_ids"], text
    for text in (texts[1], texts[2], texts[5]):
        assert ours.encode(text, add_bos=False) != llama3.encode(text, add_bos=False), text


def test_tokenizer_json_decides_beginning_and_end(write, tmp_path: Path):
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    tokenizer = Tokenizer.from_gguf(write("llama-bpe"))
    template = TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)])
    tokenizer.backend.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    tokenizer.backend.enable_truncation(max_length=3)
    tokenizer.backend.enable_padding(length=30)
    settings = {"add_bos_token": False, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    read = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer, tokenizer_config=settings))
    assert (read.prefix, read.suffix) == ((1,), (2,))
    ids = tokenizer.encode("three words here")
    assert len(read.encode("three words here", add_bos=False)) > 3  # neither truncated nor padded
    assert read.encode("three words here")[:1] == [1]
    assert ids[0] == 1


def test_special_ids_come_from_the_first_file_that_names_them(tmp_path: Path):
    tokenizer = smollm()
    files = {
        "tokenizer_config": {"bos_token": "<|begin|>"},
        "special_tokens_map": {"bos_token": "<|end|>", "unk_token": {"content": "<|unknown|>"}},
        "generation_config": {"eos_token_id": [2, 7, 5], "pad_token_id": 9},
        "config": {"eos_token_id": 3, "pad_token_id": 4, "bos_token_id": 6},
    }
    read = Tokenizer.from_folder(json_folder(tmp_path / "all", tokenizer, **files))
    assert (read.bos_id, read.eos_id, read.unk_id, read.pad_id) == (1, 2, 0, 9)
    assert read.eos_ids == (2, 7, 5)
    assert (read.prefix, read.suffix) == ((), ())
    read = Tokenizer.from_folder(json_folder(tmp_path / "less", tokenizer, config=files["config"]))
    assert (read.bos_id, read.eos_id, read.unk_id, read.pad_id, read.eos_ids) == (6, 3, None, 4, (3,))


def test_tokens_that_only_the_configuration_lists_are_added(tmp_path: Path):
    tokenizer = smollm()
    size = tokenizer.vocab_size
    settings = {
        "added_tokens_decoder": {
            "1": {"content": "<|begin|>", "special": True},
            str(size): {"content": "<|call|>", "special": False},
        },
        "pad_token": "<|pad|>",
    }
    read = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer, tokenizer_config=settings))
    assert read.pad_id == size + 1
    assert read.encode("a<|pad|><|call|>")[1:] == [size + 1, size]
    assert read.decode([size + 1, size]) == "<|call|>"
    settings["added_tokens_decoder"] |= {"9" * 5000: {"content": "<|far|>"}}  # no id, and passed over as other keys are
    assert Tokenizer.from_folder(json_folder(tmp_path / "far", tokenizer, tokenizer_config=settings)).pad_id == size + 1
    settings["added_tokens_decoder"] = {str(size + 7): {"content": "<|call|>"}}
    with pytest.raises(InputError, match=rf"added_tokens_decoder has '<\|call\|>' as id {size + 7}.*as id {size}"):
        Tokenizer.from_folder(json_folder(tmp_path / "bad", tokenizer, tokenizer_config=settings))


def test_tokens_of_an_older_file_have_its_ids(tmp_path: Path):
    """transformers 5.24 gives the same ids. The end token, which the settings name too, is not the first new one."""
    size = len(VOCABULARIES["llama2"]["pieces"])
    folder = sentencepiece_folder(tmp_path, {"eos_token": "<|im_end|>"})
    file = folder / "added_tokens.json"
    file.write_text(json.dumps({"<|im_end|>": size + 1, "<call>": size}))
    read = Tokenizer.from_folder(folder)
    assert (read.eos_id, read.eos_ids) == (size + 1, (size + 1,))
    assert read.encode("<call><|im_end|>", add_bos=False) == [size, size + 1]
    assert read.decode([size, size + 1]) == "<call>"
    file.write_text(json.dumps({"<|im_end|>": size + 5}))
    with pytest.raises(InputError, match=rf"added_tokens\.json has '<\|im_end\|>' as id {size + 5}.*as id {size}"):
        Tokenizer.from_folder(folder)
    # The settings replace the file, as in transformers.
    sentencepiece_folder(tmp_path, {"added_tokens_decoder": {str(size): {"content": "<|im_end|>"}}})
    assert Tokenizer.from_folder(folder).encode("<|im_end|>", add_bos=False) == [size]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", None])
def test_flags_of_tokens_that_only_the_configuration_lists(flag, tmp_path: Path):
    tokenizer = smollm()
    number = tokenizer.vocab_size
    token = {"content": "call", "special": False} | ({} if flag is None else {flag: True})
    settings = {"added_tokens_decoder": {str(number): token}}
    encode = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer, tokenizer_config=settings)).encode
    a, space = encode("a"), encode(" ")
    assert encode("a call") == ([*a, number] if flag == "lstrip" else [*a, *space, number])
    assert encode("call a")[:2] == ([number, *a] if flag == "rstrip" else [number, encode(" a")[0]])
    assert (number in encode("recalled")) == (flag != "single_word")


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
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    assert tokenizer.eos_ids == ((2, 5) if "eot_token_id" in more else (2,))


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}
# Parts of a tokenizer.json at which the library panics instead of raising.
PANICS = [
    # a merge shorter than the prefix that it should begin with,
    {"model": BPE | {"continuing_subword_prefix": "####", "merges": [["a", "b"]]}},
    # a table of characters that is none, and one that is well formed and too short, which shows when it is used,
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAAEAAAABAAAAQUJD"}},
    # parts of no length,
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    # and a template with a token that is not described.
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        }
    },
]
FOLDER_FAULTS = [
    ({}, "no tokenizer"),
    ({"tokenizer.json": "{"}, "tokenizer.json"),
    ({"tokenizer.json": '{"model": {}}'}, "tokenizer.json"),
    ({"tokenizer.json": "[" * 100_000}, "tokenizer.json"),
    ({"tokenizer.json": "{}", "tokenizer_config.json": '{"a":' * 100_000}, "tokenizer_config.json"),
    ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "tokenizer_config.json"),
    ({"tokenizer.json": json.dumps({"model": BPE | {"vocab": {"a": 10**30}}})}, "tokenizer.json"),
    *(({"tokenizer.json": json.dumps({"added_tokens": [], "model": BPE} | part)}, "tokenizer.json") for part in PANICS),
    ({"tokenizer.model": ""}, "sentencepiece"),
    ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "sentencepiece"),
    *(
        ({"tokenizer.model": SENTENCEPIECE_MODEL[:end].decode("latin-1")}, "sentencepiece")
        for end in (1, 7, len(SENTENCEPIECE_MODEL) // 2, -1)
    ),
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
    ({"model": "llama", "remove_extra_whitespaces": 3}, "remove_extra_whitespaces"),
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
            texts += [instruction, output, prompts.training_text(instruction, output)]
        encoded = tokenizer.encode_batch(texts, add_bos=False)
        flat = np.array([n for ids in encoded for n in (len(ids), *ids)], "<i4")
        assert hashlib.sha256(flat.tobytes()).hexdigest() == digest, file
