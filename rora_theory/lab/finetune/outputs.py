"""Outputs of a fine-tuning run: the adapter and the merged model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.llama import Model
from rora_theory.runs.folder import RunFolder

ADAPTER, MERGED = "adapter", "merged"
"""Names of the output folders in a run's folder."""


@dataclass(frozen=True)
class OutputConfig:
    """Outputs to write at the end of a run."""

    keep: Literal["best", "last"] = "best"
    """Adapter to write at the end: best by validation loss (as published), or last"""
    merge: bool = False
    """Also write merged/, the model with the adapter (LoRA, RoRA or DoRA) merged in, in Hugging Face format; with
    method full it is the only output"""
    serve_as: Literal["peft", "portable"] = "peft"
    """Format of adapter/: peft (all entries of PEFT) or portable (also for clients that read fewer entries)"""

    def check_training(self, training: FinetuneConfig) -> None:
        """Raise `InputError` if the trained adapter cannot be written with these settings."""
        method, mergeable = training.method, training.adapter().mergeable
        if self.merge and not mergeable:
            raise InputError(f"merge requires method lora, dora or full, got {method}")
        if self.serve_as == "portable" and method != "lora":
            alternative = "serve_as peft with merge" if mergeable else "serve_as peft"
            raise InputError(f"serve_as portable requires method lora, got {method}. Use {alternative} instead.")

    def check_several_processes(self, training: FinetuneConfig, out: Path | None) -> None:
        """Raise `InputError` if several processes cannot write these outputs."""
        # Without out, each process would name its own folder.
        if out is None or self.merge or training.adapter().replaces_weights:
            raise InputError(
                "several processes require out and support neither merge nor method full. Merge afterwards in a "
                "single process."
            )


def write_outputs(folder: RunFolder, config: OutputConfig, adapter: Any, model: Model) -> None:
    """Write the outputs that do not exist yet.

    Raises:
      InputError: If a file cannot be written.
    """
    # Another choice of adapter or format invalidates the existing outputs.
    if folder.entry("kept") != config.keep or (folder.entry("serve_as") or "peft") != config.serve_as:
        for name in (ADAPTER, MERGED):
            folder.clear(name)
        folder.update(kept=config.keep, serve_as=config.serve_as)

    def save_adapter(path: Path) -> None:
        portable = config.serve_as == "portable"
        adapters.save_peft(path, adapter, base_model=model.origin, portable=portable)

    def save_model(path: Path) -> None:
        adapters.save_merged(path, adapter, model)

    replaces = adapter.config.replaces_weights
    # Weights that replace the base's have no adapter file, so they are always saved as a whole model.
    outputs: dict[str, tuple[bool, Callable[[Path], None]]] = {
        ADAPTER: (not replaces, save_adapter),
        MERGED: (config.merge or replaces, save_model),
    }
    for name, (is_requested, save) in outputs.items():
        if is_requested and not folder.has_files(name):
            folder.clear(name)
            save(folder.path / name)
            folder.record_files(name)
