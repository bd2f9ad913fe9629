"""Models with an adapter merged into their weights."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rora_theory.lab.adapters import card
from rora_theory.lab.adapters.base import TrainableAdapter
from rora_theory.lab.adapters.peft import BASE_MODEL_DIGEST, entries_of, load_peft, read_adapter_metadata
from rora_theory.lab.llama.loading import Model
from rora_theory.lab.llama.saving import save_model
from rora_theory.runs.files import write_whole

logger = logging.getLogger(__name__)


def merged(adapter: TrainableAdapter, model: Model) -> Model:
    """Return the model with the adapter merged into its weights.

    Raises:
      InputError: If the adapter cannot be merged (prefix, series, parallel).
    """
    return replace(model, params=adapter.merge(model.params))


def load_adapter(folder: str | os.PathLike[str], model: Model) -> Any:
    """Load an adapter of a model. An adapter that was trained on another base model logs a warning.

    A GGUF file and a folder that was converted from it differ, too: the digests are those of files.

    Args:
      folder: Folder of the adapter.
      model: Base model.

    Raises:
      InputError: If `load_peft` rejects the adapter.
    """
    adapter, origin = load_peft(folder, model.config), model.origin
    trained_on = read_adapter_metadata(folder).get(BASE_MODEL_DIGEST)
    if trained_on is not None and trained_on != origin.sha256:
        logger.warning(
            f"{folder}: was trained on a base model with SHA-256 {trained_on[:12]}, got {origin.label} with "
            f"{origin.sha256[:12]}. Pass the base model of the training, unless both have the same weights."
        )
    return adapter


def save_merged(folder: str | os.PathLike[str], adapter: TrainableAdapter, model: Model) -> None:
    """Save the merged model with its tokenizer and its model card in Hugging Face format.

    Args:
      folder: Folder to write to, created if it does not exist.
      adapter: Adapter to merge.
      model: Base model.

    Raises:
      InputError: If the adapter cannot be merged, or a file cannot be written.
    """
    save_model(Path(folder), merged(adapter, model))
    text = card.text(entries_of(adapter, model.origin), model.origin, merged=True)
    write_whole(Path(folder) / card.FILE, text)
