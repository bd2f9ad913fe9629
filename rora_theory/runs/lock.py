"""The one process that owns a folder."""

import contextlib
import fcntl
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

from rora_theory.errors import InputError
from rora_theory.runs.reading import LOCK


def take(folder: Path) -> int:
    """Make this process the owner of a folder, until it closes the lock or ends.

    Returns:
      the open lock.

    Raises:
      InputError: another process owns it, which is named, or the file system has no locks.
    """
    descriptor = _hold(folder)
    who = {"process": os.getpid(), "host": platform.node(), "since": now()}
    with contextlib.suppress(OSError):  # a full disk must not keep a run from being looked at
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)
    return descriptor


def check_unowned(folder: Path) -> None:
    """Raise `InputError` where another process owns a folder, which is left as it is."""
    if (folder / LOCK).is_file():
        os.close(_hold(folder))


def _hold(folder: Path) -> int:
    path = folder / LOCK
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
            f"{folder}: is in use by {_owner(path)}; accepted is to wait until that has ended, or another --out"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{path}: cannot be locked ({error.strerror}); accepted is a disk with file locks") from error
    return descriptor


def _owner(lock: Path) -> str:
    """The owner of a folder in words, by what its lock says, which comes a moment after it is taken."""
    for _ in range(100):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            who = json.loads(lock.read_text())
            return f"process {who['process']} on {who['host']} since {who['since']}"
        time.sleep(0.01)
    return "another process"


def now() -> str:
    """The time, in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
