"""Model cards of adapters and merged models: `README.md` with the entries by which the Hugging Face hub lists them.

References:
  https://huggingface.co/docs/hub/model-cards
"""

import os
from collections.abc import Mapping
from typing import Any

from rora_theory.advice.adapter_config import LORA
from rora_theory.lab.adapters import peft_baselines
from rora_theory.lab.llama.hub import HUB_ID, ModelSource

FILE = "README.md"

FULL = "FULL"
"""``peft_type`` of full fine-tuning, which PEFT does not have."""

_KINDS = {LORA: "lora", peft_baselines.PREFIX: "prefix-tuning"}
"""Tags of the adapters that PEFT supports, by ``peft_type``."""


def text(entries: Mapping[str, Any], base: str | ModelSource | None, *, merged: bool = False) -> str:
    """Return the model card of an adapter or of a merged model.

    Args:
      entries: Entries of `adapter_config.json`, or for full fine-tuning those of `peft.entries_of`.
      base: Location, name or path of the base model.
      merged: Whether the folder contains the merged model.
    """
    from huggingface_hub import ModelCardData

    repository = _repository(base)
    kind = "dora" if entries.get("use_dora") else _KINDS.get(entries["peft_type"], entries["peft_type"].lower())
    # Tags by which the hub links the adapter to its base.
    tags = [f"base_model:{'finetune' if merged else 'adapter'}:{repository}"] if repository else []
    tags += [kind, *(["rslora"] if entries.get("use_rslora") else []), "rora-theory"]
    data = ModelCardData(
        base_model=repository,
        library_name="transformers" if merged else "peft" if entries["peft_type"] in _KINDS else None,
        pipeline_tag="text-generation",
        tags=tags,
    )
    title = f"{repository or 'A model'} {'fine-tuned' if merged else 'with an adapter'} ({kind})"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n"


def _repository(base: str | ModelSource | None) -> str | None:
    if isinstance(base, ModelSource):
        return base.repository
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) and not os.path.exists(base) else None
