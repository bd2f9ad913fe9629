"""Compute the cells of an experiment with Ray: several at a time on this machine, or on the nodes of a cluster.

Ray places each cell on a node with the CPUs, GPUs and memory that it needs, and starts it again elsewhere if its node
dies. The work function, with the data that all cells share, is put into Ray's object store once. A worker works in the
cell's folder, as a single process does, and resumes from its checkpoints: all nodes share the file system of the run
folder. The calling process owns the run folder and resumes it.
"""

import contextlib
import dataclasses
import ipaddress
import math
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory import extras
from rora_theory.errors import InputError
from rora_theory.runs.cells import CellOutcome, Runner, in_process
from rora_theory.validation.ranges import Count, NotNegative, Positive, check_ranges

RETRIES = 3
"""Number of times that a cell is started again if its worker dies. A cell that raises an exception is not."""

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # hide GPUs from cells that reserve none
    "RAY_task_oom_retries": str(RETRIES),  # Ray retries forever by default
}
"""Environment variables of Ray, which it reads when it is imported, unless the user has set them."""

LOCAL_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback address instead of all interfaces
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),  # as many NumPy threads as here, so that results have the same bits
}
"""Further environment variables of Ray on this machine alone."""

_session = contextlib.ExitStack()
"""Ends the session of Ray that this process has started or joined."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Settings for computing cells: one after another in this process, or with Ray.

    Raises:
      InputError: A value is out of range.
    """

    workers: Count = 1
    """number of cells computed at a time on this machine; more than one needs the extra cluster (Ray)"""
    address: str | None = None
    """HOST:PORT of a Ray cluster, or auto; its nodes compute as many cells at a time as fit"""
    cell_cpus: Positive = 1.0
    """number of CPUs reserved for a cell, with --workers or --address"""
    cell_gpus: NotNegative | None = None
    """number of GPUs reserved for a cell, all on one node; by default 1 if the cluster has GPUs"""
    cell_memory: Positive | None = None
    """GiB of memory reserved for a cell; by default memory is not reserved"""

    def __post_init__(self) -> None:
        check_ranges(self)
        # On a cluster, the resources of a cell determine how many run at a time.
        if self.address is not None and self.workers > 1:
            raise InputError(
                f"workers {self.workers} cannot be combined with address. On a cluster, set how many cells a node "
                "computes with cell_cpus, cell_gpus and cell_memory."
            )
        if self.address not in (None, "auto"):
            host, _, port = self.address.rpartition(":")
            if not (host and port.isdecimal() and "/" not in host):
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
        available = _connect(self).cluster_resources()
        gpus = float("GPU" in available) if self.cell_gpus is None else self.cell_gpus
        memory = int((self.cell_memory or 0) * 2**30)
        # Ray waits for missing resources; a cluster may get another node that has them, this machine will not.
        for name, needed, amount in (("GPU", gpus, f"{gpus:g}"), ("memory", memory, f"{self.cell_memory} GiB")):
            if self.address is None and needed > available.get(name, 0):
                raise InputError(
                    f"a cell needs {name} {amount}, more than this machine has. Lower cell_gpus or cell_memory."
                )
        # Cells own the GPUs, so this process uses the CPU.
        if gpus:
            import jax

            jax.config.update("jax_platforms", "cpu")
        return RayRunner({"num_cpus": self.cell_cpus, "num_gpus": gpus, "memory": memory})


def leave() -> None:
    """Disconnect from Ray, and stop it if it was started here. Without a connection, do nothing."""
    _session.close()


def _connect(config: ClusterConfig) -> Any:
    """Start Ray on this machine, or connect to the cluster of the configuration, and return the module."""
    is_local = config.address is None
    # Ray would write its token into the home folder, where other users may read it.
    local = LOCAL_VARIABLES | {"RAY_AUTH_TOKEN": secrets.token_hex(32)} if is_local else {}
    for name, value in (VARIABLES | local).items():
        os.environ.setdefault(name, value)
    ray = extras.import_extra("ray")
    if ray.is_initialized():
        return ray
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        if config.address is None:
            # Ray opens its folder to all users, so it lies in a folder that only this user can enter.
            folder = _session.enter_context(tempfile.TemporaryDirectory(prefix="rora-ray-", ignore_cleanup_errors=True))
            _session.callback(ray.shutdown)
            count = math.ceil(config.workers * config.cell_cpus)
            quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
            ray.init("local", num_cpus=count, _temp_dir=f"{folder}/ray", **quiet)
            if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
                raise RuntimeError("Ray listens on the network, because it was imported before with other settings")
        else:
            if config.address != "auto":
                # Ray itself would try for many minutes.
                host, _, port = config.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            _session.callback(ray.shutdown)
            ray.init(config.address, logging_level="ERROR")
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        leave()
        reason = " ".join(str(error).split()).rstrip(".")
        if is_local:
            raise InputError(f"workers {config.workers}: Ray does not start on this machine ({reason})") from error
        raise InputError(
            f"address {config.address}: no Ray cluster answers ({reason}). Pass HOST:PORT of `ray start --head`."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)  # Ray replaces it
    return ray


_loaded_work: dict[Any, Callable[[Any, Path], Any]] = {}
"""Last work function of this worker, by its reference: the next cell reuses its models and compiled functions."""


def _load_work(reference: Any) -> Callable[[Any, Path], Any]:
    """Return the work function of a reference, which is loaded once for all cells of a run."""
    import ray

    if reference not in _loaded_work:
        _loaded_work.clear()  # free its memory before the next one is loaded
        _loaded_work[reference] = ray.get(reference)
    return _loaded_work[reference]


def compute_cell(references: list[Any], cell: Any, folder: Path) -> CellOutcome | None:
    """Compute a cell in a worker.

    Args:
      references: Reference of the work function, in a list, so that Ray passes the reference itself.
      cell: Cell to compute.
      folder: Folder of the cell.

    Returns:
      The outcome, with the id of the node, and 0 for the position; None if the node does not see the run folder.
    """
    import ray

    if not folder.parents[1].is_dir():
        return None
    work, started = _load_work(references[0]), time.monotonic()
    node = ray.get_runtime_context().get_node_id()[:12]
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
        """Submit all cells, and yield their outcomes as they end. An exception stops those that are running.

        Args:
          work: Function of a cell and its folder. It is sent to the workers with all objects that it refers to.
          todo: Cells with their folders.
          on_start: Function called with the index of a cell when it is submitted.

        Raises:
          InputError: A node does not see the run folder.
        """
        if not todo:
            return
        import ray

        remote = ray.remote(max_retries=RETRIES, **self.needs)(compute_cell)
        references = [ray.put(work)]
        pending: dict[Any, int] = {}
        try:
            for index, (cell, folder) in enumerate(todo):
                on_start(index)
                pending[remote.remote(references, cell, folder.resolve())] = index
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
                    if outcome is None:
                        run = todo[index][1].parents[1]
                        raise InputError(
                            f"{run}: a node of the cluster does not see this run folder. Use one on a file system that "
                            "all nodes share."
                        )
                    yield outcome._replace(position=index)
        except BaseException:
            leave()
            raise
