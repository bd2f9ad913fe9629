"""Identity of a model: the digest of its files and the storage of its weights, not the name it was loaded by."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rora_theory.lab.llama.weights import TOKENIZER_FILES, read_headers, weight_files
from rora_theory.runs import digests

GGUF, SAFETENSORS = "GGUF", "safetensors"


def model_digest(source: Path) -> str:
    """Compute the SHA-256 of a model.

    A GGUF file has the digest of the file. A folder has the digest of the files that loading reads: ``config.json``,
    the tokenizer's files and the weights. Further weights, such as Mistral's ``consolidated.safetensors``, do not
    count.

    Returns:
      The digest, of `digests.of_file` or `digests.of_files`.

    Raises:
      InputError: A file cannot be read, or the folder has no safetensors.
    """
    return digests.of_files(model_files(source)) if source.is_dir() else digests.of_file(source)


def model_files(source: Path) -> list[Path]:
    """Return the files that a model is loaded from: a GGUF file, or a folder's weights, configuration and tokenizer."""
    if not source.is_dir():
        return [source]
    settings = (source / name for name in ("config.json", *TOKENIZER_FILES))
    return [path for path in (*weight_files(source), *settings) if path.is_file()]


@dataclass(frozen=True)
class Storage:
    """Storage of a checkpoint's weights.

    Attributes:
      container: ``GGUF`` or ``safetensors``.
      types: Number of weights stored as each type, by the type's name in the files, most frequent first.
    """

    container: str
    types: Mapping[str, int]

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in blocks of few bits (Q4_1, IQ2_XS), not as floating-point numbers."""
        return any(name.startswith(("Q", "IQ", "TQ")) for name in self.types)

    def __str__(self) -> str:
        """Return the container, whether the weights are quantised, and the share of each type."""
        total = sum(self.types.values())
        shares = ", ".join(f"{name} {100 * count / total:.3g}%" for name, count in self.types.items())
        names = shares if len(self.types) > 1 else next(iter(self.types), "no weights")
        return f"{self.container}, {'quantised' if self.quantised else 'not quantised'} ({names})"


def read_storage(source: Path) -> Storage:
    """Read the storage of a model's weights from the headers of its files.

    Raises:
      InputError: A file cannot be read, is damaged, or the folder has no safetensors.
    """
    # Only the headers are read: they state type and size of every tensor.
    counts: Counter[str] = Counter()
    if source.is_dir():
        for header in read_headers(source).values():
            counts[header.dtype] += header.size
        return Storage(SAFETENSORS, dict(counts.most_common()))
    from rora_theory.lab.llama.gguf_file import open_gguf

    for tensor in open_gguf(source).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return Storage(GGUF, dict(counts.most_common()))
