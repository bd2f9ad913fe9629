"""Compute the cells of an experiment with Ray: several at a time on this machine, or on the nodes of a cluster.

Ray places each cell on a node with the CPUs, GPUs and memory that it needs, and starts it again elsewhere if its node
dies. The work function, with the data that all cells share, is put into Ray's object store once. A worker works in the
cell's folder, as a single process does, and resumes from its checkpoints: all nodes share the file system of the run
folder. The calling process owns the run folder and resumes it.
"""

import contextlib
import dataclasses
import functools
import ipaddress
import math
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, first_line
from rora_theory.runs.cells import CellOutcome, Runner, in_process
from rora_theory.scaling import check_integer, check_positive
from rora_theory.validation.ranges import Positive, check_ranges

MAX_WORKERS = 4096
RETRIES = 3
"""Number of times that a cell is started again if its worker dies. A cell that raises an exception is not."""

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # hide GPUs from cells that reserve none
    "RAY_task_oom_retries": str(RETRIES),  # Ray retries forever by default
}
"""Environment variables of Ray, which it reads when it is imported, unless the user has set them."""

LOCAL_VARIABLES = {
    # Listen on the loopback address instead of all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray sets one NumPy thread for each worker. With as many as here, results have the same bits.
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),
}
"""Further environment variables of a Ray that is started on this machine."""


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
        # On a cluster, the resources of a cell determine how many run at a time.
        if self.workers > 1 and self.address is not None:
            raise InputError(
                f"workers {self.workers} cannot be combined with address. On a cluster, set how many cells a node "
                "computes with cell_cpus, cell_gpus and cell_memory."
            )

    def runner(self) -> Runner:
        """Return the runner of the cells, and start Ray or connect to the cluster if it is needed.

        Call this before any JAX work.

        Raises:
          InputError: Ray does not start, there is no cluster at the address, or this machine lacks the resources of a
            cell.
          ModuleNotFoundError: Ray is not installed.
        """
        if self.workers == 1 and self.address is None:
            return in_process
        available = _connect(self).cluster_resources()
        # One GPU for each cell if any node has one. Cells own the GPUs, so this process uses the CPU.
        gpus = float("GPU" in available) if self.cell_gpus is None else self.cell_gpus
        if gpus:
            with contextlib.suppress(ImportError):
                import jax

                jax.config.update("jax_platforms", "cpu")
        needs: dict[str, float] = {"num_cpus": self.cell_cpus, "num_gpus": gpus}
        if self.cell_memory is not None:
            needs["memory"] = int(self.cell_memory * 2**30)
        # Ray would wait for the resources. A cluster may get them, this machine will not.
        if self.address is None:
            for option, name in (("num_gpus", "GPU"), ("memory", "memory")):
                if needs.get(option, 0) > available.get(name, 0):
                    raise InputError(
                        f"a cell needs {name} {needs[option]:g}, this machine has {available.get(name, 0):g}. Lower "
                        "cell_gpus or cell_memory."
                    )
        return RayRunner(needs)


def _connect(config: ClusterConfig) -> Any:
    """Start Ray on this machine, or connect to the cluster of the configuration, and return the module."""
    local = {} if config.address else LOCAL_VARIABLES | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in (VARIABLES | local).items():
        os.environ.setdefault(name, value)
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "ignore_reinit_error": True}
    try:
        if config.address is None:
            # Ray opens its folder to all users, so it lies in a folder that only this user can enter.
            folder = f"{tempfile.mkdtemp(prefix='rora-ray-')}/ray"
            count = math.ceil(config.workers * config.cell_cpus)
            ray.init("local", num_cpus=count, include_dashboard=False, _temp_dir=folder, **quiet)
            addresses = [ipaddress.ip_address(node["NodeManagerAddress"]) for node in ray.nodes()]
            if not all(address.is_loopback for address in addresses):
                ray.shutdown()
                raise RuntimeError("Ray listens on the network, because it was imported before with other settings")
        else:
            if config.address != "auto":
                # Without an answer Ray tries for two minutes, and then ends the process.
                host, _, port = config.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(config.address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        if config.address is None:
            raise InputError(f"workers {config.workers}: Ray does not start here ({first_line(error)})") from error
        raise InputError(
            f"address {config.address}: no connection to Ray ({first_line(error)}). Pass HOST:PORT of "
            "`ray start --head`, or auto."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray replaces it
    return ray


@functools.lru_cache(maxsize=1)
def load_work(reference: Any) -> Callable[[Any, Path], Any]:
    """Return the work function of a reference. The cells of a worker share it, with its models and programs."""
    import ray

    return ray.get(reference)


def compute_cell(references: list[Any], position: int, cell: Any, folder: Path) -> CellOutcome:
    """Compute a cell in a worker.

    Args:
      references: Reference of the work function, in a list, so that Ray passes the reference itself.
      position: Index of the cell.
      cell: Cell to compute.
      folder: Folder of the cell.

    Raises:
      InputError: The run folder does not exist on this node.
    """
    import ray

    node, run = ray.get_runtime_context().get_node_id()[:12], folder.parents[1]
    if not run.is_dir():
        raise InputError(f"{run}: node {node} does not see this run folder. Use a file system that all nodes share.")
    work, started = load_work(references[0]), time.monotonic()
    return CellOutcome(position, work(cell, folder), time.monotonic() - started, node)


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
        """Submit all cells, and yield their outcomes as they end. The work is sent with all that it refers to."""
        import ray

        remote = ray.remote(max_retries=RETRIES, **self.needs)(compute_cell)
        references = [ray.put(work)]
        pending: dict[Any, int] = {}
        try:
            for index, (cell, folder) in enumerate(todo):
                on_start(index)
                pending[remote.remote(references, index, cell, folder.resolve())] = index
            while pending:
                (ended,), _ = ray.wait(list(pending), num_returns=1)
                index = pending.pop(ended)
                try:
                    yield ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    # The cell raised an exception; Ray's has the traceback of the worker.
                    error.cause.__cause__ = error
                    yield CellOutcome(index, error.cause)
                except ray.exceptions.RayError as error:
                    yield CellOutcome(index, error)
        except BaseException:
            ray.shutdown()  # stops the cells that are running
            raise
