"""A model by name: weights, configuration and tokenizer together."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.hub import Located, locate
from rora_theory.llama.model import Params
from rora_theory.llama.tokenizer import Tokenizer
from rora_theory.llama.weights import check_dtype, load_hf, read_config


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint in memory.

    Attributes:
      params: weights, as `model` describes.
      config: theirs.
      tokenizer: theirs; its ``pad_id`` is None where it is no token of the model.
      origin: where it was read from.
    """

    params: Params
    config: LlamaConfig
    tokenizer: Tokenizer
    origin: Located

    @property
    def source(self) -> Path:
        """The folder or file it was read from."""
        return self.origin.path


def load(
    path_or_repo: str | Path | Located,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    shardings: Params | None = None,
) -> Model:
    """Load a model.

    Args:
      path_or_repo: a folder in Hugging Face layout, a ``.gguf`` file, a hub id, or ``"smollm2-135m"``; or what
        `hub.locate` found for one, to read the very files that were found then.
      dtype: of the weights in memory: float32, bfloat16 or float16.
      revision: of a hub id.
      shardings: a tree of shardings like the weights'; None puts them on the default device.

    Raises:
      InputError: nothing there, pickled, truncated, or not a model that is supported; see `hub.locate`,
        `weights.load_hf` and `gguf_file.load_gguf`.

    Example:
      >>> model = load("smollm2-135m")  # doctest: +SKIP
      >>> tokens = jnp.array([model.tokenizer.encode("The sky")])  # doctest: +SKIP
      >>> llama.forward(model.params, tokens, model.config).shape  # doctest: +SKIP
      (1, 2, 49152)
    """
    check_dtype(dtype)
    origin = path_or_repo if isinstance(path_or_repo, Located) else locate(path_or_repo, revision)
    source = origin.path
    if source.is_dir():
        config = read_config(source)
        tokenizer = Tokenizer.from_folder(source)
        params = load_hf(source, config, dtype, shardings)
    else:
        from rora_theory.llama.gguf_file import config_from_gguf, load_gguf, open_gguf

        reader = open_gguf(source)
        config = config_from_gguf(reader, str(source))
        tokenizer = Tokenizer.from_gguf(reader)
        params = load_gguf(reader, source, config, dtype, shardings)
    if tokenizer.pad_id is not None and tokenizer.pad_id >= config.vocab_size:
        tokenizer = replace(tokenizer, pad_id=None)  # added to the tokenizer alone: the model has no embedding for it
    return Model(params, config, tokenizer, origin)
