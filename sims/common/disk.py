"""Files of sealed lines, and the one process that owns a folder."""

import contextlib
import fcntl
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rora_theory import seals
from rora_theory.errors import InputError
from rora_theory.files import append, write_whole

LOCK = ".lock"
"""Held (flock) by the process that owns a folder, and says which; the kernel lets go of it when that dies."""


class Journal:
    """A file of JSON lines, each sealed and bound to the line before it, the first to the run's identity.

    A last line that a kill cut off is dropped. Lines that were changed, moved or taken out are found.

    Args:
      path: need not be there.
      identity: of the run the lines belong to.
      mend: whether such an end is cut off the file too; not where another process may be writing it.

    Attributes:
      entries: of all lines, without their digests.

    Raises:
      InputError: a line is not as it was written; names the file and the line.
    """

    def __init__(self, path: Path, identity: str, *, mend: bool = True) -> None:
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
        if mend and len(whole) < len(data):
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
