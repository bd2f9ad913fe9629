"""Differences between the supported model families, one row each.

The forward pass of `model`, the configuration's parser and the readers of weights look a difference up here instead
of comparing names of model types.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class LayerNorms(NamedTuple):
    """Hugging Face's names of the RMS norms of one layer's residual stream; None where the family has no such norm.

    Attributes:
      before_attention: Norm of the input of attention.
      after_attention: Norm of the output of attention, before it is added to the residual stream.
      before_feed_forward: Norm of the input of the feed-forward network.
      after_feed_forward: Norm of the output of the feed-forward network, before it is added.
    """

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_feed_forward: str = "post_attention_layernorm"
    after_feed_forward: str | None = None


_LLAMA_NORMS = LayerNorms()


@dataclass(frozen=True)
class Family:
    """Properties shared by all models of one ``model_type``.

    Attributes:
      architecture: Name of the transformers class that reads the model.
      fields: Optional fields of `LlamaConfig` that the family has.
      defaults: Values of `config.json` keys that a file may leave out, where they differ from LLaMA's.
      rope_theta: Default base of the rotary frequencies.
      has_qkv_bias: Whether q, k and v always have biases and no other module has one.
      has_qk_norm: Whether each head's queries and keys are normalised before rotation.
      norms: Names of the norms of a layer.
      norm_offset: Number added to the weights of all norms.
      scales_embeddings: Whether embeddings are multiplied by the square root of the hidden size.
      activation: Activation of the gated feed-forward network, by Hugging Face's name.
      full_layers: Layers without sliding window in a model that has one: none, the first ones, or any.
    """

    architecture: str
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = 10000.0
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    norms: LayerNorms = _LLAMA_NORMS
    norm_offset: float = 0.0
    scales_embeddings: bool = False
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    full_layers: Literal["none", "first", "any"] = "none"


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA3 = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10000.0,
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", fields=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        fields=("sliding_window",),
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", fields=("sliding_window",), defaults=_QWEN, has_qkv_bias=True, full_layers="first"
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fields=("attention_bias", "sliding_window"),
        defaults=_QWEN | {"head_dim": 128},
        has_qk_norm=True,
        full_layers="first",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fields=("attention_bias", "sliding_window", "query_pre_attn_scalar", "rope_local_base_freq"),
        defaults=_GEMMA3,
        rope_theta=1e6,
        has_qk_norm=True,
        norms=LayerNorms(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        ),
        norm_offset=1.0,
        scales_embeddings=True,
        activation="gelu_pytorch_tanh",
        full_layers="any",
    ),
}
"""The supported families by Hugging Face's ``model_type``."""
