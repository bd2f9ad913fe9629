"""A model by name: weights, configuration and tokenizer together."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from rora_theory.errors import InputError
from rora_theory.io.files import read_object
from rora_theory.llama.config import LlamaConfig, ignored_keys
from rora_theory.llama.hub import Located, locate
from rora_theory.llama.model import Params
from rora_theory.llama.quantised import check_quantization
from rora_theory.llama.tokenizer import Tokenizer
from rora_theory.llama.weights import check_dtype, load_hf, read_config, some


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint in memory.

    Attributes:
      params: weights, as `model` describes.
      config: theirs.
      tokenizer: theirs; its ``pad_id`` is None where it is no token of the model.
      origin: where it was read from.
      ignored: keys of its `config.json` that are not followed, see `config.ignored_keys`.
    """

    params: Params
    config: LlamaConfig
    tokenizer: Tokenizer
    origin: Located
    ignored: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Notes for whoever runs a command: terms of use, keys that are not followed."""
        remarks = [] if self.origin.terms is None else [self.origin.terms]
        if self.ignored:
            keys = some(self.ignored)
            remarks.append(f"{self.source / 'config.json'}: ignored, as the output does not depend on it: {keys}")
        return remarks

    @property
    def source(self) -> Path:
        """The folder or file it was read from."""
        return self.origin.path


def load(
    path_or_repo: str | Path | Located,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    shardings: Params | None = None,
    quantization: str = "none",
) -> Model:
    """Load a model.

    Args:
      path_or_repo: a folder in Hugging Face layout, a ``.gguf`` file, a hub id, ``"smollm2-135m"`` or
        ``"gemma3-270m"`` (under the Gemma Terms of Use, https://ai.google.dev/gemma/terms); or what `hub.locate` found
        for one, to read the very files that were found then.
      dtype: of the weights in memory: float32, bfloat16 or float16.
      revision: of a hub id.
      shardings: a tree of shardings like the weights'; None puts them on the default device.
      quantization: how the weights of linear modules are held, one of `quantised.QUANTIZATIONS`. ``q8_0``, ``q4_0`` and
        ``q4_1`` are blocks of 32 weights, made dense where they are multiplied: those of a GGUF file of that type as
        they are, else made of the weights as llama.cpp does.

    Raises:
      InputError: nothing there, pickled, truncated, or not a model that is supported; see `hub.locate`,
        `weights.load_hf` and `gguf_file.load_gguf`.

    Examples:
      >>> model = load("smollm2-135m")  # doctest: +SKIP
      >>> tokens = jnp.array([model.tokenizer.encode("The sky")])  # doctest: +SKIP
      >>> llama.forward(model.params, tokens, model.config).shape  # doctest: +SKIP
      (1, 2, 49152)
    """
    check_dtype(dtype)
    check_quantization(quantization)
    origin = path_or_repo if isinstance(path_or_repo, Located) else locate(path_or_repo, revision)
    source, config, tokenizer = origin.path, model_config(origin), model_tokenizer(origin)
    ignored: tuple[str, ...] = ()
    if source.is_dir():
        ignored = ignored_keys(read_object(source / "config.json"))
        params = load_hf(source, config, dtype, shardings, quantization)
    else:
        from rora_theory.llama.gguf_file import load_gguf, open_gguf

        params = load_gguf(open_gguf(source), source, config, dtype, shardings, quantization)
    return Model(params, config, tokenizer, origin, ignored)


def model_config(found: Located) -> LlamaConfig:
    """The configuration of a model, without its weights. Raises `InputError` as `load`."""
    from rora_theory.llama.gguf_file import config_from_gguf, open_gguf

    source = found.path
    return read_config(source) if source.is_dir() else config_from_gguf(open_gguf(source), str(source))


def model_tokenizer(found: Located) -> Tokenizer:
    """The tokenizer of a model, without its weights. Raises `InputError` as `load`."""
    from rora_theory.llama.gguf_file import open_gguf

    source, rows = found.path, model_config(found).vocab_size
    if source.is_dir():
        return fitted(Tokenizer.from_folder(source), rows)
    return fitted(Tokenizer.from_gguf(open_gguf(source), str(source)), rows)


def fitted(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer as it is used with a model of ``rows`` embeddings.

    Tokens that were added to a tokenizer alone, such as one for padding, have no embedding: they are no special tokens
    of the model, and a text that has one is refused.

    Raises:
      InputError: the vocabulary itself is larger than the model's, or a token that begins or ends texts is beyond it:
        another model's tokenizer.
    """
    accepted = f"the model has {rows} embeddings: accepted is the model's own tokenizer"
    for name, ids in (("begins", [tokenizer.bos_id]), ("ends", tokenizer.eos_ids)):
        for one in ids:
            if one is not None and one >= rows:
                raise InputError(f"{tokenizer.where}: the token that {name} a text has id {one}; {accepted}")
    if tokenizer.vocab_size > rows:
        own = max(tokenizer.backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        if own > rows:
            raise InputError(f"{tokenizer.where}: the tokenizer has {own} tokens; {accepted}")
        tokenizer = replace(tokenizer, rows=rows)

    def there(one: int | None) -> int | None:
        return one if one is not None and 0 <= one < rows else None

    return replace(tokenizer, pad_id=there(tokenizer.pad_id), unk_id=there(tokenizer.unk_id))
