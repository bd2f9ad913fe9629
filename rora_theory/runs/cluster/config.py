"""Options that select where cells are computed."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rora_theory.errors import InputError
from rora_theory.runs.cells import Runner, in_process
from rora_theory.runs.cluster.connection import connect, import_ray
from rora_theory.runs.cluster.driver import RayRunner
from rora_theory.scaling import check_integer, check_positive
from rora_theory.validation.ranges import Positive, check_ranges

logger = logging.getLogger(__name__)

MAX_WORKERS = 4096
_GIB = 1 << 30


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
        # Ranges of the single options.
        check_integer("--workers", self.workers, maximum=MAX_WORKERS)
        check_ranges(self)
        if self.cell_gpus:
            check_positive("--cell-gpus", self.cell_gpus)
        if self.cell_memory is not None:
            check_positive("--cell-memory", self.cell_memory)
        if self.address is None:
            return
        # On a cluster, the resources of a cell determine how many run at a time.
        if self.workers > 1:
            raise InputError(
                f"--workers {self.workers} cannot be combined with --address. On a cluster, set how many cells a node "
                "computes with --cell-cpus, --cell-gpus and --cell-memory."
            )
        host, _, port = self.address.rpartition(":")
        if self.address != "auto" and not (host and port.isdecimal() and "/" not in host):
            raise InputError(f"--address must be HOST:PORT of `ray start --head`, or auto, got {self.address!r}")

    def runner(self) -> Runner:
        """Return the runner of the cells, and start Ray or connect to the cluster if it is needed.

        Call this before any JAX work.

        Raises:
          InputError: Ray is not installed, there is no cluster at the address, or this machine lacks the resources of a
            cell.
        """
        # One worker on this machine needs no Ray.
        if self.workers == 1 and self.address is None:
            return in_process
        connect(self.address, self.workers, self.cell_cpus)
        nodes = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
        return RayRunner(self._needs(nodes))

    def _needs(self, nodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Return the resources reserved for each cell, as options of `ray.remote`.

        Args:
          nodes: Resources of each node.

        Raises:
          InputError: No node has the resources, and Ray runs on this machine.
        """
        # One GPU for each cell if any node has one. Cells own the GPUs, so the driver uses the CPU.
        gpus = self.cell_gpus
        if gpus is None:
            gpus = float(any("GPU" in node for node in nodes))
        if gpus:
            _keep_off_accelerators()
        # Requirements as options of Ray, as resources of a node, and in words.
        needs: dict[str, Any] = {"num_cpus": self.cell_cpus, "num_gpus": gpus}
        description = f"{self.cell_cpus:g} CPUs and {gpus:g} GPUs"
        required = {"CPU": self.cell_cpus, "GPU": gpus}
        if self.cell_memory is not None:
            required["memory"] = needs["memory"] = int(self.cell_memory * _GIB)
            description += f" and {self.cell_memory:g} GiB"
        if not any(all(node.get(name, 0) >= count for name, count in required.items()) for node in nodes):
            # A cluster may get another node with the resources; this machine will not.
            if self.address is None:
                raise InputError(
                    f"a cell needs {description}, more than this machine has. Lower --cell-cpus, --cell-gpus or "
                    "--cell-memory."
                )
            logger.warning("no node of the cluster has the %s that a cell needs; cells wait for one", description)
        return needs


def _keep_off_accelerators() -> None:
    """Make JAX use the CPU in the driver, so that cells have the accelerators and their memory."""
    with contextlib.suppress(ImportError):
        import jax

        jax.config.update("jax_platforms", "cpu")
