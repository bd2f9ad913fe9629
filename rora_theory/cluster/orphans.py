"""Processes of Ray that outlive a killed driver: marked when they are started, stopped at the next start.

Ray's two agents of a node survive a driver that SIGKILL ended. Each process that Ray starts for a driver inherits a
variable of its environment that names the driver, by which the orphans among them are known. Only Linux tells.
"""

import contextlib
import os
import signal
from pathlib import Path

MARK = "RORA_RAY_DRIVER"
"""Variable of the environment: the driver's process, its start time and its namespace of processes."""


def marked() -> dict[str, str]:
    """Return the environment that marks processes as started by this one; empty where the system has no ``/proc``."""
    with contextlib.suppress(OSError):
        return {MARK: f"{os.getpid()} {_start_time(os.getpid())} {_namespace()}"}
    return {}


def stop() -> list[int]:
    """Kill this user's processes that are marked by a driver that is dead.

    Returns:
      Their process ids.
    """
    killed = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            # The descriptor stays with the process whose environment is read, even if its id is given to another one.
            descriptor = os.pidfd_open(int(path.name))
            try:
                if path.stat().st_uid == os.getuid() and _is_orphan(path):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed.append(int(path.name))
            finally:
                os.close(descriptor)
    return killed


def _is_orphan(path: Path) -> bool:
    for entry in (path / "environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == MARK.encode():
            driver, start, namespace = value.decode().split()
            return namespace == _namespace() and start != _start_time(int(driver))
    return False


def _start_time(process: int) -> str | None:
    """Return when a process started, in clock ticks since the boot; None for one that has ended."""
    try:
        # The name in parentheses may hold spaces; the state follows it, and the start time is 19 entries later.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _namespace() -> str:
    """Return the namespace of process ids, so that processes of a container are not taken for orphans outside it."""
    return os.readlink("/proc/self/ns/pid")
