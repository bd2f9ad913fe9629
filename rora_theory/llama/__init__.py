"""LLaMA-family models in pure JAX: configuration, forward pass, weights, tokenizer, generation."""

from rora_theory.llama.config import MODULES, LinearRope, Llama3Rope, LlamaConfig
from rora_theory.llama.model import (
    Adapter,
    abstract_params,
    forward,
    forward_cached,
    hidden_states,
    init_cache,
    init_params,
    linear,
    unembed,
)

__all__ = [
    "MODULES",
    "Adapter",
    "LinearRope",
    "Llama3Rope",
    "LlamaConfig",
    "abstract_params",
    "forward",
    "forward_cached",
    "hidden_states",
    "init_cache",
    "init_params",
    "linear",
    "unembed",
]
