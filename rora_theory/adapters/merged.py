"""Models with an adapter merged into their weights."""

import os
from dataclasses import replace
from pathlib import Path

from rora_theory.adapters import card
from rora_theory.adapters.base import TrainableAdapter, merge
from rora_theory.adapters.peft import entries_of, load_peft
from rora_theory.llama.loading import Model
from rora_theory.llama.saving import save_model


def merged(adapter: TrainableAdapter, model: Model) -> Model:
    """Return the model with the adapter merged into its weights.

    Raises:
      InputError: If the adapter cannot be merged (prefix, series, parallel).
    """
    return replace(model, params=merge(adapter, model.params))


def load_with_adapter(
    folder: str | os.PathLike[str], model: Model, *, merge: bool = True
) -> tuple[Model, TrainableAdapter | None]:
    """Load an adapter, and merge it into the model if possible.

    Args:
      folder: Folder of the adapter.
      model: Base model.
      merge: Whether to merge the adapter if it is mergeable.

    Returns:
      The model, and the adapter if it is not merged into the model.

    Raises:
      InputError: If `load_peft` rejects the adapter.
    """
    adapter = load_peft(folder, model.config, model.params)
    return (merged(adapter, model), None) if merge and adapter.config.mergeable else (model, adapter)


def save_merged(
    folder: str | os.PathLike[str],
    adapter: TrainableAdapter,
    model: Model,
    *,
    trained: card.TrainingDescription | None = None,
) -> None:
    """Save the merged model with its tokenizer and its model card in Hugging Face format.

    Args:
      folder: Folder to write to, created if it does not exist.
      adapter: Adapter to merge.
      model: Base model.
      trained: Description of the training run for the model card; None omits it.

    Raises:
      InputError: If the adapter cannot be merged, or a file cannot be written.
    """
    save_model(Path(folder), merged(adapter, model))
    card.save(Path(folder), entries_of(adapter, model.origin), model.origin, trained, merged=True)
