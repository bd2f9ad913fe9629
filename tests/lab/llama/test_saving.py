"""A model from a GGUF file is saved as a folder with its whole tokenizer, and transformers chats with it."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import gguf_files
from support.tiny import WIDE

from rora_theory.lab.llama import forward, load
from rora_theory.lab.llama.saving import save_model

TEMPLATE = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
MESSAGES = [{"role": "user", "content": "ab ba"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory, draw_tensors):
    """Return a loaded GGUF file of random weights with all metadata of a chat model."""
    tokens = {"unknown_token_id": 0, "eot_token_id": 3, "padding_token_id": 2}
    fields = gguf_files.tokenizer_fields("smollm", **tokens, add_bos_token=True, chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    return load(gguf_files.write_model(path, WIDE, draw_tensors(WIDE), fields))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Return the folder that the model is saved to."""
    folder = tmp_path_factory.mktemp("model") / "saved"
    save_model(folder, model)
    return folder


def test_a_saved_model_is_the_same_model(model, saved):
    assert model.config == WIDE
    assert model.source.name == "model.gguf"
    again = load(saved)
    assert again.config == WIDE
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    for name in ("bos_id", "eos_id", "pad_id", "eos_ids", "chat_template"):
        assert getattr(again.tokenizer, name) == getattr(model.tokenizer, name), name
    for text in ("ab ba", "<|begin|>a<|end|>", " x"):
        assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
        assert again.tokenizer.encode(text, add_bos=False) == model.tokenizer.encode(text, add_bos=False)


def test_saved_files_agree_with_the_metadata(saved):
    read = {path.name: json.loads(path.read_text()) for path in saved.glob("*.json")}
    assert set(read) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    settings = read["tokenizer_config.json"]
    named = {name: settings[f"{name}_token"] for name in ("unk", "bos", "eos", "pad")}
    assert named == {"unk": "<|unknown|>", "bos": "<|begin|>", "eos": "<|end|>", "pad": "<|end|>"}
    assert (saved / "chat_template.jinja").read_text() == TEMPLATE
    template = read["tokenizer.json"]["post_processor"]["single"]
    assert [list(part) for part in template] == [["SpecialToken"], ["Sequence"]]
    assert template[0]["SpecialToken"]["id"] == "<|begin|>"
    assert settings["model_max_length"] == 512
    assert read["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2}
    assert read["config.json"]["eos_token_id"] == [2, 3]


def test_a_folders_own_files_are_copied_with_other_weights(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved" / "chat_template.jinja").write_text("{{ messages }}")  # where newer folders have it
    model = load(tmp_path / "saved")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    save_model(tmp_path / "copy", replace(model, params=doubled))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "copy").params, doubled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_transformers_chats_with_it(model, saved):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("text-generation", model=str(saved), device="cpu")
    text = pipeline.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<|begin|>ab ba<|end|>"
    for chat in (text, "ab ba", " a"):
        assert pipeline.tokenizer(chat)["input_ids"] == model.tokenizer.encode(chat)
    assert pipeline.tokenizer.unk_token == "<|unknown|>"
    assert pipeline.model.generation_config.eos_token_id == [2, 3]
    reply = pipeline(MESSAGES, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in reply] == ["user", "assistant"]
    assert reply[0] == MESSAGES[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_transformers_saved_is_loaded(saved, tmp_path):
    """`config.json` is read as transformers writes it, and with every key, as older versions wrote it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE.to_hf())).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path / "theirs")
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
