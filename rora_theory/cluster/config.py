"""Where cells are worked on, as options."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rora_theory.cluster.connection import connect, the_ray
from rora_theory.cluster.driver import OnRay
from rora_theory.errors import InputError
from rora_theory.runs.cells import Runner, in_process
from rora_theory.scaling import check_integer, check_positive
from rora_theory.validation.ranges import Positive, check_ranges

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Where cells are worked on: one after another in this process, or by Ray."""

    workers: int = 1
    """cells worked on at a time on this machine; more than one needs the extra cluster (Ray)"""
    address: str | None = None
    """HOST:PORT of a Ray cluster, or auto, whose nodes work on the cells, on as many at a time as find room"""
    cell_cpus: Positive = 1.0
    """with --workers or --address: CPUs that a cell takes of its node"""
    cell_gpus: float | None = None
    """GPUs that a cell takes, all of one node; none is 1 where the cluster has any"""
    cell_memory: float | Literal["plan"] | None = None
    """GiB of memory that a cell takes of its node; plan is what `sims.capacity` plans for each, where a cell fine-tunes
    on CPUs; none is not to count it"""

    def __post_init__(self) -> None:
        """Raise `InputError` where a value is out of range."""
        check_integer("--workers", self.workers, most=4096)
        check_ranges(self)
        if self.cell_gpus:
            check_positive("--cell-gpus", self.cell_gpus)
        if isinstance(self.cell_memory, float | int):
            check_positive("--cell-memory", self.cell_memory)
        if self.address is None:
            return
        if self.workers > 1:
            raise InputError(
                "--workers is for this machine, --address for a cluster; accepted is one of them: on a cluster "
                "--cell-cpus, --cell-gpus and --cell-memory say how many cells a node works on"
            )
        host, _, port = self.address.rpartition(":")
        if self.address != "auto" and not (host and port.isdecimal() and "/" not in host):
            raise InputError(f"--address is {self.address!r}; accepted is HOST:PORT of `ray start --head`, or auto")

    def runner(self, plan: Callable[[Any], int] | None = None) -> Runner:
        """Start Ray or connect to the cluster, where this process alone is not to do it. Call before any JAX work.

        Args:
          plan: bytes of memory that a cell takes; None where the experiment's cells have no plan.

        Raises:
          InputError: Ray is not installed, no cluster is at the address, this machine has not what a cell takes, or
            cells that take GPUs or have no plan are to be planned.
        """
        if self.cell_memory == "plan" and plan is None:
            raise InputError("--cell-memory is plan, and cells of this experiment have none; accepted is a number")
        if self.workers == 1 and self.address is None:
            return in_process
        connect(self.address, self.workers, self.cell_cpus)
        nodes = [node["Resources"] for node in the_ray().nodes() if node["Alive"]]
        needs = self._needs(nodes)
        if self.cell_memory != "plan" or plan is None:
            return OnRay(lambda _: needs)
        if needs["num_gpus"]:
            raise InputError("--cell-memory is plan, and cells take GPUs; accepted is a number")
        most = max(node.get("memory", 0) for node in nodes)  # a cell that takes more has such a node for itself
        return OnRay(lambda cell: needs | {"memory": int(min(plan(cell), most))})

    def _needs(self, nodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What every cell takes, as options of `ray.remote`, on nodes of these resources."""
        gpus = self.cell_gpus
        if gpus is None:
            gpus = float(any("GPU" in node for node in nodes))
        if gpus:
            _keep_off_accelerators()
        needs: dict[str, Any] = {"num_cpus": self.cell_cpus, "num_gpus": gpus}
        words = f"{self.cell_cpus:g} CPUs and {gpus:g} GPUs"
        wanted = {"CPU": self.cell_cpus, "GPU": gpus}
        if isinstance(self.cell_memory, float | int):
            wanted["memory"] = needs["memory"] = int(self.cell_memory * _GIB)
            words += f" and {self.cell_memory:g} GiB"
        if not any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in nodes):
            if self.address is None:
                raise InputError(f"a cell takes {words}; accepted is what this machine has")
            logger.warning("no node of the cluster has the %s that a cell takes: cells wait for one that has", words)
        return needs


def _keep_off_accelerators() -> None:
    """Have JAX in the driver use the CPU: the accelerators and their memory are the cells'."""
    with contextlib.suppress(ImportError):
        import jax

        jax.config.update("jax_platforms", "cpu")
