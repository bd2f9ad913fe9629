"""GGUF files with the layout of llama.cpp's converter."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from rora_theory.lab.llama import LlamaConfig, hub

Tensor = tuple[np.ndarray, GGMLQuantizationType | None]
"""Stored array and its type; None for the type of the array."""

VOCABULARIES = json.loads((Path(__file__).parents[1] / "golden" / "tokenizers.json").read_text())
"""Tiny vocabularies by name, with texts and their golden ids (`tests/golden/make_tokens.py`)."""

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_MODULES = MODULES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def packaged(name: str) -> Path:
    """Return the GGUF file of a built-in model's package, and skip the test if the package is not installed."""
    path = hub._packaged(hub.BUILT_IN[name])
    if path is None:
        pytest.skip(f"{hub.BUILT_IN[name].distribution} is not installed")
    return path


def write(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], architecture: str = "llama") -> Path:
    """Write metadata, except values that are None, and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        if value is not None:
            add[type(value)](key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    config: LlamaConfig,
    weights: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    encode: Callable[[str, np.ndarray], Tensor] = lambda _, array: (array, None),
    change: Callable[[dict[str, Tensor]], Any] | None = None,
) -> Path:
    """Write a model.

    Args:
      path: File to write.
      config: Configuration of the model.
      weights: Weights by Hugging Face's names.
      fields: Further or changed metadata.
      encode: Function that converts an array to its stored form, by Hugging Face's name.
      change: Function that changes the stored tensors; None changes nothing.
    """
    tensors = {
        tensor_name(name, config): encode(name, stored_rows(name, array, config)) for name, array in weights.items()
    }
    if change is not None:
        change(tensors)
    return write(path, model_fields(config) | dict(fields), tensors, architecture(config))


def architecture(config: LlamaConfig) -> str:
    return {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)


def tensor_name(name: str, config: LlamaConfig) -> str:
    """Return GGUF's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{(GEMMA_MODULES if config.model_type == 'gemma3_text' else MODULES)[module]}.{kind}"


def stored_rows(name: str, array: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Return an array as the converter stores it: LLaMA's q and k by pairs that turn together, Gemma's norms plus 1."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return array + np.float32(1)
    if config.model_type != "llama" or not ("q_proj" in name or "k_proj" in name):
        return array
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def model_fields(config: LlamaConfig) -> dict[str, Any]:
    """Return the metadata of a configuration."""
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    tokens = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    return {f"{architecture(config)}.{key}": value for key, value in fields.items()} | {
        f"tokenizer.ggml.{key}_token_id": value for key, value in tokens.items()
    }


def tokenizer_fields(name: str, **changes: Any) -> dict[str, Any]:
    """Return the metadata of one of `VOCABULARIES`, changed by GGUF's names without ``tokenizer.ggml``."""
    vocabulary = VOCABULARIES[name]
    if name == "llama2":
        tokens, scores, kinds = map(list, zip(*vocabulary["pieces"], strict=True))
        fields = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds}
    else:
        fields = {"model": "gpt2", "pre": name, "merges": vocabulary["merges"]}
        fields |= {"tokens": vocabulary["tokens"], "token_type": vocabulary["kinds"]}
    fields |= {"bos_token_id": 1, "eos_token_id": 2} | changes
    return {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in fields.items()}
