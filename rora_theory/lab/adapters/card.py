"""Model cards of adapters and merged models: `README.md` in the format of the Hugging Face hub.

A card has a YAML header with the entries that PEFT writes and the licence, and a body for readers.

References:
  https://huggingface.co/docs/hub/model-cards
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.advice.adapter_config import LORA
from rora_theory.errors import InputError
from rora_theory.lab.adapters import peft_baselines
from rora_theory.lab.llama.hub import HUB_ID, ModelSource
from rora_theory.runs import software
from rora_theory.runs.files import write_whole
from rora_theory.scaling import scaling_factor

FILE = "README.md"
FOLDER_PLACEHOLDER = "THIS_FOLDER_OR_ITS_HUB_ID"
"""Stands for the folder in the code that loads it; readers of the card replace it."""

FULL = "FULL"
"""``peft_type`` of full fine-tuning, which PEFT does not have."""

_KINDS = {LORA: "lora", peft_baselines.PREFIX: "prefix-tuning"}
"""Tags of the adapters that PEFT supports, by ``peft_type``."""


@dataclass(frozen=True)
class TrainingDescription:
    """Description of a training run in a model card.

    Attributes:
      rows: Rows of a table, each a label and its value.
      datasets: Hub ids of the training data sets.
      license: Licence identifier of the hub; None uses that of the base model, if its files state it.
    """

    rows: Sequence[tuple[str, str]] = ()
    datasets: Sequence[str] = ()
    license: str | None = None


def save(
    folder: Path,
    entries: Mapping[str, Any],
    base: str | ModelSource | None,
    trained: TrainingDescription | None = None,
    *,
    merged: bool = False,
) -> None:
    """Write the model card of a folder.

    Args:
      folder: Folder of the adapter or the model.
      entries: Entries of the adapter's configuration, see `text`.
      base: Location, name or path of the base model.
      trained: Description of the training run, or None.
      merged: Whether the folder contains the merged model.

    Raises:
      InputError: If the file cannot be written.
    """
    write_whole(folder / FILE, text(entries, base, trained, merged=merged))


def text(
    entries: Mapping[str, Any],
    base: str | ModelSource | None,
    trained: TrainingDescription | None = None,
    *,
    merged: bool = False,
) -> str:
    """Return the model card of an adapter or of a merged model.

    Args:
      entries: Entries of `adapter_config.json`, or for full fine-tuning those of `peft.entries_of`.
      base: Location, name or path of the base model.
      trained: Description of the training run, or None if unknown.
      merged: Whether the folder contains the merged model.
    """
    from huggingface_hub import ModelCardData

    # YAML header.
    trained = trained or TrainingDescription()
    repository = _repository(base)
    kind = "dora" if entries.get("use_dora") else _KINDS.get(entries["peft_type"], entries["peft_type"].lower())
    # Tags by which the hub links the adapter to its base.
    tags = [f"base_model:{'finetune' if merged else 'adapter'}:{repository}"] if repository else []
    tags += [kind, *(["rslora"] if entries.get("use_rslora") else []), "rora-theory"]
    data = ModelCardData(
        base_model=repository,
        library_name="transformers" if merged else "peft" if entries["peft_type"] in _KINDS else None,
        pipeline_tag="text-generation",
        datasets=list(trained.datasets) or None,
        tags=tags,
        **_license(repository, trained.license or _read(base, "license")),
    )
    # Title, tables and code that loads the folder.
    name = base.label if isinstance(base, ModelSource) else base if isinstance(base, str) else ""
    name = repository or " ".join(name.split()) or "an unnamed model"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_title(entries, kind, name, merged=merged)}",
        _table([*_base_rows(name, base), *_adapter_rows(entries)]),
    ]
    if trained.rows:
        sections += ["## Training", _table(trained.rows)]
    version = software.versions().get("rora-theory", "of a source tree")
    loading = _loading_merged() if merged else _loading(entries, repository, base)
    sections += ["## How to load it", loading, f"Written by rora-theory {version}."]
    return "\n\n".join(sections) + "\n"


def _repository(base: str | ModelSource | None) -> str | None:
    if isinstance(base, ModelSource):
        return base.repository
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) and not os.path.exists(base) else None


def _read(base: str | ModelSource | None, name: str) -> Any:
    """Return an attribute read from the base model's files, or None if they no longer exist.

    Missing files of the base are no reason to fail to save an adapter.
    """
    with contextlib.suppress(InputError):
        return getattr(base, name, None)
    return None


def _license(repository: str | None, known: str | None) -> dict[str, Any]:
    """Return the hub's licence entries: the known licence, or a reference to the base's, which applies to adapters."""
    if known or repository is None:
        return {"license": known or "unknown"}
    link = f"https://huggingface.co/{repository}"
    return {"license": "other", "license_name": "that-of-the-base-model", "license_link": link}


def _title(entries: Mapping[str, Any], kind: str, name: str, *, merged: bool) -> str:
    if entries["peft_type"] == FULL:
        return f"{name}, fully fine-tuned"
    adapter = f"{kind.replace('_', ' ').capitalize()} adapter"
    if entries["peft_type"] == LORA:
        adapter = f"{'DoRA' if kind == 'dora' else 'LoRA'} adapter of rank {entries['r']}"
    return f"{name} with a {adapter} merged in" if merged else f"{adapter} for {name}"


def _base_rows(name: str, base: str | ModelSource | None) -> list[tuple[str, str]]:
    rows = [("base model", f"`{name}`")]
    if isinstance(base, ModelSource):
        rows += [("base model commit", f"`{base.commit}`")] if base.commit else []
        origin = f" made from `{base.repository}`" if base.repository and not base.commit else ""
        rows += [("base model weights", f"{storage}{origin}")] if (storage := _read(base, "storage")) else []
        rows += [("base model SHA-256", f"`{base.sha256}`")]
    return rows


def _adapter_rows(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    modules = entries.get("target_modules")
    module_rows = [("modules", _code(modules))] if modules else []
    # Methods without a rank list their own size.
    if entries["peft_type"] == FULL:
        return module_rows
    if entries["peft_type"] == peft_baselines.PREFIX:
        return [("virtual tokens", str(entries["num_virtual_tokens"]))]
    if entries["peft_type"] != LORA:
        return [("bottleneck", str(entries["bottleneck_size"])), *module_rows]
    # Common rank, alpha and rule; single modules may have others by the patterns.
    rank, alpha = entries["r"], entries["lora_alpha"]
    rule, form = ("rora", "alpha / sqrt(r)") if entries["use_rslora"] else ("lora", "alpha / r")
    gamma = scaling_factor(rule, alpha=alpha, rank=rank)  # type: ignore[arg-type]
    has_pattern = entries.get("rank_pattern") or entries.get("alpha_pattern")
    note = "; some modules differ, see `rank_pattern` and `alpha_pattern`" if has_pattern else ""
    return [
        ("rank r", f"{rank}{note}"),
        ("alpha", f"{alpha:g}"),
        ("scaling gamma", f"{form} = {gamma:.6g} (`use_rslora` is {str(entries['use_rslora']).lower()})"),
        *module_rows,
    ]


def _loading(entries: Mapping[str, Any], repository: str | None, base: str | ModelSource | None) -> str:
    if entries["peft_type"] not in _KINDS:
        return "PEFT does not support this kind of adapter. Load it with `rora_theory.lab.adapters.load_peft`."
    # Names are quoted as JSON, because they may contain any character.
    name = json.dumps(repository or (str(base.path) if isinstance(base, ModelSource) else base) or "THE_BASE_MODEL")
    revision = f", revision={json.dumps(entries['revision'])}" if entries.get("revision") else ""
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f"base = AutoModelForCausalLM.from_pretrained({name}{revision})",
        f'model = PeftModel.from_pretrained(base, "{FOLDER_PLACEHOLDER}")',
    ]
    loading = "```python\n" + "\n".join(lines) + "\n```"
    if (storage := _read(base, "storage")) and storage.quantised:
        loading += "\n\nThe adapter was trained on quantised weights. On other weights its outputs differ slightly."
    return loading


def _loading_merged() -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{FOLDER_PLACEHOLDER}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER_PLACEHOLDER}")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _code(modules: str | Sequence[str]) -> str:
    return ", ".join(f"`{module}`" for module in ([modules] if isinstance(modules, str) else modules))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {label} | {' '.join(value.split()).replace('|', '&#124;')} |" for label, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
