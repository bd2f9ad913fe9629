"""Connect this process to Ray, on this machine or on a cluster."""

import contextlib
import ipaddress
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rora_theory import extras
from rora_theory.errors import InputError
from rora_theory.runs.cluster import orphans

RETRIES = 3
"""Number of times that a cell is retried if its worker dies. A cell that raises an exception is not retried."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # hide GPUs from cells that reserve none
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # keep warnings in Ray's logs, out of a command's output
    "RAY_task_oom_retries": str(RETRIES),  # Ray retries forever by default
}
"""Environment variables of Ray, unless the user has set them."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment variable that makes Ray listen on the loopback address instead of all interfaces.

Ray reads it when it is imported. Listening on the loopback address is its default on systems without clusters.
"""


def leave() -> None:
    """Disconnect from Ray, and stop it if it was started here. Without a connection, do nothing."""
    if _connected:
        _connected.clear()
        sys.modules["ray"].shutdown()


_connected: list[bool] = []
"""Marker of a connection by `connect`: not empty while this process is connected."""


def import_ray() -> Any:
    """Import Ray.

    Returns:
      The module.

    Raises:
      InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--workers and --address need Ray: {extras.missing_message(error)}") from error
    return ray


def connect(address: str | None, workers: int, cpus: float) -> None:
    """Connect to the cluster at an address, or start Ray on this machine.

    Ray that is started here listens on the loopback address. Processes that a killed driver left are stopped first.

    Args:
      address: HOST:PORT of the cluster, or auto; None starts Ray on this machine.
      workers: Number of cells computed at a time on this machine.
      cpus: Number of CPUs reserved for a cell.

    Raises:
      InputError: Ray is not installed or does not start, or there is no cluster at the address.
    """
    # Ray reads these variables when it is imported.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Workers use as many NumPy threads as this process, so that results have the same bits.
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))}
    variables |= LOOPBACK
    with contextlib.nullcontext() if address is not None else _environment(**variables):
        _init(import_ray(), address, workers, cpus)


def _init(ray: Any, address: str | None, workers: int, cpus: float) -> None:
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            _check_listening(address)
            ray.init(address, **quiet)
        else:
            # Stop the sessions that killed runs have left, and start one in a folder of this user.
            orphans.stop()
            quiet["_temp_dir"] = str(orphans.make_session_root())
            ray.init("local", num_cpus=math.ceil(workers * cpus), include_dashboard=False, **quiet)
            _check_loopback(ray)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if address is None:
            raise InputError(f"--workers {workers}: Ray does not start on this machine ({reason})") from error
        raise InputError(f"--address {address}: {reason}. Pass HOST:PORT of `ray start --head`, or auto.") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # restore the handler that Ray replaces
    _connected.append(True)


def _check_loopback(ray: Any) -> None:
    """Stop Ray and raise `RuntimeError` if it is reachable from the network."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        ray.shutdown()
        raise RuntimeError(
            f"Ray listens on {', '.join(sorted(addresses))}, because it was imported before with other settings"
        )


def _check_listening(address: str) -> None:
    """Raise `ConnectionError` immediately if nothing listens at an address; Ray itself would keep trying."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({getattr(error, 'strerror', None) or error})") from error


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for modules imported and processes started inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
