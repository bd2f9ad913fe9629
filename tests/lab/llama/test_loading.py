"""`load` returns weights, configuration and tokenizer of one checkpoint, in both formats."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rora_theory.errors import InputError
from rora_theory.lab.llama import Model, ModelSource, load
from rora_theory.lab.llama.weights import INDEX, SINGLE, save_hf

WORDS = ["<unk>", "<s>", "</s>", "the", "sky", "is", "blue"]


@pytest.fixture
def write(tmp_path, tiny, draw_params):
    """Return ``write(rows=48, pad=None, **settings)``: a model of ``rows`` embeddings with a small tokenizer."""

    def make(rows=tiny.vocab_size, pad=None, **settings):
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.add_special_tokens(["<s>", "</s>", *([pad] if pad else [])])
        source, folder = tmp_path / f"tokenizer-{rows}", tmp_path / f"model-{rows}"
        source.mkdir()
        backend.save(str(source / "tokenizer.json"))
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
        (source / "tokenizer_config.json").write_text(json.dumps(tokens))
        config = dataclasses.replace(tiny, vocab_size=rows)
        save_hf(folder, draw_params(config), config, tokenizer_from=source, **settings)
        return folder

    return make


def test_a_folder_gives_weights_config_and_tokenizer(write, tiny, draw_params):
    folder = write()
    model = load(folder, jnp.bfloat16)
    assert isinstance(model, Model)
    assert model.config == tiny
    assert model.origin == ModelSource(str(folder), folder)
    assert model.tokenizer.encode("the sky is blue", add_bos=True) == [1, 3, 4, 5, 6]
    assert (model.tokenizer.bos_id, model.tokenizer.eos_id) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, model.params, draw_params(tiny, jnp.bfloat16))


def test_another_models_tokenizer_is_named(write):
    for rows, message in ((6, "the tokenizer has 7 tokens"), (2, "the end-of-text token has id 2")):
        folder = write(rows)
        with pytest.raises(InputError, match=f"^{folder / 'tokenizer.json'}: {message}.* {rows} embeddings"):
            load(folder)


def test_a_padding_token_without_an_embedding_is_none_and_refused_in_a_text(write):
    assert load(write(8, pad="<pad>")).tokenizer.pad_id == 7
    tokenizer = load(write(7, pad="<pad>")).tokenizer
    assert tokenizer.pad_id is None
    assert tokenizer.encode_batch(["the sky", ""]) == [[3, 4], []]
    with pytest.raises(InputError, match=r"tokenizer\.json: .*'<pad>' .*id 7.* 7 embeddings"):
        tokenizer.encode_batch(["the sky", "the <pad> sky"])


FILES = ["config.json", SINGLE, INDEX]


@pytest.mark.parametrize("name", [*FILES, "shard"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_special_file_is_refused_at_once(name, kind, write, time_limit):
    folder = write(**({"shard_bytes": 20_000} if name in (INDEX, "shard") else {}))
    path = sorted(folder.glob("*.safetensors"))[0] if name == "shard" else folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    reason = "folder" if kind == "folder" else "not a regular file"
    with time_limit(10), pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{reason}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_model_path_that_is_no_file_is_refused_at_once(kind, tmp_path, time_limit):
    os.mkfifo(tmp_path / "model.gguf")
    path = tmp_path / "model.gguf" if kind == "pipe" else "/dev/zero"
    with time_limit(10), pytest.raises(InputError, match=f"{path}: .*not a regular file"):
        load(path)


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such type"])
def test_a_dtype_is_refused_before_the_model_is_located(dtype, tmp_path):
    with pytest.raises(InputError, match=f"dtype .*'{dtype}'"):
        load(tmp_path / "absent", dtype)
