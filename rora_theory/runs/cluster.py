"""Compute the cells of an experiment with Ray: several at a time on this machine, or on the nodes of a cluster.

Ray places each cell on a node with the CPUs, GPUs and memory that it needs, and starts it again elsewhere if its node
dies. The work function, with the data that all cells share, is put into Ray's object store once. A worker works in the
cell's folder, as a single process does, and resumes from its checkpoints: all nodes share the file system of the run
folder. The calling process owns the run folder and resumes it.
"""

import contextlib
import dataclasses
import ipaddress
import logging
import math
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory import extras
from rora_theory.errors import InputError
from rora_theory.runs.cells import CellOutcome, Runner, in_process
from rora_theory.runs.reading import LOCK
from rora_theory.scaling import check_integer, check_positive
from rora_theory.validation.ranges import Positive, check_ranges

logger = logging.getLogger(__name__)

MAX_WORKERS = 4096
RETRIES = 3
"""Number of times that a cell is started again if its worker dies. A cell that raises an exception is not."""

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # hide GPUs from cells that reserve none
    "RAY_task_oom_retries": str(RETRIES),  # Ray retries forever by default
}
"""Environment variables of Ray, which it reads when it is imported, unless the user has set them."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment variable that makes a local Ray listen on the loopback address instead of all interfaces."""

_sessions: list[tempfile.TemporaryDirectory[str] | None] = []
"""Folder of the session that this process has started, or None for a connection to a cluster; empty without either."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Settings for computing cells: one after another in this process, or with Ray.

    Raises:
      InputError: A value is out of range.
    """

    workers: int = 1
    """number of cells computed at a time on this machine; more than one needs the extra cluster (Ray)"""
    address: str | None = None
    """HOST:PORT of a Ray cluster, or auto; its nodes compute as many cells at a time as fit"""
    cell_cpus: Positive = 1.0
    """number of CPUs reserved for a cell, with --workers or --address"""
    cell_gpus: float | None = None
    """number of GPUs reserved for a cell, all on one node; by default 1 if the cluster has GPUs"""
    cell_memory: float | None = None
    """GiB of memory reserved for a cell; by default memory is not reserved"""

    def __post_init__(self) -> None:
        check_integer("workers", self.workers, maximum=MAX_WORKERS)
        check_ranges(self)
        if self.cell_gpus:
            check_positive("cell_gpus", self.cell_gpus)
        if self.cell_memory is not None:
            check_positive("cell_memory", self.cell_memory)
        if self.address is None:
            return
        # On a cluster, the resources of a cell determine how many run at a time.
        if self.workers > 1:
            raise InputError(
                f"workers {self.workers} cannot be combined with address. On a cluster, set how many cells a node "
                "computes with cell_cpus, cell_gpus and cell_memory."
            )
        host, _, port = self.address.rpartition(":")
        if self.address != "auto" and not (host and port.isdecimal() and "/" not in host):
            raise InputError(f"address must be HOST:PORT of `ray start --head`, or auto, got {self.address!r}")

    def runner(self) -> Runner:
        """Return the runner of the cells, and start Ray or connect to the cluster if it is needed.

        Call this before any JAX work.

        Raises:
          InputError: Ray is not installed or does not start, there is no cluster at the address, or this machine lacks
            the resources of a cell.
        """
        if self.workers == 1 and self.address is None:
            return in_process
        ray = _connect(self)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # One GPU for each cell if any node has one. Cells own the GPUs, so this process uses the CPU.
        gpus = float(any("GPU" in node for node in nodes)) if self.cell_gpus is None else self.cell_gpus
        if gpus:
            with contextlib.suppress(ImportError):
                import jax

                jax.config.update("jax_platforms", "cpu")
        needs: dict[str, Any] = {"num_cpus": self.cell_cpus, "num_gpus": gpus}
        required = {"CPU": self.cell_cpus, "GPU": gpus}
        if self.cell_memory is not None:
            required["memory"] = needs["memory"] = int(self.cell_memory * 2**30)
        if not any(all(node.get(name, 0) >= count for name, count in required.items()) for node in nodes):
            wanted = ", ".join(f"{name} {count:g}" for name, count in required.items())
            # A cluster may get another node with the resources; this machine will not.
            if self.address is None:
                raise InputError(
                    f"a cell needs {wanted}, more than this machine has. Lower cell_cpus, cell_gpus or cell_memory."
                )
            logger.warning("no node of the cluster has what a cell needs (%s); cells wait for one", wanted)
        return RayRunner(needs)


def leave() -> None:
    """Disconnect from Ray, and stop it if it was started here. Without a connection, do nothing."""
    while _sessions:
        sys.modules["ray"].shutdown()
        if (session := _sessions.pop()) is not None:
            session.cleanup()


