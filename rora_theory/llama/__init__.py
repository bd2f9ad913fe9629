"""LLaMA-family models in pure JAX: configuration, forward pass, weights, tokenizer, generation."""

from typing import TYPE_CHECKING, Any

from rora_theory.llama.config import MODULES, LinearRope, Llama3Rope, LlamaConfig
from rora_theory.llama.model import (
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
    from rora_theory.llama.loading import Model, digest, load

__all__ = [
    "MODULES",
    "Adapter",
    "LinearRope",
    "Llama3Rope",
    "LlamaConfig",
    "Model",
    "abstract_params",
    "count_parameters",
    "digest",
    "forward",
    "forward_cached",
    "hidden_states",
    "init_cache",
    "init_params",
    "linear",
    "load",
    "output_matrix",
    "unembed",
]


def __getattr__(name: str) -> Any:
    """`load`, `Model` and `digest` on first use: they need the extra ``finetune``, the forward pass does not."""
    if name in ("Model", "digest", "load"):
        from rora_theory.llama import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
