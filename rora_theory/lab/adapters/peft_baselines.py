"""Prefix tuning, series and parallel adapters in PEFT's file format.

A prefix has the format that PEFT uses without ``prefix_projection``: one tensor ``prompt_embeddings``
[virtual tokens, layers x 2 x kv heads x head_dim], with the keys and then the values of each layer.

PEFT does not support series and parallel adapters. They are written in its format, so that the same tools can inspect
them: ``peft_type`` is ``SERIES_ADAPTER`` or ``PARALLEL_ADAPTER``, and the tensors of layer i are
``base_model.model.model.layers.{i}.{module}.adapter_down.weight`` [width, n] and ``.adapter_up.weight`` [m, width].
PEFT rejects these types by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rora_theory.advice.adapter_config import Entries, validate_entries
from rora_theory.errors import InputError
from rora_theory.lab.adapters.bottleneck import BottleneckAdapter, BottleneckConfig
from rora_theory.lab.adapters.prefix import PrefixAdapter, PrefixConfig
from rora_theory.lab.adapters.targets import full_name
from rora_theory.lab.llama import LlamaConfig
from rora_theory.scaling import is_finite

PREFIX, TENSOR = "PREFIX_TUNING", "prompt_embeddings"
PLACEMENTS = {"SERIES_ADAPTER": "series", "PARALLEL_ADAPTER": "parallel"}

Baseline = PrefixAdapter | BottleneckAdapter
BaselineConfig = PrefixConfig | BottleneckConfig


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


_INTEGER = "an integer of at least 1"
_TASK: Entries = {"task_type": (None, lambda v: v in (None, "CAUSAL_LM"), "'CAUSAL_LM'")}
_PREFIX: Entries = {
    **_TASK,
    "peft_type": (None, lambda v: v == PREFIX, repr(PREFIX)),
    "encoder_hidden_size": (None, lambda v: v is None or _count(v), _INTEGER),
    "init_weights": (None, lambda v: v in (None, "zero"), "null or 'zero'"),
    "num_attention_heads": (None, lambda v: v is None or _count(v), _INTEGER),
    "num_layers": (None, lambda v: v is None or _count(v), _INTEGER),
    "num_transformer_submodules": (1, lambda v: v in (None, 1), "1"),
    "num_virtual_tokens": (None, _count, _INTEGER),
    "prefix_projection": (False, lambda v: v is False, "false (a prefix without its projection network)"),
    "token_dim": (None, lambda v: v is None or _count(v), _INTEGER),
}
_BOTTLENECK: Entries = {
    **_TASK,
    "peft_type": (None, lambda v: v in PLACEMENTS, ", ".join(PLACEMENTS)),
    "adapter_dropout": (0.0, lambda v: is_finite(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "bottleneck_size": (None, _count, _INTEGER),
    "target_modules": (None, _names, "a list of names"),
}
ENTRIES_BY_TYPE: dict[str, Entries] = {PREFIX: _PREFIX, **dict.fromkeys(PLACEMENTS, _BOTTLENECK)}
"""Entries of each ``peft_type`` that affect what an adapter computes."""


def baseline_to_peft(adapter: Baseline, base_model: str | None) -> dict[str, Any]:
    """Return the entries of the configuration file."""
    shared = {"base_model_name_or_path": base_model, "inference_mode": True, "task_type": "CAUSAL_LM"}
    # PEFT's prefix tuning: one table of keys and values, without PEFT's optional projection.
    if isinstance(adapter, PrefixAdapter):
        heads = adapter.llama_config.num_key_value_heads
        width = heads * adapter.llama_config.head_dim
        return shared | {
            "encoder_hidden_size": width,
            "init_weights": None,
            "num_attention_heads": heads,
            "num_layers": adapter.llama_config.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": adapter.config.virtual_tokens,
            "peft_type": PREFIX,
            "prefix_projection": False,
            "token_dim": width,
        }
    # Bottlenecks have LLM-Adapters' entries, since PEFT itself has no such adapter.
    config = adapter.config
    kinds = {placement: kind for kind, placement in PLACEMENTS.items()}
    return shared | {
        "adapter_dropout": config.dropout,
        "bias": "none",
        "bottleneck_size": config.width,
        "peft_type": kinds[config.placement],
        "target_modules": list(config.target_modules or ()),
    }


def adapter_tensors(adapter: Baseline) -> dict[str, np.ndarray]:
    """Return the tensors of the weights file by name."""
    if isinstance(adapter, PrefixAdapter):
        # Keys and values of a layer next to each other: [tokens, layers, 2, heads, width], flattened after the tokens.
        pair = np.stack([np.asarray(adapter.params[kind]) for kind in ("key", "value")], axis=1)
        embeddings = np.moveaxis(pair, 2, 0).reshape(adapter.config.virtual_tokens, -1)
        return {TENSOR: np.ascontiguousarray(embeddings)}
    return {
        _name(layer, module, kind): np.ascontiguousarray(stack[layer])
        for module, stacks in adapter.params.items()
        for kind, stack in ((kind, np.asarray(stack)) for kind, stack in stacks.items())
        for layer in range(len(stack))
    }


def read_baseline(path: Path, values: Mapping[str, Any], llama_config: LlamaConfig) -> BaselineConfig:
    """Convert a file's entries to the adapter's configuration.

    Raises:
      InputError: If an entry is invalid, or the adapter is for a model of another shape.
    """
    known = ENTRIES_BY_TYPE[values["peft_type"]]
    entries = validate_entries(path, values, known)
    # PEFT stores the sizes of the model with a prefix; they must be those of this model.
    if entries["peft_type"] == PREFIX:
        heads, layers = llama_config.num_key_value_heads, llama_config.num_hidden_layers
        shape = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * llama_config.head_dim}
        for key, value in shape.items():
            if entries[key] not in (None, value):
                raise InputError(f"{path}: an adapter for another model: {key} must be {value}, got {entries[key]}")
        return PrefixConfig(entries["num_virtual_tokens"])
    config = BottleneckConfig(
        PLACEMENTS[entries["peft_type"]],  # type: ignore[arg-type]
        entries["bottleneck_size"],
        tuple(entries["target_modules"]),
        entries["adapter_dropout"],
    )
    # Resolve the modules once: a name that matches nothing is an error of this file.
    try:
        config.modules(llama_config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return config


def shapes(config: BaselineConfig, llama_config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the expected shape of every tensor by name."""
    layers = range(llama_config.num_hidden_layers)
    if isinstance(config, PrefixConfig):
        count, tokens, heads, width = config.shape(llama_config)
        return {TENSOR: (tokens, count * 2 * heads * width)}
    return {
        _name(layer, module, kind): shape
        for module in config.modules(llama_config)
        for kind, shape in config.shapes(module, llama_config).items()
        for layer in layers
    }


def assemble_baseline(config: BaselineConfig, tensors: Mapping[str, np.ndarray], llama_config: LlamaConfig) -> Baseline:
    """Construct an adapter from tensors with the shapes of `shapes`."""
    if isinstance(config, PrefixConfig):
        count, tokens, heads, width = config.shape(llama_config)
        # A row of PEFT's table holds the keys and values of all layers for one virtual token.
        pair = np.moveaxis(tensors[TENSOR].reshape(tokens, count, 2, heads, width), 0, 2)
        return PrefixAdapter({"key": jnp.asarray(pair[:, 0]), "value": jnp.asarray(pair[:, 1])}, config, llama_config)
    # Bottlenecks: stack the layers' matrices of each module, [layers, out, in].
    layers = range(llama_config.num_hidden_layers)
    params = {
        module: {
            kind: jnp.asarray(np.stack([tensors[_name(layer, module, kind)] for layer in layers]))
            for kind in config.shapes(module, llama_config)
        }
        for module in config.modules(llama_config)
    }
    return BottleneckAdapter(params, config)


def _name(layer: int, module: str, kind: str) -> str:
    return f"base_model.model.{full_name(layer, module)}.{kind}.weight"
