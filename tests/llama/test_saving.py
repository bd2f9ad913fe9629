"""A model that came as a GGUF file, saved as a folder: nothing of its tokenizer is lost, transformers chats with it."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.llama import LlamaConfig, forward, load
from rora_theory.llama.saving import save_model
from rora_theory.llama.weights import expected_shapes

CONFIG = LlamaConfig(
    128, 32, 40, 2, 4, 2, 8, 1e-5, max_position_embeddings=256, bos_token_id=1, eos_token_id=(2, 3), pad_token_id=2
)
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}<|end|>{% endfor %}"
SPECIAL = ["<|unk|>", "<|begin|>", "<|end|>", "<|turn|>"]
MESSAGES = [{"role": "user", "content": "ab ba"}]


@pytest.fixture
def source(tmp_path, draw_tensors) -> Path:
    """A GGUF file of random weights with all that a chat model's metadata says; its letters are bytes."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = ["Ġ", *map(chr, range(33, 127)), "ab", "ba"]
    tokens = [*SPECIAL, *letters, *(f"<{i}>" for i in range(128 - len(SPECIAL) - len(letters)))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b", "b a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "self_attn.o_proj": "attn_output",
    }
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"}
    names |= {f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")}
    for name, array in draw_tensors(CONFIG).items():
        layer, _, module = name.removesuffix(".weight").removeprefix("model.").removeprefix("layers.").partition(".")
        stored = f"blk.{layer}.{names[module]}" if module else names[layer]
        writer.add_tensor(f"{stored}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(expected_shapes(CONFIG)) == 2 * 9 + 3
    return path


def test_a_saved_model_is_the_same_model(source, tmp_path):
    model = load(source)
    assert model.config == CONFIG
    save_model(tmp_path / "saved", model)
    again = load(tmp_path / "saved")
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    for name in ("bos_id", "eos_id", "pad_id", "unk_id", "eos_ids", "prefix", "suffix", "chat_template"):
        assert getattr(again.tokenizer, name) == getattr(model.tokenizer, name), name
    for text in ("ab ba", "<|turn|>a<|end|>", " x"):
        assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
        assert again.tokenizer.encode(text, add_bos=False) == model.tokenizer.encode(text, add_bos=False)


def test_the_files_say_what_the_metadata_said(source, tmp_path):
    save_model(tmp_path / "saved", load(source))
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "saved").glob("*.json")}
    assert set(read) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    settings = read["tokenizer_config.json"]
    named = {name: settings[f"{name}_token"] for name in ("unk", "bos", "eos", "pad")}
    assert named == {"unk": "<|unk|>", "bos": "<|begin|>", "eos": "<|end|>", "pad": "<|end|>"}
    assert settings["chat_template"] == TEMPLATE
    template = read["tokenizer.json"]["post_processor"]["single"]
    assert [list(part) for part in template] == [["SpecialToken"], ["Sequence"]]
    assert template[0]["SpecialToken"]["id"] == "<|begin|>"
    assert settings["model_max_length"] == 256
    assert read["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2}
    assert read["config.json"]["eos_token_id"] == [2, 3]


def test_a_folders_own_files_are_copied_with_other_weights(source, tmp_path):
    save_model(tmp_path / "saved", load(source))
    (tmp_path / "saved" / "chat_template.jinja").write_text("{{ messages }}")  # where newer folders have it
    model = load(tmp_path / "saved")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    save_model(tmp_path / "copy", replace(model, params=doubled))
    for name in (
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
    ):  # fmt: skip
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "copy").params, doubled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_transformers_chats_with_it(source, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = load(source)
    save_model(tmp_path / "saved", model)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
    text = pipeline.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<|turn|>ab ba<|end|>"
    for one in (text, "ab ba", " a"):
        assert pipeline.tokenizer(one)["input_ids"] == model.tokenizer.encode(one)
    assert pipeline.tokenizer.unk_token == "<|unk|>"
    assert pipeline.model.generation_config.eos_token_id == [2, 3]
    reply = pipeline(MESSAGES, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in reply] == ["user", "assistant"]
    assert reply[0] == MESSAGES[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_transformers_saved_is_loaded(source, tmp_path):
    """Its `config.json`, as written and with every key of the configuration, as older versions did."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "tokenizer", load(source))
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    tokens = [[1, 40, 50, 60]]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    older = {"_model_name_or_path": "a/b", "unk_token_id": 0, "unsloth_version": "2024.9", "temperature": 0.7}
    older |= {"_attn_implementation_autoset": True, "max_length": 20, "bad_words_ids": None, "top_p": 0.9}
    for more in ({}, theirs.config.to_dict() | older):
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        model = load(tmp_path / "theirs")
        np.testing.assert_allclose(forward(model.params, jnp.array(tokens), model.config), expected, rtol=0, atol=1e-5)
        assert bool(model.remarks) == bool(more)
    assert set(older) - {"_attn_implementation_autoset"} <= set(model.ignored)
    assert "config.json: ignored" in model.remarks[0]
