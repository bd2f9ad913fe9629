"""Configurations: both spellings of Hugging Face's keys are read, and unsupported values are refused by name."""

import dataclasses
import json

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.llama import MODULES, LinearRope, Llama3Rope, LlamaConfig

SMALL = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


# Keys of config.json as transformers wrote it from 4.28 to 5, and as tools that build on it did.
HABITS = {
    "_model_name_or_path": "meta-llama/Llama-2-7b-hf", "bad_words_ids": None, "do_sample": False, "max_length": 20,
    "num_beams": 1, "num_local_experts": 8, "sep_token_id": None, "suppress_tokens": [1, 2], "temperature": 0.6,
    "top_p": 0.9,
    "unk_token_id": 0, "unsloth_fixed": True, "unsloth_version": "2024.9", "what_nobody_set": None,
}  # fmt: skip
BOOKKEEPING = {
    "_attn_implementation_autoset": True, "_commit_hash": "0" * 40, "_name_or_path": "somewhere",
    "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "attn_implementation": "sdpa",
    "auto_map": None, "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
    "cross_attention_hidden_size": None, "dtype": "float32", "finetuning_task": None, "head_dim": None,
    "hidden_act": "silu", "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02,
    "layer_types": ["full_attention", "full_attention"], "max_sequence_length": 2048, "max_window_layers": 28,
    "sliding_window_pattern": 6, "mlp_bias": None, "num_key_value_heads": None, "pretraining_tp": 1,
    "quantization_config": None,
    "rope_interleaved": False, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
    "rope_scaling": None, "tf_legacy_loss": False, "tokenizer_class": None, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0", "use_bfloat16": False, "use_cache": True, "use_sliding_window": False,
}  # fmt: skip


def test_keys_without_effect_are_ignored():
    assert LlamaConfig.from_hf(SMALL | HABITS | BOOKKEEPING) == LlamaConfig.from_hf(SMALL)


GEMMA = {"model_type": "gemma3_text", "query_pre_attn_scalar": 8, "rope_local_base_freq": 10.0}
# A changed value of every field, and the fields that it needs beside it.
CHANGES = [
    ({}, {"vocab_size": 49}),
    ({}, {"hidden_size": 36}),
    ({}, {"intermediate_size": 44}),
    ({}, {"num_hidden_layers": 3}),
    ({}, {"num_attention_heads": 8}),
    ({}, {"num_key_value_heads": 2}),
    ({}, {"head_dim": 10}),
    ({}, {"rms_norm_eps": 1e-3}),
    ({}, {"rope_theta": 123.0}),
    ({}, {"rope_scaling": LinearRope(2.5)}),
    ({}, {"rope_scaling": Llama3Rope(8.0, 1.0, 4.0, 8192)}),
    ({}, {"tie_word_embeddings": True}),
    ({}, {"attention_bias": True}),
    ({}, {"mlp_bias": True}),
    ({}, {"max_position_embeddings": 16}),
    ({}, {"bos_token_id": 5}),
    ({}, {"eos_token_id": 6}),
    ({}, {"eos_token_id": (7, 9)}),
    ({}, {"eos_token_id": None}),
    ({}, {"pad_token_id": 7}),
    ({}, {"model_type": "mistral"}),
    ({"model_type": "mistral"}, {"sliding_window": 8}),
    ({"model_type": "qwen2", "sliding_window": 8}, {"full_attention_layers": (0,)}),
    (GEMMA, {"query_pre_attn_scalar": 4}),
    (GEMMA, {"rope_local_base_freq": 50.0}),
]


@pytest.mark.parametrize(("fields", "change"), CHANGES)
def test_a_written_field_reads_back(fields, change):
    config = dataclasses.replace(LlamaConfig.from_hf(SMALL), **fields)
    changed = dataclasses.replace(config, **change)
    assert changed.to_hf() != config.to_hf()
    assert LlamaConfig.from_hf(json.loads(json.dumps(changed.to_hf()))) == changed


