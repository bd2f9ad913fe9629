"""Base models on workers that lack them: through Ray's object store, into a folder of the node's."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError


class LackingError(InputError):
    """A model whose files are not on this machine.

    Attributes:
      source: where they are on the machine that asked for it.
      sha256: `rora_theory.llama.identity.model_digest` of them.
    """

    def __init__(self, source: Path, sha256: str) -> None:
        super().__init__(f"{source}: not on this machine; accepted is a path or hub id that it has")
        self.source, self.sha256 = source, sha256


def kept_in(sha256: str) -> Path:
    """Where a node keeps the model of a digest that came through the object store."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rora-theory" / "models" / sha256


def put_model(source: Path) -> list[tuple[str, Any]]:
    """Put a model's files into the object store: each one's name, from the model's own on, and reference."""
    import numpy as np
    import ray

    from rora_theory.llama.identity import parts

    def content(path: Path) -> Any:
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)

    return [(str(path.relative_to(source.parent)), ray.put(content(path))) for path in parts(source)]


def keep_model(sha256: str, parts: Sequence[tuple[str, Any]]) -> None:
    """Write the files that `put_model` put, once a node."""
    import ray

    place = kept_in(sha256)
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    try:
        for name, reference in parts:
            (beside / name).parent.mkdir(exist_ok=True)
            ray.get(reference).tofile(beside / name)
        with contextlib.suppress(OSError):  # another worker of the node was sooner
            beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
