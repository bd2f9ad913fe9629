"""LLaMA-family models in pure JAX: configuration, forward pass, weights, tokenizer, generation."""

import importlib
from typing import TYPE_CHECKING, Any

from rora_theory.lab.llama.config import MODULES, LinearRope, Llama3Rope, LlamaConfig
from rora_theory.lab.llama.model import (
    Adapter,
    abstract_params,
    count_parameters,
    forward,
    forward_cached,
    hidden_states,
    init_cache,
    init_params,
    linear,
    output_matrix,
    unembed,
)

if TYPE_CHECKING:
    from rora_theory.lab.llama.hub import ModelSource, locate
    from rora_theory.lab.llama.identity import model_digest
    from rora_theory.lab.llama.loading import Model, load, model_config, model_tokenizer

__all__ = [
    "MODULES",
    "Adapter",
    "LinearRope",
    "Llama3Rope",
    "LlamaConfig",
    "Model",
    "ModelSource",
    "abstract_params",
    "count_parameters",
    "forward",
    "forward_cached",
    "hidden_states",
    "init_cache",
    "init_params",
    "linear",
    "load",
    "locate",
    "model_config",
    "model_digest",
    "model_tokenizer",
    "output_matrix",
    "unembed",
]


_LAZY_NAMES = {
    "ModelSource": "hub",
    "Model": "loading",
    "model_digest": "identity",
    "load": "loading",
    "locate": "hub",
    "model_config": "loading",
    "model_tokenizer": "loading",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use if it needs the extra ``finetune``, which the forward pass does not."""
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f"rora_theory.lab.llama.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
