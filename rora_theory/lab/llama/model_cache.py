"""Folder of this machine with model files that are known by their digest.

Files come here from the parts of a built-in model, or from another machine through Ray's object store.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rora_theory.errors import InputError


class MissingModelError(InputError):
    """A model whose files are not on this machine.

    Attributes:
      source: Path of the files on the machine that located the model.
      sha256: Digest of the model, `rora_theory.lab.llama.identity.model_digest`.
    """

    def __init__(self, source: Path, sha256: str) -> None:
        """Name the missing path in the message."""
        super().__init__(f"{source}: no such model on this machine. Pass a path or hub id that every machine can read.")
        self.source, self.sha256 = source, sha256


def model_cache_folder(sha256: str) -> Path:
    """Return the folder of this machine that holds the model with a digest."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rora-theory" / "models" / sha256


def cache_model(
    sha256: str,
    root: str,
    write: Callable[[Path], None],
    *,
    has_digest: Callable[[Path, str], bool],
    remedy: str,
) -> Path:
    """Write a model to its cache folder once, so that readers see all of it or nothing; replace a damaged one.

    Args:
      sha256: Digest of the model.
      root: Name of the model's file or folder.
      write: Function that writes ``root`` to the folder that it is given.
      has_digest: Function that checks a path against a digest, `rora_theory.lab.llama.identity.has_digest`.
      remedy: Cause of a wrong digest and how to fix it, for the error.

    Returns:
      The path of the model in the cache.

    Raises:
      InputError: The written files have another digest.
    """
    folder = model_cache_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent), tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        # Another process may have written the model while this one waited for the lock.
        if has_digest(folder / root, sha256):
            return folder / root
        # Write to a scratch folder of the same disk, check the digest, then rename: the rename is atomic.
        new = Path(scratch) / "new"
        new.mkdir()
        write(new)
        if not has_digest(new / root, sha256):
            raise InputError(f"{root}: not written to {folder}, because its SHA-256 is not {sha256[:12]}...: {remedy}")
        if folder.exists():
            folder.rename(Path(scratch) / "damaged")
        new.rename(folder)
    return folder / root


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the cache against other processes of this machine; without effect on a disk that has no locks."""
    descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