def test_every_field_is_changed():
    assert {field.name for field in dataclasses.fields(LlamaConfig)} == {
        name for _, change in CHANGES for name in change
    }


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("change", "window", "full"),
    [
        ({"model_type": "mistral"}, 4096, ()),
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}, 8, ()),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": [SLIDING] * 2}, 8, ()),
        ({"model_type": "qwen3", "sliding_window": 8, "max_window_layers": 2, "use_sliding_window": True}, None, ()),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True}, None, ()),  # from layer 28 on
        ({"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None, ()),
        ({"model_type": "qwen3", "sliding_window": None, "layer_types": [FULL, FULL]}, None, ()),
        ({"model_type": "gemma3_text"}, 4096, ()),  # the sixth layer and every sixth after it have no window
        ({"model_type": "gemma3_text", "sliding_window_pattern": 1}, None, ()),
        ({"model_type": "gemma3_text", "sliding_window": None}, None, ()),
    ],
)
def test_where_there_is_a_sliding_window(change, window, full):
    """These cases complement the golden models of `test_families`, whose logits depend on their windows."""
    config = LlamaConfig.from_hf(SMALL | {"num_key_value_heads": 2} | change)
    assert (config.sliding_window, config.full_attention_layers) == (window, full)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_missing_keys_have_the_defaults_of_hugging_faces_classes():
    fields = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}
    assert LlamaConfig.from_hf(SMALL) == LlamaConfig(48, 32, 40, 2, 4, 4, 8, **fields, bos_token_id=1, eos_token_id=2)
    wide = SMALL | {"hidden_size": 64, "num_attention_heads": 32}
    mistral, qwen2, qwen3 = (LlamaConfig.from_hf(wide | {"model_type": name}) for name in ("mistral", "qwen2", "qwen3"))
    assert (mistral.num_key_value_heads, mistral.max_position_embeddings, mistral.eos_token_id) == (8, 131072, 2)
    assert (qwen2.num_key_value_heads, qwen2.max_position_embeddings, qwen2.bos_token_id) == (32, 32768, None)
    assert (qwen2.eos_token_id, qwen2.head_dim, qwen3.head_dim) == (None, 2, 128)
    biased = {
        name: [module for module in MODULES if config.has_bias(module)]
        for name, config in (("mistral", mistral), ("qwen2", qwen2), ("qwen3", qwen3))
    }
    assert biased == {"mistral": [], "qwen2": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "qwen3": []}
    assert [config.family.has_qk_norm for config in (mistral, qwen2, qwen3)] == [False, False, True]
    gemma = LlamaConfig.from_hf(wide | {"model_type": "gemma3_text", "num_hidden_layers": 12})
    assert (gemma.num_key_value_heads, gemma.head_dim, gemma.query_pre_attn_scalar) == (4, 256, 256)
    assert (gemma.sliding_window, gemma.full_attention_layers) == (4096, (5, 11))
    assert (gemma.rope_theta, gemma.rope_local_base_freq, gemma.tie_word_embeddings) == (1e6, 1e4, True)
    assert (gemma.bos_token_id, gemma.eos_token_id, gemma.pad_token_id) == (2, 1, 0)


INTEGERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
INTEGERS += ("num_key_value_heads", "head_dim", "max_position_embeddings")
# Fields of one type, and values that none of them can have.
WRONG_VALUES = [
    (INTEGERS, (0, True, 2.5, "3", 10**30)),
    (("rms_norm_eps", "rope_theta"), (0.0, -1.0, float("nan"), "1e4", [1e4])),
    (("tie_word_embeddings", "attention_bias", "mlp_bias"), ("yes", 1)),
    (("bos_token_id", "eos_token_id", "pad_token_id"), ("</s>", 1.5, True, 10**30, {"a": 1})),
]
QWEN_WINDOW = {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 8, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: value}, name) for names, values in WRONG_VALUES for name in names for value in values),
        ({"model_type": "gemma2"}, "model_type .*llama, mistral, .*'gemma2'.*rora_theory.measure"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias .* mistral, got True"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias .* qwen2, got True"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias .*got True"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window .*got 0"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": [FULL, SLIDING]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": [SLIDING, SLIDING]}, "layer_types"),
        ({**QWEN_WINDOW, "layer_types": [SLIDING, FULL]}, "layer_types"),
        ({**QWEN_WINDOW, "layer_types": [FULL, SLIDING, SLIDING]}, "layer_types"),
        ({**QWEN_WINDOW, "layer_types": [FULL, "chunked_attention"]}, "layer_types"),
        ({**QWEN_WINDOW, "max_window_layers": -1}, "max_window_layers .*got -1"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern .*got 0"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping .*got 30.0"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping .*got 50.0"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention .*got True"),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation .*got 'gelu'"),
        ({"model_type": "gemma3_text", "hidden_act": "silu"}, "hidden_act .*got 'silu'"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar .*got 0"),
        ({"model_type": "gemma3_text", "rope_local_base_freq": -1.0}, "rope_local_base_freq .*got -1.0"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention",
        ),
        ({"query_pre_attn_scalar": 8}, "query_pre_attn_scalar .*got 8"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq .*got 10000.0"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": [2.0]}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters",
        ),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 30}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "linear"),
        ({"head_dim": 7}, "head_dim"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 10**30}, "hidden_size .* at most 2,147,483,647, got 10+"),
        ({"rope_parameters": "x" * 10_000}, "rope_parameters"),
    ],
)
def test_unsupported_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message) as caught:
        LlamaConfig.from_hf(SMALL | change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_module_of_no_layer_is_refused():
    with pytest.raises(InputError, match="'lm_head'"):
        LlamaConfig.from_hf(SMALL).module_shape("lm_head")
