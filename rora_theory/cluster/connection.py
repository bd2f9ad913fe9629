"""The connection of this process to Ray: of its own, or of a cluster."""

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
from rora_theory.cluster import orphans
from rora_theory.errors import InputError

RETRIES = 3
"""How often a cell is begun again whose worker died. An error that it raises itself is not tried again."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a cell that takes no GPU sees none
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # nor printed beside a command's own output: it is in Ray's logs
    "RAY_task_oom_retries": str(RETRIES),  # Ray's own default is for ever
}
"""Ray's environment, where the user has not set it."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment that has Ray use the loopback address, as it does by default where it supports one machine alone. Without
it, Ray listens on all interfaces. Read when Ray is imported."""


def leave() -> None:
    """Disconnect from Ray, and stop it where it was started here; nothing where `ClusterConfig.runner` did not."""
    if _connected:
        _connected.clear()
        sys.modules["ray"].shutdown()


_connected: list[bool] = []
"""Not empty while this process is connected to Ray by `connect`."""


def the_ray() -> Any:
    """The module. Raises `InputError` where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--workers and --address need Ray: {extras.missing_message(error)}") from error
    return ray


def connect(address: str | None, workers: int, cpus: float) -> None:
    """Connect to the cluster at an address, or start Ray here with room for so many cells of ``cpus`` each.

    Ray that is started here listens on the loopback address. What an earlier, killed process left is stopped first.

    Raises:
      InputError: Ray is not installed, does not start, or no cluster is at the address.
    """
    for name, value in QUIET.items():  # before Ray is imported, which reads them
        os.environ.setdefault(name, value)
    # NumPy in a worker has as many threads as here, so that results are the same to the bit.
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))}
    own |= LOOPBACK
    with contextlib.nullcontext() if address is not None else _environment(**own):
        _init(the_ray(), address, workers, cpus)


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
            orphans.stop()
            quiet["_temp_dir"] = str(orphans.make_session_root())
            ray.init("local", num_cpus=math.ceil(workers * cpus), include_dashboard=False, **quiet)
            _check_loopback(ray)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if address is None:
            raise InputError(f"--workers {workers}: Ray does not start here ({reason})") from error
        raise InputError(
            f"--address {address}: {reason}; accepted is HOST:PORT of `ray start --head`, or auto"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray sets its own
    _connected.append(True)


def _check_loopback(ray: Any) -> None:
    """Raise `RuntimeError` and stop Ray where others on the network could reach it."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        ray.shutdown()
        raise RuntimeError(
            f"it listens on {', '.join(sorted(addresses))}, as it was imported before with other settings"
        )


def _check_listening(address: str) -> None:
    """Raise `ConnectionError` at once where nothing listens: Ray itself goes on trying."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({getattr(error, 'strerror', None) or error})") from error


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for modules that are imported and processes that are started meanwhile."""
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
