"""Processes of Ray that outlive a killed driver: they are stopped when the next driver starts.

Ray's two agents of a node survive a driver that SIGKILL ended. Every process of a session logs to the session's folder,
whose name ends with the driver's process id. Sessions of this package have a root of their own, so that those of other
programs are not touched. Orphans are found on Linux only.
"""

import contextlib
import os
import re
import signal
import stat
from pathlib import Path

from rora_theory.errors import InputError


def session_root() -> Path:
    """Return the folder that holds this user's sessions. Its path is short, as those of sockets are limited."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"rora-ray-{os.getuid()}"


def make_session_root() -> Path:
    """Create the folder that holds this user's sessions, which other users can't enter.

    Raises:
      InputError: The folder belongs to another user, is a link, or can't be created.
    """
    root = session_root()
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        # lstat does not follow a link, which another user could have put there.
        status = root.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise InputError(f"{root}: belongs to another user. Set RAY_TMPDIR to another folder.")
        root.chmod(0o700)
    except OSError as error:
        raise InputError(f"{root}: cannot be created ({error.strerror}). Set RAY_TMPDIR to another folder.") from error
    return root


def stop() -> list[int]:
    """Kill this user's processes of sessions whose driver has ended.

    Returns:
      Their process ids.
    """
    killed = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            # The descriptor refers to this process even if another one gets its id meanwhile.
            descriptor = os.pidfd_open(int(path.name))
            try:
                driver = driver_of(path)
                if driver is not None and not _is_running(driver):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed.append(int(path.name))
            finally:
                os.close(descriptor)
    return killed


def driver_of(process: Path) -> int | None:
    """Return the driver of a process of a session; None for other processes.

    Args:
      process: Folder of the process in ``/proc``.

    Raises:
      OSError: The process has ended, or belongs to another user.
    """
    # In another namespace, such as a container, the number belongs to another process.
    is_here = os.readlink(process / "ns" / "pid") == os.readlink("/proc/self/ns/pid")
    if not is_here or process.stat().st_uid != os.getuid():
        return None
    session = re.compile(rf"{re.escape(os.path.realpath(session_root()))}/session_[^/]*_(\d+)/logs/")
    # Ray's processes overwrite their environment with their title: the logs that they write tell their session.
    for file in (process / "fd").iterdir():
        if (match := session.match(os.readlink(file))) and _is_written(process / "fdinfo" / file.name):
            return int(match[1])
    return None


def _is_written(file: Path) -> bool:
    """Return whether a process has a file open for writing, according to its ``fdinfo``."""
    flags = re.search(r"^flags:\s*([0-7]+)$", file.read_text(), re.MULTILINE)
    return flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
