"""Which model it is: not the name it was asked for by, but what its files hold."""

from pathlib import Path

from rora_theory import digests
from rora_theory.llama.weights import INDEX, SINGLE, TOKENIZER_FILES


def digest(source: Path) -> str:
    """The SHA-256 of a model: of a GGUF file, or of a folder's configuration, weights and tokenizer.

    Args:
      source: `hub.Located.path`.

    Returns:
      `digests.of_file` of a file; `digests.of_files` of ``config.json``, the tokenizer's files and the weights:
      ``model.safetensors``, or the index and every shard.

    Raises:
      InputError: a file that can't be read.
    """
    if not source.is_dir():
        return digests.of_file(source)
    weights = [source / SINGLE]
    if not weights[0].is_file():
        weights = [source / INDEX, *source.glob("*.safetensors")]
    others = (source / name for name in ("config.json", *TOKENIZER_FILES))
    return digests.of_files(path for path in (*weights, *others) if path.is_file())
