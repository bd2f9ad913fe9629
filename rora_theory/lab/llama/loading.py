"""Loading of a model by name: weights, configuration and tokenizer together."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from rora_theory.errors import InputError
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.hub import ModelSource, locate
from rora_theory.lab.llama.model import Params
from rora_theory.lab.llama.quantised import QUANTIZATIONS
from rora_theory.lab.llama.tokenizer import Tokenizer
from rora_theory.lab.llama.weights import load_hf, parse_dtype, read_config
from rora_theory.scaling import check_choice


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint in memory.

    Attributes:
      params: Weights, in the tree that `model` describes.
      config: Configuration of the model.
      tokenizer: Tokenizer of the model. Its ``pad_id`` is None if the model has no embedding for that token.
      origin: Source of the files.
    """

    params: Params
    config: LlamaConfig
    tokenizer: Tokenizer
    origin: ModelSource

    @property
    def source(self) -> Path:
        """Folder or file that the model was loaded from."""
        return self.origin.path


def load(
    path_or_repo: str | Path | ModelSource,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    shardings: Params | None = None,
    quantization: str = "none",
) -> Model:
    """Load a model.

    Args:
      path_or_repo: Folder in Hugging Face layout, ``.gguf`` file, hub id, ``"smollm2-135m"`` or ``"gemma3-270m"``
        (under the Gemma Terms of Use, https://ai.google.dev/gemma/terms). A result of `hub.locate` loads the very files
        that it located.
      dtype: Type of the weights in memory: float32, bfloat16 or float16.
      revision: Branch, tag or commit of a hub id; None is ``main``.
      shardings: Tree of shardings with the structure of the weights; None puts them on the default device.
      quantization: Storage of the linear modules' weights in memory, one of `quantised.QUANTIZATIONS`. ``q8_0``,
        ``q4_0`` and ``q4_1`` are blocks of 32 weights that become dense where they are multiplied. A GGUF file's blocks
        of that type are kept as they are; other weights are quantised as llama.cpp does.

    Raises:
      InputError: There is no such model, its weights are pickled or truncated, or it is not supported; see
        `hub.locate`, `weights.load_hf` and `gguf_file.load_gguf`.

    Examples:
      >>> model = load("smollm2-135m")  # doctest: +SKIP
      >>> tokens = jnp.array([model.tokenizer.encode("The sky")])  # doctest: +SKIP
      >>> llama.forward(model.params, tokens, model.config).shape  # doctest: +SKIP
      (1, 2, 49152)
    """
    parse_dtype(dtype)
    check_choice("quantization", quantization, QUANTIZATIONS)
    origin = path_or_repo if isinstance(path_or_repo, ModelSource) else locate(path_or_repo, revision)
    # The small files first: a model that is not supported fails before its weights are read.
    source, config = origin.path, model_config(origin)
    tokenizer = model_tokenizer(origin, config.vocab_size)
    if source.is_dir():
        params = load_hf(source, config, dtype, shardings, quantization)
    else:
        from rora_theory.lab.llama.gguf_file import load_gguf, open_gguf

        params = load_gguf(open_gguf(source), source, config, dtype, shardings, quantization)
    return Model(params, config, tokenizer, origin)


def model_config(origin: ModelSource) -> LlamaConfig:
    """Read the configuration of a model without its weights; raises `InputError` like `load`."""
    from rora_theory.lab.llama.gguf_file import config_from_gguf, open_gguf

    source = origin.path
    return read_config(source) if source.is_dir() else config_from_gguf(open_gguf(source), str(source))


def model_tokenizer(origin: ModelSource, embedding_rows: int) -> Tokenizer:
    """Read the tokenizer of a model without its weights; raises `InputError` like `load`.

    Args:
      origin: Files of the model.
      embedding_rows: Number of embeddings of the model, see `restrict_to_embeddings`.
    """
    source = origin.path
    tokenizer = Tokenizer.from_folder(source) if source.is_dir() else Tokenizer.from_gguf(source)
    return restrict_to_embeddings(tokenizer, embedding_rows)


def restrict_to_embeddings(tokenizer: Tokenizer, embedding_rows: int) -> Tokenizer:
    """Return the tokenizer of a model, which refuses texts with tokens that the model has no embedding for.

    Args:
      tokenizer: Tokenizer from the model's files.
      embedding_rows: Number of embeddings of the model.

    Raises:
      InputError: The vocabulary without added tokens is larger than the model's, or a beginning or end token lies
        beyond it: the tokenizer belongs to another model.
    """
    # Beginning and end tokens cannot be dropped, because texts need them.
    remedy = f"but the model has {embedding_rows} embeddings. Use the model's own tokenizer."
    for role, ids in (("beginning", [tokenizer.bos_id]), ("end", [tokenizer.eos_id, *tokenizer.eos_ids])):
        for token_id in ids:
            if token_id is not None and token_id >= embedding_rows:
                raise InputError(f"{tokenizer.source}: the {role}-of-text token has id {token_id}, {remedy}")
    # Added tokens, such as one for padding, may lie beyond the embeddings. The vocabulary proper may not.
    added_ids = tokenizer.backend.added_tokens_decoder.keys()
    vocabulary_size = max((i for i in tokenizer.backend.get_vocab().values() if i not in added_ids), default=-1) + 1
    if vocabulary_size > embedding_rows:
        raise InputError(f"{tokenizer.source}: the tokenizer has {vocabulary_size} tokens, {remedy}")
    return replace(tokenizer, embedding_rows=embedding_rows)