def _connect(config: ClusterConfig) -> Any:
    """Start Ray on this machine, or connect to the cluster of the configuration, and return the module."""
    # Ray sets one NumPy thread for each worker. With as many as here, results have the same bits.
    # Without a token Ray writes one into the home folder, which a job may not have.
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    local = LOOPBACK | token | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} if config.address is None else {}
    for name, value in (VARIABLES | local).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise InputError(f"workers and address need Ray: {extras.missing_message(error)}") from error
    if ray.is_initialized():
        return ray
    before = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if config.address is not None:
            _check_listening(config.address)
            ray.init(config.address, **quiet)
            _sessions.append(None)
        else:
            # Ray opens its folder to all users, so it lies in a folder that only this user can enter.
            session = tempfile.TemporaryDirectory(prefix="rora-ray-", ignore_cleanup_errors=True)
            _sessions.append(session)
            count = math.ceil(config.workers * config.cell_cpus)
            ray.init("local", num_cpus=count, include_dashboard=False, _temp_dir=f"{session.name}/ray", **quiet)
            addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
            if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
                raise RuntimeError("Ray listens on the network, because it was imported before with other settings")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        leave()
        reason = " ".join(str(error).split()).rstrip(".")
        if config.address is None:
            raise InputError(f"workers {config.workers}: Ray does not start on this machine ({reason})") from error
        raise InputError(f"address {config.address}: {reason}. Pass HOST:PORT of `ray start --head`.") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # restore the handler that Ray replaces
    return ray


def _check_listening(address: str) -> None:
    """Raise `ConnectionError` immediately if nothing listens at an address; Ray itself would keep trying."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"nothing answers there ({getattr(error, 'strerror', None) or error})") from error


def read_lock(folder: Path) -> str | None:
    """Return the content of the lock of a cell's run folder, which names its owner, or None if there is none.

    A worker that reads the same content as the owner sees the owner's folder, not another one of the same name.
    """
    with contextlib.suppress(OSError):
        return (folder.resolve().parents[1] / LOCK).read_text()
    return None


_last_work: list[tuple[Any, Callable[[Any, Path], Any]]] = []
"""Last work function of this worker, with its reference: the next cell reuses its models and compiled functions."""


def fetch_work(reference: Any, get: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    """Return the work function of a reference, which is loaded once for all cells of a run."""
    if not _last_work or _last_work[0][0] != reference:
        _last_work.clear()  # free its memory before the next one is loaded
        _last_work.append((reference, get(reference)))
    return _last_work[0][1]


def compute_cell(references: list[Any], cell: Any, folder: Path, lock: str | None) -> CellOutcome:
    """Compute a cell in a worker.

    Args:
      references: Reference of the work function, in a list, so that Ray passes the reference itself.
      cell: Cell to compute.
      folder: Folder of the cell.
      lock: Content of the run folder's lock on the machine that owns it, see `read_lock`.

    Returns:
      The outcome, with the id of the node, and 0 for the position.

    Raises:
      InputError: The run folder is not that of the owner.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()[:12]
    if lock is None or read_lock(folder) != lock:
        raise InputError(
            f"{folder.parents[1]}: node {node} does not see this run folder. Use one on a file system that all nodes "
            "share."
        )
    work, started = fetch_work(references[0], ray.get), time.monotonic()
    return CellOutcome(0, work(cell, folder), time.monotonic() - started, node)


@dataclasses.dataclass(frozen=True)
class RayRunner:
    """Runner of `rora_theory.runs.cells` that computes cells with Ray.

    Attributes:
      needs: Resources of each cell, as options of `ray.remote`.
    """

    needs: Mapping[str, Any]

    def __call__(
        self, work: Callable[[Any, Path], Any], todo: Sequence[tuple[Any, Path]], on_start: Callable[[int], None]
    ) -> Iterator[CellOutcome]:
        """Submit all cells, and yield their outcomes as they end.

        Args:
          work: Function of a cell and its folder. It is sent to the workers with all objects that it refers to.
          todo: Cells with their folders.
          on_start: Function called with the index of a cell when it is submitted.
        """
        if not todo:
            return
        import ray

        remote = ray.remote(max_retries=RETRIES, **self.needs)(compute_cell)
        references, lock = [ray.put(work)], read_lock(todo[0][1])
        pending: dict[Any, int] = {}
        try:
            for index, (cell, folder) in enumerate(todo):
                on_start(index)
                pending[remote.remote(references, cell, folder.resolve(), lock)] = index
            while pending:
                (ended,), _ = ray.wait(list(pending), num_returns=1)
                index = pending.pop(ended)
                try:
                    outcome = ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    # The cell raised an exception; Ray's has the traceback of the worker.
                    error.cause.__cause__ = error
                    yield CellOutcome(index, error.cause)
                except ray.exceptions.RayError as error:
                    yield CellOutcome(index, error)
                else:
                    yield outcome._replace(position=index)
        except BaseException:
            leave()  # stops the cells that are running
            raise
