"""Transfer of a model's files to Ray's workers through the object store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rora_theory.lab.llama.model_cache import cache_model
from rora_theory.runs.files import resolve_inside


def put_model(source: Path) -> list[tuple[str, Any]]:
    """Put a model's files into the object store.

    Args:
      source: Folder or GGUF file of the model.

    Returns:
      The relative path of each file, which begins with the model's own name, and its reference.
    """
    import numpy as np
    import ray

    from rora_theory.lab.llama.identity import model_files

    def content(path: Path) -> Any:
        # A file of no bytes cannot be mapped.
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)

    return [(str(path.relative_to(source.parent)), ray.put(content(path))) for path in model_files(source)]


def cache_sent_model(sha256: str, parts: Sequence[tuple[str, Any]]) -> None:
    """Write the files of `put_model` to this machine's cache, unless they are there.

    Args:
      sha256: Digest of the model.
      parts: Relative paths and references of the files.

    Raises:
      InputError: The files in the object store are not the model of that digest.
    """
    import ray

    from rora_theory.lab.llama.identity import has_digest

    def write(folder: Path) -> None:
        for name, reference in parts:
            path = resolve_inside(folder, name, where="the object store")
            path.parent.mkdir(parents=True, exist_ok=True)
            ray.get(reference).tofile(path)

    root = parts[0][0].partition("/")[0]  # the model's own name: a folder or a file
    remedy = "it changed while it was sent. Send a model that no one writes to."
    cache_model(sha256, root, write, has_digest=has_digest, remedy=remedy)
