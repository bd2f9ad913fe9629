"""`load`: weights, configuration and tokenizer of one checkpoint, in both formats."""

import dataclasses
import json
import os
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rora_theory.errors import InputError
from rora_theory.llama import Model, ModelSource, load
from rora_theory.llama.weights import save_hf

WORDS = ["<unk>", "<s>", "</s>", "the", "sky", "is", "blue"]


def write_tokenizer(folder, words=WORDS, pad=None):
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", *([pad] if pad else [])])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_folder_gives_weights_config_and_tokenizer(tiny, draw_params, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    params = draw_params(tiny)
    save_hf(tmp_path / "model", params, tiny, tokenizer_from=tmp_path / "tokenizer")
    model = load(tmp_path / "model", jnp.bfloat16)
    assert isinstance(model, Model)
    assert model.config == tiny
    assert model.origin == ModelSource(str(tmp_path / "model"), tmp_path / "model")
    assert model.tokenizer.encode("the sky is blue", add_bos=True) == [1, 3, 4, 5, 6]
    assert (model.tokenizer.bos_id, model.tokenizer.eos_id) == (1, 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), model.params, params)


@pytest.mark.parametrize(("rows", "pad"), [(7, None), (8, 7)])
def test_a_pad_token_without_an_embedding_is_none(rows, pad, tiny, draw_params, tmp_path):
    config = dataclasses.replace(tiny, vocab_size=rows)
    write_tokenizer(tmp_path / "tokenizer", pad="<pad>")
    save_hf(tmp_path / "model", draw_params(config), config, tokenizer_from=tmp_path / "tokenizer")
    assert load(tmp_path / "model").tokenizer.pad_id == pad


def test_a_gguf_file_gives_weights_config_and_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (5, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        **{f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (40, 32),
        "blk.0.ffn_up": (40, 32),
        "blk.0.ffn_down": (32, 40),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load(path)
    assert (model.config.vocab_size, model.config.head_dim, model.config.tie_word_embeddings) == (5, 8, True)
    assert model.config.rms_norm_eps == 1e-5
    assert model.tokenizer.encode("abba", add_bos=True) == [0, 4, 3, 2]
    assert model.source == path
    assert model.params["layers"]["mlp.down_proj"]["weight"].shape == (1, 32, 40)


def test_another_models_tokenizer_is_named(tiny, draw_params, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    for rows, message in ((6, "the tokenizer has 7 tokens"), (2, "the end-of-text token has id 2")):
        config = dataclasses.replace(tiny, vocab_size=rows)
        save_hf(tmp_path / str(rows), draw_params(config), config, tokenizer_from=tmp_path / "tokenizer")
        where = tmp_path / str(rows) / "tokenizer.json"
        with pytest.raises(InputError, match=f"^{where}: {message}.* {rows} embeddings"):
            load(tmp_path / str(rows))


def test_a_text_with_a_token_beyond_the_vocabulary_is_refused(tiny, draw_params, tmp_path):
    config = dataclasses.replace(tiny, vocab_size=7)
    write_tokenizer(tmp_path / "tokenizer", pad="<pad>")
    save_hf(tmp_path / "model", draw_params(config), config, tokenizer_from=tmp_path / "tokenizer")
    tokenizer = load(tmp_path / "model").tokenizer
    assert tokenizer.encode_batch(["the sky", ""]) == [[3, 4], []]
    with pytest.raises(InputError, match=r"tokenizer\.json: .*'<pad>' .*id 7.* 7 embeddings"):
        tokenizer.encode_batch(["the sky", "the <pad> sky"])


FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("name", [*FILES, "tokenizer.model", "shard"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_special_file_is_refused_at_once(name, kind, tiny, draw_params, tmp_path, time_limit):
    write_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "model"
    shards = {"shard_bytes": 20_000} if name.endswith("index.json") or name == "shard" else {}
    save_hf(folder, draw_params(tiny), tiny, tokenizer_from=tmp_path / "tokenizer", **shards)
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
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
def test_a_model_that_is_no_file_is_refused_at_once(kind, tmp_path, time_limit):
    os.mkfifo(tmp_path / "model.gguf")
    path = tmp_path / "model.gguf" if kind == "pipe" else "/dev/zero"
    with time_limit(10), pytest.raises(InputError, match=f"{path}: .*not a regular file"):
        load(path)


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such type"])
def test_a_dtype_is_refused_before_anything_is_looked_for(dtype, tmp_path):
    with pytest.raises(InputError, match=f"dtype .*'{dtype}'"):
        load(tmp_path / "absent", dtype)
