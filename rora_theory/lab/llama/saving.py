"""Saving of a checkpoint in memory as a folder that transformers and compatible programs open."""

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.loading import Model
from rora_theory.lab.llama.tokenizer import Tokenizer
from rora_theory.lab.llama.weights import save_hf


def save_model(folder: Path, model: Model) -> None:
    """Save a model: weights, configuration, tokenizer, chat template and generation settings.

    The tokenizer's files are copied from the model's folder; those of a GGUF file are made from its metadata. To save
    other weights with the same tokenizer, replace ``params`` (and ``config``) of the `Model`.

    Raises:
      InputError: The folder is not empty, or it cannot be written; see `weights.save_hf`.
    """
    if model.source.is_dir():
        save_hf(folder, model.params, model.config, tokenizer_from=model.source)
        return
    files = tokenizer_files(model.tokenizer, model.config)
    config = replace(model.config, eos_token_id=_id_or_ids(model.tokenizer.eos_ids))
    save_hf(folder, model.params, config, files=files)


def tokenizer_files(tokenizer: Tokenizer, config: LlamaConfig) -> dict[str, bytes]:
    """Return the files of a tokenizer as transformers saves them, and `generation_config.json`.

    Returns:
      The content of each file by its name.
    """
    backend = copy.copy(tokenizer.backend)
    backend.model_max_length = config.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        backend.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    # Every id that ends a text.
    eos_ids = _id_or_ids(tokenizer.eos_ids)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_ids, "pad_token_id": tokenizer.pad_id}
    text = json.dumps({name: value for name, value in generation.items() if value is not None}, indent=2)
    return files | {"generation_config.json": f"{text}\n".encode()}


def _id_or_ids(ids: tuple[int, ...]) -> int | tuple[int, ...] | None:
    """Return a single id as a number, as Hugging Face's files write it; None if there is none."""
    return ids if len(ids) > 1 else next(iter(ids), None)
