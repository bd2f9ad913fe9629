"""Adapters of LLaMA models: LoRA, RoRA, DoRA, prefix tuning, series, parallel, full fine-tuning; PEFT's file format."""

from rora_theory.lab.adapters.base import (
    AdaptedModule,
    AdapterConfig,
    TrainableAdapter,
    share,
)
from rora_theory.lab.adapters.bottleneck import BottleneckAdapter, BottleneckConfig
from rora_theory.lab.adapters.full import FullAdapter, FullConfig
from rora_theory.lab.adapters.lora import LoraAdapter, LoraConfig
from rora_theory.lab.adapters.merged import load_adapter, merged, save_merged
from rora_theory.lab.adapters.peft import adapter_digest, load_peft, rewrite_portable, save_peft
from rora_theory.lab.adapters.prefix import PrefixAdapter, PrefixConfig
from rora_theory.lab.adapters.whole import WholeModel, WholeModelConfig

__all__ = [
    "AdaptedModule",
    "AdapterConfig",
    "BottleneckAdapter",
    "BottleneckConfig",
    "FullAdapter",
    "FullConfig",
    "LoraAdapter",
    "LoraConfig",
    "PrefixAdapter",
    "PrefixConfig",
    "TrainableAdapter",
    "WholeModel",
    "WholeModelConfig",
    "adapter_digest",
    "load_adapter",
    "load_peft",
    "merged",
    "rewrite_portable",
    "save_merged",
    "save_peft",
    "share",
]
