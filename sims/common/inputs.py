"""Read the records and the model of a measurement: any causal language model that transformers loads."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, first_line, is_out_of_memory
from rora_theory.lab import llama
from rora_theory.lab.data import records as training_records
from rora_theory.lab.data.batches import Examples, tokenize
from rora_theory.lab.data.formats import AnyRecord, TrainTemplate
from rora_theory.lab.data.records import DataConfig, RecordSet
from sims.common import cli, prompts
from sims.common.progress import progress_bar


@dataclass(frozen=True)
class ModelInputs:
    """Records and the model that reads them. The weights are loaded when `model` is first used.

    Attributes:
      records: Records that were read.
      template: Template of the prompts.
      origin: Files of the model.
      skeleton: Model without weights, see `build_skeleton`.
      tokenizer: Tokenizer of the model.
      dtype: Type of the weights.
      chat: Chat template of the prompts.
    """

    records: RecordSet
    template: TrainTemplate
    origin: llama.ModelSource
    skeleton: Any
    tokenizer: Any
    dtype: str
    chat: Any

    @property
    def identity(self) -> dict[str, Any]:
        """Entries that identify a run on these records and this model."""
        return self.origin.identity() | self.records.identity(self.chat)

    @cached_property
    def model(self) -> Any:
        """Model of transformers, loaded on first use; its terms of use are printed.

        Raises:
          InputError: If the weights cannot be loaded.
        """
        cli.print_notes(self.origin.terms)
        return load_model(self.origin, self.skeleton.config, self.dtype)

    def encode(self, records: Sequence[AnyRecord], *, cutoff: int, answer_only: bool = False) -> Examples:
        """Tokenize records, see `rora_theory.lab.data.batches.tokenize`."""
        return tokenize(
            records, self.tokenizer, cutoff=cutoff, template=self.template, answer_only=answer_only, chat=self.chat
        )


def read_inputs(
    data: Sequence[str],
    model: str,
    config: DataConfig | None = None,
    *,
    template: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> ModelInputs:
    """Read records and a model without its weights, and print a summary.

    Args:
      data: Files of training records.
      model: Name or path of the model.
      config: Format of the records and chat template.
      template: Template of the prompts; by default, the one of the records' format.
      dtype: Type of the weights.
      revision: Branch, tag or commit of a model on the hub.

    Raises:
      InputError: If the records or the model cannot be read.
    """
    records = training_records.read_record_set(data, config)
    chosen = records.template(template)
    origin, skeleton = open_model(model, revision)
    with _library_errors(origin.path):
        embedding_rows = skeleton.get_input_embeddings().weight.shape[0]
    tokenizer = llama.model_tokenizer(origin, embedding_rows)
    prompts.print_summary(records, chosen)
    return ModelInputs(records, chosen, origin, skeleton, tokenizer, dtype, records.chat(tokenizer, chosen))


def open_model(name: str, revision: str | None = None, *, config_only: bool = False) -> tuple[llama.ModelSource, Any]:
    """Find the files of a model as `llama.locate` does, of any architecture that transformers has.

    Args:
      name: Name or path of the model.
      revision: Branch, tag or commit of a model on the hub.
      config_only: Whether the configuration of a hub id suffices, so that its weights are not downloaded.

    Returns:
      The files, and the model without weights, see `build_skeleton`.

    Raises:
      InputError: If there is no such model, or transformers has no causal language model of its architecture.
    """
    built: list[Any] = []
    origin = llama.locate(
        name, revision, config_only=config_only, check=lambda path: built.append(build_skeleton(path))
    )
    # Only a hub id is checked before its weights are downloaded.
    return origin, built[0] if built else build_skeleton(origin.path)


def build_skeleton(path: Path) -> Any:
    """Build a model of transformers from its configuration on the meta device: modules and shapes without weights.

    Args:
      path: Folder in Hugging Face layout, or GGUF file.

    Raises:
      InputError: If the configuration cannot be read, or transformers has no causal language model for it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with progress_bar(f"reading the configuration of {path.name}", 1), _library_errors(path):
        config = AutoConfig.from_pretrained(**_library_source(path))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_model(origin: llama.ModelSource, config: Any, dtype: str = "float32") -> Any:
    """Load a folder in Hugging Face layout or a GGUF file as a model of transformers, on the GPU if there is one.

    Args:
      origin: Files of the model.
      config: Configuration of transformers, which takes seconds to read from a GGUF file.
      dtype: Type of the weights: float32 or bfloat16. Weights of a GGUF file are dequantised.

    Raises:
      InputError: If transformers cannot load the files.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with progress_bar(f"loading {origin.label}", 1):
        with _library_errors(origin.path):
            model = AutoModelForCausalLM.from_pretrained(
                **_library_source(origin.path), config=config, dtype=getattr(torch, dtype), use_safetensors=True
            )
        # The weights of a GGUF file are dense now, but its marks would keep the model from being saved.
        for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
            if hasattr(owner, name):
                delattr(owner, name)
        # Attention caches of a training batch are never read.
        model.config.use_cache = False
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _library_source(path: Path) -> dict[str, Any]:
    """Return the arguments with which transformers reads a folder or a GGUF file, and runs no code from it."""
    source = {"pretrained_model_name_or_path": str(path)}
    if not path.is_dir():
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return source | {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turn errors of transformers into an `InputError` of one line, and hide its warnings and bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The bars of the library for each tensor would come between the lines of the command.
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # each family checks its configuration in its own way
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: transformers cannot load the model: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def merge_adapter(model: Any, folder: Path) -> Any:
    """Return a model with the adapter of a folder in PEFT's format merged into its weights.

    Raises:
      InputError: If PEFT refuses the adapter for this model.
    """
    from peft import PeftModel

    try:
        # PEFT reads attributes that newer versions of transformers warn about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{folder}: PEFT cannot load the adapter: {first_line(error)}") from error


def describe_device(model: Any) -> str:
    """Return a description of the model's device for a run's manifest, such as ``1 x cpu (cpu)``."""
    import torch

    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return f"1 x {name} ({model.device.type})"
