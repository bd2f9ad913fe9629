"""Saving of a checkpoint in memory as a folder that transformers and compatible programs open."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rora_theory import extras
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.loading import Model
from rora_theory.lab.llama.tokenizer import Tokenizer
from rora_theory.lab.llama.weights import save_hf

try:
    import tokenizers
    from tokenizers.processors import TemplateProcessing
except ImportError as error:
    tokenizers = TemplateProcessing = extras.missing(error)  # type: ignore[misc]


def save_model(folder: Path, model: Model) -> None:
    """Save a model: weights, configuration, tokenizer, chat template and generation settings.

    The tokenizer's files are copied from the model's folder; those of a GGUF file are made from its metadata. To save
    other weights with the same tokenizer, replace ``params`` (and ``config``) of the `Model`.

    Args:
      folder: New or empty folder.
      model: Model to save.

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
    """Build `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

    The ids before and after every text become a template in `tokenizer.json`, which is where transformers looks for
    them.

    Args:
      tokenizer: Tokenizer to save.
      config: Configuration of its model.

    Returns:
      The content of each file by its name.
    """
    # tokenizer.json: a copy of the backend with the beginning and end of text as its post-processor.
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if special_tokens := {backend.id_to_token(token): token for token in (*tokenizer.prefix, *tokenizer.suffix)}:
        before, after = (list(map(backend.id_to_token, ids)) for ids in (tokenizer.prefix, tokenizer.suffix))
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=list(special_tokens.items()),
        )

    # tokenizer_config.json: special tokens by their texts, and the chat template.
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.prefix != (),
        "add_eos_token": tokenizer.suffix != (),
    }
    settings |= {f"{name}_token": backend.id_to_token(token) for name, token in ids.items() if token is not None}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template

    # generation_config.json: every id that ends a text.
    eos_ids = _id_or_ids(tokenizer.eos_ids)
    generation = {"bos_token_id": ids["bos"], "eos_token_id": eos_ids, "pad_token_id": ids["pad"]}
    texts = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "generation_config.json": json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2),
    }
    return {name: f"{text}\n".encode() for name, text in texts.items()}


def _id_or_ids(ids: tuple[int, ...]) -> int | tuple[int, ...] | None:
    """Return a single id as a number, as Hugging Face's files write it; None if there is none."""
    return ids if len(ids) > 1 else next(iter(ids), None)
