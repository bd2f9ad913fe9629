"""Lock a run folder, so that a single process owns it."""

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


def acquire(folder: Path) -> int:
    """Make this process the owner of a folder, until it closes the lock or ends.

    Returns:
      The descriptor of the open lock file.

    Raises:
      InputError: Another process owns the folder, or the file system does not support locks.
    """
    descriptor = _open_locked(folder)
    owner = {"process": os.getpid(), "host": platform.node(), "since": now()}
    with contextlib.suppress(OSError):  # on a full disk the folder can still be read
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return descriptor


def check_unowned(folder: Path) -> None:
    """Raise `InputError` if another process owns a folder, without changing the folder."""
    if (folder / LOCK).is_file():
        os.close(_open_locked(folder))


def _open_locked(folder: Path) -> int:
    """Open and lock the lock file of a folder, or raise `InputError` if another process holds it."""
    path = folder / LOCK
    # Do not follow a link, which could lead to another file; child processes must not inherit the lock.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}). Use a writable folder.") from error
    try:
        # The kernel releases the lock when the process ends, even if it is killed.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{folder}: is in use by {_describe_owner(path)}. Wait until it has ended, or use another folder."
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise InputError(
            f"{path}: cannot be locked ({error.strerror}). Use a disk that supports file locks."
        ) from error
    return descriptor


def _describe_owner(lock: Path) -> str:
    """Return a description of the process that holds a lock, which it writes shortly after acquiring the lock."""
    for _ in range(100):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(lock.read_text())
            return f"process {owner['process']} on {owner['host']} since {owner['since']}"
        time.sleep(0.01)
    return "another process"


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
