"""The benchmark of serving clients compares models in which no client forbids a token."""

import json

import gguf
import numpy as np

from benchmarks import serving
from rora_theory.lab.llama.weights import save_hf


def test_the_end_token_of_every_client_is_one_that_greedy_decoding_never_selects(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "NEW_TOKENS", 4)
    params = serving.random_model(0)
    save_hf(tmp_path / "base", params, serving.SHAPE)
    serving.write_gguf(tmp_path / "base.gguf", tmp_path / "base")
    field = gguf.GGUFReader(tmp_path / "base.gguf").get_field("tokenizer.ggml.eos_token_id")
    assert field is not None, "llama.cpp ends a GPT-2 vocabulary at token 11 where the file names no end token"
    assert field.contents() == serving.END_ID
    assert json.loads((tmp_path / "base" / "config.json").read_text())["eos_token_id"] == serving.END_ID
    assert not np.asarray(params["lm_head"][serving.END_ID]).any()
    prompts = np.random.default_rng(0).integers(3, serving.SHAPE.vocab_size, (4, serving.PROMPT_LENGTH))
    texts = serving.greedy_tokens(params, None, prompts)
    assert texts.shape == (4, 4)
    assert serving.END_ID not in texts
