"""What a fine-tuning run leaves: the adapter, the whole model with it merged in, and a model card in each folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rora_theory import adapters
from rora_theory.adapters import card
from rora_theory.adapters.peft import entries_of
from rora_theory.adapters.peft_config import FILE, read_entries
from rora_theory.errors import InputError
from rora_theory.finetune.config import FinetuneConfig
from rora_theory.llama import Model
from rora_theory.runs.folder import RunFolder

ADAPTER, MERGED = "adapter", "merged"
"""Folders in a run's folder."""


@dataclass(frozen=True)
class OutputConfig:
    """What to write at the end."""

    keep: Literal["best", "last"] = "best"
    """which adapter to write at the end: best by validation loss (as published), or last"""
    license: str | None = None
    """licence in the model cards, as the hub names it; none is the base's, where its files say so. Given for a run that
    has ended, it is written to its cards"""
    merge: bool = False
    """write merged/ too: the model with the adapter (LoRA, RoRA or DoRA) added in, in Hugging Face layout; with method
    full it is all that is written"""
    serve_as: Literal["peft", "portable"] = "peft"
    """how to write adapter/: with all of PEFT's entries, or so that clients that know fewer compute the same too"""

    def check_training(self, training: FinetuneConfig) -> None:
        """Raise `InputError` where what is trained can't be written so."""
        method, mergeable = training.method, training.adapter().mergeable
        if self.merge and not mergeable:
            raise InputError(f"merge is True with method {method}; accepted are methods lora, dora, full")
        if self.serve_as == "portable" and method != "lora":
            what = "method lora, or serve_as peft with merge" if mergeable else "serve_as peft"
            raise InputError(f"serve_as is portable with method {method}; accepted is {what}")

    def check_several(self, training: FinetuneConfig, out: Path | None) -> None:
        """Raise `InputError` where several processes can't write so, each of which has to know the folder."""
        if out is None or self.merge or training.adapter().replaces:
            raise InputError(
                "several processes: accepted is --out, no --merge (one process can merge afterwards) and no method full"
            )


def write_outputs(folder: RunFolder, config: OutputConfig, kept: Any, model: Model, trained: card.Trained) -> None:
    """Write what is asked for and not there yet; of what is there the card, where another licence is given.

    Args:
      folder: the run's.
      config: what is asked for.
      kept: the adapter, or trained weights, as `Trainer.adapter` gives them.
      model: the base.
      trained: what the cards say of the run.

    Raises:
      InputError: a disk that does not take it.
    """
    if folder.entry("kept") != config.keep or (folder.entry("serve_as") or "peft") != config.serve_as:
        for name in (ADAPTER, MERGED):
            folder.clear(name)
        folder.update(kept=config.keep, serve_as=config.serve_as)

    def save_adapter(path: Path) -> None:
        portable = config.serve_as == "portable"
        adapters.save_peft(path, kept, base_model=model.origin, portable=portable, trained=trained)

    def save_model(path: Path) -> None:
        adapters.save_merged(path, kept, model, trained=trained)

    relicensed, replaces = config.license not in (None, folder.entry("license")), kept.config.replaces
    asked: dict[str, tuple[bool, Callable[[Path], None]]] = {
        ADAPTER: (not replaces, save_adapter),
        MERGED: (config.merge or replaces, save_model),
    }
    for name, (wanted, save) in asked.items():
        path = folder.path / name
        if folder.holds(name):
            if relicensed:
                entries = entries_of(kept, model.origin) if name == MERGED else read_entries(path / FILE)
                card.save(path, entries, model.origin, trained, merged=name == MERGED)
        elif wanted:
            folder.clear(name)
            save(path)
            folder.record(name)
    if relicensed:
        folder.update(license=config.license)
