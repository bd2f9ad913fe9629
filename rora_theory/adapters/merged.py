"""A model with an adapter in its weights, written as any other."""

import os
from dataclasses import replace
from pathlib import Path

from rora_theory.adapters import card
from rora_theory.adapters.base import TrainableAdapter, merge
from rora_theory.adapters.peft import entries_of, load_peft
from rora_theory.llama.loading import Model
from rora_theory.llama.saving import save_model


def merged(adapter: TrainableAdapter, model: Model) -> Model:
    """The model with the adapter added into its weights.

    Raises:
      InputError: an adapter that can't be merged (prefix, series, parallel).
    """
    return replace(model, params=merge(adapter, model.params))


def with_adapter(
    folder: str | os.PathLike[str], model: Model, *, merge: bool = True
) -> tuple[Model, TrainableAdapter | None]:
    """The model with the adapter of a folder in its weights; beside it where it can't be there, or not ``merge``.

    Raises:
      InputError: as `load_peft`.
    """
    adapter = load_peft(folder, model.config, model.params)
    return (merged(adapter, model), None) if merge and adapter.config.mergeable else (model, adapter)


def save_merged(
    folder: str | os.PathLike[str], adapter: TrainableAdapter, model: Model, *, trained: card.Trained | None = None
) -> None:
    """Write the model with the adapter added in, its tokenizer and its model card, in Hugging Face layout.

    Args:
      folder: made where it is missing.
      adapter, model: of `merged`.
      trained: what the model card says of the run; None is nothing.

    Raises:
      InputError: as `merged`, or as `llama.weights.save_hf`.
    """
    save_model(Path(folder), merged(adapter, model))
    card.save(Path(folder), entries_of(adapter, model.origin), model.origin, trained, merged=True)
