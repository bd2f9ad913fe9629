"""The model card of an adapter's folder, or of a model that one was merged into: `README.md` in the hub's format.

YAML entries come first, then what a reader asks first.

Format: https://huggingface.co/docs/hub/model-cards. The entries of an
adapter are those that PEFT writes, and the licence.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.adapters import peft_baselines, peft_config
from rora_theory.errors import InputError
from rora_theory.io.files import write_whole
from rora_theory.llama.hub import HUB_ID, Located
from rora_theory.runs import software
from rora_theory.scaling import scaling_factor

FILE = "README.md"
HERE = "THIS_FOLDER_OR_ITS_HUB_ID"
"""Stands for the folder in the lines that load it."""

FULL = "FULL"
"""``peft_type`` of what PEFT has not: weights that were themselves trained."""

_KINDS = {peft_config.LORA: "lora", peft_baselines.PREFIX: "prefix-tuning"}
"""What PEFT has."""


@dataclass(frozen=True)
class Trained:
    """What a card says of the run that an adapter, or a model, comes from.

    Attributes:
      rows: lines of a table, each with what it tells.
      datasets: hub ids of the data sets that it was trained on.
      license: as the hub names it; None is the base's, where its files say so.
    """

    rows: Sequence[tuple[str, str]] = ()
    datasets: Sequence[str] = ()
    license: str | None = None


def save(
    folder: Path,
    entries: Mapping[str, Any],
    base: str | Located | None,
    trained: Trained | None = None,
    *,
    merged: bool = False,
) -> None:
    """Write a folder's card, see `text`. Raises `InputError` where the disk does not take it."""
    write_whole(folder / FILE, text(entries, base, trained, merged=merged))


def text(
    entries: Mapping[str, Any], base: str | Located | None, trained: Trained | None = None, *, merged: bool = False
) -> str:
    """The model card of an adapter, or of the whole model that it is merged into.

    Args:
      entries: of `adapter_config.json`; of trained weights `FULL` and their modules, see `peft.entries_of`.
      base: where the base model was loaded from, or its name or path.
      trained: the run; None is not known.
      merged: whether the folder holds the whole model.
    """
    from huggingface_hub import ModelCardData

    trained = trained or Trained()
    repository = _repository(base)
    kind = "dora" if entries.get("use_dora") else _KINDS.get(entries["peft_type"], entries["peft_type"].lower())
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
    name = base.label if isinstance(base, Located) else base if isinstance(base, str) else ""
    name = repository or " ".join(name.split()) or "a model that was not named"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_title(entries, kind, name, merged=merged)}",
        _table([*_of_base(name, base), *_of_adapter(entries)]),
    ]
    if trained.rows:
        parts += ["## Training", _table(trained.rows)]
    own = software.versions().get("rora-theory", "of a source tree")
    loading = _loading_merged() if merged else _loading(entries, repository, base)
    parts += ["## How to load it", loading, f"Written by rora-theory {own}."]
    return "\n\n".join(parts) + "\n"


def _repository(base: str | Located | None) -> str | None:
    if isinstance(base, Located):
        return base.repository
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) and not os.path.exists(base) else None


def _read(base: str | Located | None, name: str) -> Any:
    """What a base's files say of themselves; None where they can't be asked any more: no reason to lose an adapter."""
    with contextlib.suppress(InputError):
        return getattr(base, name, None)
    return None


def _license(repository: str | None, known: str | None) -> dict[str, Any]:
    """The hub's licence entries: one that is known, else a reference to the base's, which binds an adapter of it."""
    if known or repository is None:
        return {"license": known or "unknown"}
    link = f"https://huggingface.co/{repository}"
    return {"license": "other", "license_name": "that-of-the-base-model", "license_link": link}


def _title(entries: Mapping[str, Any], kind: str, name: str, *, merged: bool) -> str:
    if entries["peft_type"] == FULL:
        return f"{name}, trained in full"
    what = f"{kind.replace('_', ' ').capitalize()} adapter"
    if entries["peft_type"] == peft_config.LORA:
        what = f"{'DoRA' if kind == 'dora' else 'LoRA'} adapter of rank {entries['r']}"
    return f"{name} with a {what} merged in" if merged else f"{what} for {name}"


def _of_base(name: str, base: str | Located | None) -> list[tuple[str, str]]:
    rows = [("base model", f"`{name}`")]
    if isinstance(base, Located):
        rows += [("its commit", f"`{base.commit}`")] if base.commit else []
        made = f" made from `{base.repository}`" if base.repository and not base.commit else ""
        rows += [("its weights", f"{stored}{made}")] if (stored := _read(base, "storage")) else []
        rows += [("their SHA-256", f"`{base.sha256}`")]
    return rows


def _of_adapter(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    modules = entries.get("target_modules")
    listed = [("modules", _code(modules))] if modules else []
    if entries["peft_type"] == FULL:
        return listed
    if entries["peft_type"] == peft_baselines.PREFIX:
        return [("virtual tokens", str(entries["num_virtual_tokens"]))]
    if entries["peft_type"] != peft_config.LORA:
        return [("bottleneck", str(entries["bottleneck_size"])), *listed]
    rank, alpha = entries["r"], entries["lora_alpha"]
    rule, form = ("rora", "alpha / sqrt(r)") if entries["use_rslora"] else ("lora", "alpha / r")
    gamma = scaling_factor(rule, alpha=alpha, rank=rank)  # type: ignore[arg-type]
    some = ", other modules by `rank_pattern` and `alpha_pattern`"
    more = some if entries.get("rank_pattern") or entries.get("alpha_pattern") else ""
    return [
        ("rank r", f"{rank}{more}"),
        ("alpha", f"{alpha:g}"),
        ("scaling gamma", f"{form} = {gamma:.6g} (`use_rslora` is {str(entries['use_rslora']).lower()})"),
        *listed,
    ]


def _loading(entries: Mapping[str, Any], repository: str | None, base: str | Located | None) -> str:
    if entries["peft_type"] not in _KINDS:
        return "PEFT has no such adapter: `rora_theory.adapters.load_peft` reads it."
    name = json.dumps(repository or (str(base.path) if isinstance(base, Located) else base) or "THE_BASE_MODEL")
    at = f", revision={json.dumps(entries['revision'])}" if entries.get("revision") else ""
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f"base = AutoModelForCausalLM.from_pretrained({name}{at})",
        f'model = PeftModel.from_pretrained(base, "{HERE}")',
    ]
    said = "```python\n" + "\n".join(lines) + "\n```"
    if (stored := _read(base, "storage")) and stored.quantised:
        said += "\n\nIt was trained beside quantised weights, so that beside others its outputs differ a little."
    return said


def _loading_merged() -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{HERE}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _code(modules: str | Sequence[str]) -> str:
    return ", ".join(f"`{one}`" for one in ([modules] if isinstance(modules, str) else modules))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {what} | {' '.join(value.split()).replace('|', '&#124;')} |" for what, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
