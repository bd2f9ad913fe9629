"""A model with an adapter in its weights, written as any other."""

import os
from dataclasses import replace
from pathlib import Path

from rora_theory.adapters.base import TrainableAdapter, merge
from rora_theory.llama.loading import Model
from rora_theory.llama.saving import save_model


def merged(adapter: TrainableAdapter, model: Model) -> Model:
    """The model with the adapter added into its weights.

    Raises:
      InputError: an adapter that can't be merged (prefix, series, parallel).
    """
    return replace(model, params=merge(adapter, model.params))


def save_merged(folder: str | os.PathLike[str], adapter: TrainableAdapter, model: Model) -> None:
    """Write the model with the adapter added in, and its tokenizer, in Hugging Face layout.

    Raises:
      InputError: as `merged`, or as `llama.weights.save_hf`.
    """
    save_model(Path(folder), merged(adapter, model))
