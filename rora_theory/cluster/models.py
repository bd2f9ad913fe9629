"""Send models to workers through Ray's object store, and keep them in a folder of the node by their digest."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.io.files import resolve_inside


class MissingModelError(InputError):
    """A model whose files are not on this machine.

    Attributes:
      source: Path of the files on the machine that requested the model.
      sha256: Digest of the model, `rora_theory.llama.identity.model_digest`.
    """

    def __init__(self, source: Path, sha256: str) -> None:
        """Initialise the error for a model at a path, with its digest."""
        super().__init__(f"{source}: is not on this machine. Use a path or a hub id that it can read.")
        self.source, self.sha256 = source, sha256


def kept_in(sha256: str) -> Path:
    """Return the folder where a node keeps the model of a digest."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rora-theory" / "models" / sha256


def put_model(source: Path) -> list[tuple[str, Any]]:
    """Put the files of a model into the object store.

    Returns:
      The path of each file, which begins with the name of the model's file or folder, and its reference.
    """
    import numpy as np
    import ray

    from rora_theory.llama.identity import parts

    def content(path: Path) -> Any:
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)

    return [(str(path.relative_to(source.parent)), ray.put(content(path))) for path in parts(source)]


def keep_model(sha256: str, parts: Sequence[tuple[str, Any]]) -> None:
    """Write the files of `put_model` to the node's folder, once for each node; replace damaged ones.

    Args:
      sha256: Digest of the model.
      parts: Paths and references of its files.

    Raises:
      InputError: The files in the object store are not the model of that digest.
    """
    import ray

    def write(folder: Path) -> None:
        for name, reference in parts:
            path = resolve_inside(folder, name, where="the object store")
            path.parent.mkdir(parents=True, exist_ok=True)
            ray.get(reference).tofile(path)

    root = parts[0][0].partition("/")[0]  # name of the model's folder or file
    keep_files(sha256, root, write, otherwise="it changed while it was sent. Send a model that no one writes to.")


def keep_files(sha256: str, root: str, write: Callable[[Path], None], *, otherwise: str) -> Path:
    """Write a model to the node's folder, once; readers see all of it or nothing. Replace one that is damaged.

    Args:
      sha256: Digest of the model, `rora_theory.llama.identity.model_digest`.
      root: Name of the model's file or folder.
      write: Function that writes ``root`` to the folder that it is given.
      otherwise: Explanation of another digest, for the error.

    Returns:
      The model's path.

    Raises:
      InputError: The written files have another digest.
    """
    from rora_theory.llama.identity import is_model

    place = kept_in(sha256)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent), tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as scratch:
        if is_model(place / root, sha256):  # written by another process of the node
            return place / root
        new_folder = Path(scratch) / "new"
        new_folder.mkdir()
        write(new_folder)
        if not is_model(new_folder / root, sha256):
            raise InputError(
                f"{root}: is not saved in {place}, because its SHA-256 is not {sha256[:12]}...: {otherwise}"
            )
        if place.exists():
            place.rename(Path(scratch) / "damaged")
        new_folder.rename(place)
    return place / root


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other workers of the node from writing models; without effect on a disk without locks."""
    descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
