"""The connection of this process to Ray: of its own, or of a cluster."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

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
        raise InputError(
            "--workers and --address need the extra cluster, as in pip install 'rora-theory[cluster]'"
        ) from error
    return ray


def connect(address: str | None, workers: int, cpus: float) -> None:
    """Connect to the cluster at an address, or start Ray here with room for so many cells of ``cpus`` each.

    Raises:
      InputError: Ray is not installed, does not start, or no cluster is at the address.
    """
    for name, value in QUIET.items():  # before Ray is imported, which reads them
        os.environ.setdefault(name, value)
    ray = the_ray()
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            _check_listening(address)
            ray.init(address, **quiet)
        else:
            # NumPy in a worker has as many threads as here, so that results are the same to the bit.
            with _environment(OMP_NUM_THREADS=str(os.cpu_count() or 1)):
                ray.init("local", num_cpus=math.ceil(workers * cpus), include_dashboard=False, **quiet)
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
    """Variables for processes that are begun meanwhile, where they are not set already."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
