"""Identity of a model: the digest of its files and the storage of its weights, not the name it was loaded by."""

from collections import Counter
from pathlib import Path

from rora_theory.lab.llama.weights import TOKENIZER_FILES, read_headers, weight_files
from rora_theory.runs import digests


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
    if not source.is_dir():
        return digests.of_file(source)
    settings = (source / name for name in ("config.json", *TOKENIZER_FILES))
    return digests.of_files(path for path in (*weight_files(source), *settings) if path.is_file())


def describe_storage(source: Path) -> str:
    """Return the container of a model's weights, whether they are quantised, and the share of each type.

    Raises:
      InputError: A file cannot be read, is damaged, or the folder has no safetensors.

    Examples:
      >>> describe_storage(locate("smollm2-135m").path)  # doctest: +SKIP
      'GGUF, quantised (Q4_1 78.9%, Q6_K 21%, F32 0.0261%)'
    """
    # Only the headers are read: they state type and size of every tensor.
    counts: Counter[str] = Counter()
    if source.is_dir():
        for header in read_headers(source).values():
            counts[header.dtype] += header.size
    else:
        from rora_theory.lab.llama.gguf_file import open_gguf

        for tensor in open_gguf(source).tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    # Types in blocks of few bits have names such as Q4_1 and IQ2_XS.
    is_quantised = any(name.startswith(("Q", "IQ", "TQ")) for name in counts)
    shares = ", ".join(f"{name} {100 * count / counts.total():.3g}%" for name, count in counts.most_common())
    container = "safetensors" if source.is_dir() else "GGUF"
    return f"{container}, {'quantised' if is_quantised else 'not quantised'} ({shares or 'no weights'})"
