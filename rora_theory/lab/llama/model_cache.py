"""Folder of this machine with built-in models that packages contain in parts, by their digests."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rora_theory.errors import InputError
from rora_theory.runs import digests


def model_cache_folder(sha256: str) -> Path:
    """Return the folder of this machine that holds the model with a digest."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rora-theory" / "models" / sha256


def cache_model(sha256: str, name: str, write: Callable[[Path], None], *, remedy: str) -> Path:
    """Write a model to its cache folder once, so that readers see all of it or nothing; replace a damaged one.

    Returns:
      The path of the model in the cache.

    Raises:
      InputError: The written files have another digest.
    """
    folder = model_cache_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent), tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        # Another process may have written the model while this one waited for the lock.
        if (folder / name).is_file() and digests.of_file(folder / name) == sha256:
            return folder / name
        # Write to a scratch folder of the same disk, check the digest, then rename: the rename is atomic.
        new = Path(scratch) / "new"
        new.mkdir()
        write(new)
        if digests.of_file(new / name) != sha256:
            raise InputError(f"{name}: not written to {folder}, because its SHA-256 is not {sha256[:12]}...: {remedy}")
        if folder.exists():
            folder.rename(Path(scratch) / "damaged")
        new.rename(folder)
    return folder / name


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
