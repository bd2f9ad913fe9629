"""Which model it is: not the name it was asked for by, but what its files hold, and how they store it."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rora_theory.errors import InputError
from rora_theory.io import digests
from rora_theory.llama.weights import INDEX, SINGLE, TOKENIZER_FILES, headers, weight_map

GGUF, SAFETENSORS = "GGUF", "safetensors"


def model_digest(source: Path) -> str:
    """The SHA-256 of a model: of a GGUF file, or of a folder's configuration, weights and tokenizer.

    Args:
      source: `hub.Located.path`.

    Returns:
      `digests.of_file` of a file; `digests.of_files` of ``config.json``, the tokenizer's files and the weights that are
      read: ``model.safetensors``, or the index and every shard that it names. A folder may hold further weights, such
      as Mistral's ``consolidated.safetensors``.

    Raises:
      InputError: a file that can't be read, or as `weights.weight_map`.
    """
    return digests.of_files(parts(source)) if source.is_dir() else digests.of_file(source)


def is_model(source: Path, sha256: str) -> bool:
    """Return whether the files at a path are the model of that digest; False where they are missing or damaged."""
    with contextlib.suppress(InputError):  # a folder that holds no model
        return os.path.exists(source) and model_digest(source) == sha256
    return False


def parts(source: Path) -> list[Path]:
    """The files that a model is read from: a GGUF file, or of a folder those of `model_digest`."""
    if not source.is_dir():
        return [source]
    weights = [source / SINGLE]
    if not weights[0].is_file():
        names = set(weight_map(source).values())
        weights = [source / INDEX, *(source / name for name in names)]
    others = (source / name for name in ("config.json", *TOKENIZER_FILES))
    return [path for path in (*weights, *others) if path.is_file()]


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores its weights.

    Attributes:
      container: ``GGUF`` or ``safetensors``.
      types: how many weights are stored as each type, by its name in the files; the most first.
    """

    container: str
    types: Mapping[str, int]

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in blocks of few bits (Q4_1, IQ2_XS), not as floating-point numbers."""
        return any(name.startswith(("Q", "IQ", "TQ")) for name in self.types)

    def __str__(self) -> str:
        total = sum(self.types.values())
        shares = ", ".join(f"{name} {100 * count / total:.3g}%" for name, count in self.types.items())
        names = shares if len(self.types) > 1 else next(iter(self.types), "no weights")
        return f"{self.container}, {'quantised' if self.quantised else 'not quantised'} ({names})"


def storage(source: Path) -> Storage:
    """How the weights that are read of a folder or GGUF file are stored, from the files' headers.

    Raises:
      InputError: as `model_digest`, or as `gguf_file.open_gguf`.
    """
    counts: Counter[str] = Counter()
    if source.is_dir():
        for tensor in headers(source).values():
            counts[tensor.dtype] += tensor.size
        return Storage(SAFETENSORS, dict(counts.most_common()))
    from rora_theory.llama.gguf_file import open_gguf

    for own in open_gguf(source).tensors:
        counts[own.tensor_type.name] += int(own.n_elements)
    return Storage(GGUF, dict(counts.most_common()))
