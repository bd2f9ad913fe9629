"""Files that a kill, a full disk or another process leaves whole, and the one process that owns a folder."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rora_theory import seals
from rora_theory.errors import InputError

LOCK = ".lock"
"""Held (flock) by the process that owns a folder, and says which; the kernel lets go of it when that dies."""

PART = ".part"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path`` and rename it there: readers see the old file or the new, never a part.

    The file beside has a name that can't be foreseen and is new, so that no link laid there is followed; its
    permissions are the umask's.

    Raises:
      InputError: the disk is full or does not take it; names the file, which is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{secrets.token_hex(8)}{PART}")
    try:
        with _naming(path):
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                _write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def append(path: Path, line: str, *, sync: bool = True) -> None:
    """Append a line to a file; a part of it that a full disk took is taken back.

    Args:
      path: made where it is missing; a symbolic link is refused.
      line: with its newline.
      sync: wait until the disk has it, so that it outlives the machine and not the process alone.

    Raises:
      InputError: as `write_whole`.
    """
    with _naming(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write(descriptor, line.encode())
                if sync:
                    os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def is_disk_error(error: BaseException | None) -> bool:
    """Whether an error came of a disk that is full or broken: no matter of what was being computed."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK:
            return True
        error = error.__cause__
    return False


class Journal:
    """A file of JSON lines, each sealed and bound to the line before it, the first to the run's identity.

    A last line that a kill cut off is dropped. Lines that were changed, moved or taken out are found.

    Args:
      path: need not be there.
      identity: of the run the lines belong to.

    Attributes:
      entries: of all lines, without their digests.

    Raises:
      InputError: a line is not as it was written; names the file and the line.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._digests = [identity]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not seals.is_sealed(entry, of=self._digests[-1]):
                raise InputError(
                    f"{path}: line {number} is damaged or was changed since the run wrote it; accepted is the file as "
                    f"the run wrote it, or without its lines from {number} on, which the same command makes again"
                )
            self._digests.append(entry.pop(seals.DIGEST))
            self.entries.append(entry)
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def append(self, entry: dict[str, Any], *, sync: bool = True) -> None:
        """Write one line more; ``sync`` as for `append`."""
        sealed = seals.seal(entry, of=self._digests[-1])
        append(self.path, json.dumps(sealed) + "\n", sync=sync)
        self._digests.append(sealed[seals.DIGEST])
        self.entries.append(entry)

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Put ``entries`` in the place of all lines."""
        digests, lines = self._digests[:1], []
        for entry in entries:
            sealed = seals.seal(entry, of=digests[-1])
            digests.append(sealed[seals.DIGEST])
            lines.append(json.dumps(sealed) + "\n")
        write_whole(self.path, "".join(lines))
        self.entries, self._digests = list(entries), digests


def take(folder: Path, name: str = LOCK) -> int:
    """Make this process the owner of a folder, until `let_go` or its end.

    Returns:
      the open lock.

    Raises:
      InputError: another process owns it, which is named, or the file system has no locks.
    """
    path = folder / name
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); accepted is a writable folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{folder}: is in use by {owner(folder, name)}; accepted is to wait until that has ended, or another --out"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{path}: cannot be locked ({error.strerror}); accepted is a disk with file locks") from error
    say_who(descriptor)
    return descriptor


def say_who(descriptor: int) -> None:
    """Write into a lock that is held which process holds it."""
    who = {"process": os.getpid(), "host": platform.node(), "since": now()}
    with contextlib.suppress(OSError):  # a full disk must not keep a run from being looked at
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)


def owner(folder: Path, name: str = LOCK) -> str:
    """The owner of a folder in words, by what its lock says."""
    try:
        who = json.loads((folder / name).read_text())
        return f"process {who['process']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def let_go(descriptor: int) -> None:
    """Give a folder back."""
    os.close(descriptor)


def now() -> str:
    """The time, in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); accepted is a writable place with room; what was "
            "finished is kept, and the same command goes on from there"
        ) from error
