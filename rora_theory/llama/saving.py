"""A checkpoint in memory written as a folder that transformers, and whatever reads its layout, opens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rora_theory import extras
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.loading import Model
from rora_theory.llama.tokenizer import Tokenizer
from rora_theory.llama.weights import save_hf

try:
    import tokenizers
    from tokenizers.processors import TemplateProcessing
except ImportError as error:
    tokenizers = TemplateProcessing = extras.missing(error)  # type: ignore[misc]


def save_model(folder: Path, model: Model) -> None:
    """Write a model: weights, configuration, tokenizer, chat template, generation settings.

    A folder's own tokenizer files are copied; those of a model that came as a GGUF file are made from its metadata. To
    write other weights under the same tokenizer, replace ``params`` (and ``config``) of the `Model`.

    Raises:
      InputError: as `weights.save_hf`.
    """
    if model.source.is_dir():
        save_hf(folder, model.params, model.config, tokenizer_from=model.source)
        return
    files = tokenizer_files(model.tokenizer, model.config)
    config = replace(model.config, eos_token_id=_one_or_all(model.tokenizer.eos_ids))
    save_hf(folder, model.params, config, files=files)


def tokenizer_files(tokenizer: Tokenizer, config: LlamaConfig) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of a tokenizer, by their names.

    What the tokenizer puts before and after a text becomes a template in `tokenizer.json`, which is where
    transformers looks for it.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if around := {backend.id_to_token(token): token for token in (*tokenizer.prefix, *tokenizer.suffix)}:
        before, after = (list(map(backend.id_to_token, part)) for part in (tokenizer.prefix, tokenizer.suffix))
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=list(around.items()),
        )
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.prefix != (),
        "add_eos_token": tokenizer.suffix != (),
    }
    settings |= {f"{name}_token": backend.id_to_token(one) for name, one in ids.items() if one is not None}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    ends = _one_or_all(tokenizer.eos_ids)
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ends, "pad_token_id": ids["pad"]}
    texts = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "generation_config.json": json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2),
    }
    return {name: f"{text}\n".encode() for name, text in texts.items()}


def _one_or_all(ids: tuple[int, ...]) -> int | tuple[int, ...] | None:
    return ids if len(ids) > 1 else next(iter(ids), None)
