"""Low-rank adapters of LLaMA models: LoRA, RoRA and DoRA, and PEFT's file format."""

from rora_theory.adapters.base import (
    AdapterConfig,
    Row,
    TrainableAdapter,
    count,
    init,
    merge,
    replace,
    table,
    trainable,
    unmerge,
)
from rora_theory.adapters.lora import LoraAdapter, LoraConfig, norms
from rora_theory.adapters.peft import load_peft, save_peft

__all__ = [
    "AdapterConfig",
    "LoraAdapter",
    "LoraConfig",
    "Row",
    "TrainableAdapter",
    "count",
    "init",
    "load_peft",
    "merge",
    "norms",
    "replace",
    "save_peft",
    "table",
    "trainable",
    "unmerge",
]
