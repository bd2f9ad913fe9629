"""Read the records and the model of a measurement, which transformers loads."""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, first_line
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
      tokenizer: Tokenizer of the model.
      dtype: Type of the weights.
      chat: Chat template of the prompts.
    """

    records: RecordSet
    template: TrainTemplate
    origin: llama.ModelSource
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
        return load_model(self.origin, self.dtype)

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
    origin = llama.locate(model, revision)
    tokenizer = llama.model_tokenizer(origin)
    prompts.print_summary(records, chosen)
    return ModelInputs(records, chosen, origin, tokenizer, dtype, records.chat(tokenizer, chosen))


def load_model(origin: llama.ModelSource, dtype: str = "float32") -> Any:
    """Load a folder in Hugging Face layout or a GGUF file as a model of transformers, on the GPU if there is one.

    Args:
      origin: Files of the model.
      dtype: Type of the weights: float32 or bfloat16. Weights of a GGUF file are dequantised.

    Raises:
      InputError: If transformers cannot load the files.
    """
    # The bars of the library for each tensor would come between the lines of the command.
    with progress_bar(f"loading {origin.label}", 1), redirect_stderr(io.StringIO()):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        path, source = origin.path, {"pretrained_model_name_or_path": str(origin.path)}
        if not path.is_dir():
            source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **source, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            raise InputError(f"{path}: transformers cannot load the model: {first_line(error)}") from error
        finally:
            logging.set_verbosity(verbosity)
        # The weights of a GGUF file are dense now, but its marks would keep the model from being saved.
        for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
            if hasattr(owner, name):
                delattr(owner, name)
        # Attention caches of a training batch are never read.
        model.config.use_cache = False
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


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
        raise InputError(f"{folder}: PEFT cannot load the adapter: {first_line(error)}") from error


def describe_device(model: Any) -> str:
    """Return a description of the model's device for a run's manifest, such as ``1 x cpu (cpu)``."""
    import torch

    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return f"1 x {name} ({model.device.type})"
