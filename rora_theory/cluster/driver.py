"""The driver's side: all cells are handed to Ray at once, and come back as they end."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.cluster import worker
from rora_theory.cluster.connection import RETRIES, leave, the_ray
from rora_theory.cluster.models import put_model
from rora_theory.cluster.worker import Begun, Done, Failed, Lacking, lock_of
from rora_theory.io import files
from rora_theory.runs import software
from rora_theory.runs.cells import Ended

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnRay:
    """The runner of `rora_theory.runs.cells` that has Ray work on the cells.

    Attributes:
      needs: of a cell, what it takes, as options of `ray.remote`.
    """

    needs: Callable[[Any], Mapping[str, Any]]

    def __call__(
        self, work: Callable[[Any, Path], Any], todo: Sequence[tuple[Any, Path]], begun: Callable[[int], None]
    ) -> Iterator[Ended]:
        """Yield each cell as it ends.

        Args:
          work: of a cell and its folder; it is carried to the workers with all that it refers to.
          todo: cells with their folders.
          begun: called with a cell's place when a worker has begun it.

        Raises:
          InputError: a file can't be written.
        """
        if not todo:
            return
        ray = the_ray()
        here = software.circumstances()
        lock = lock_of(todo[0][1])
        held = _put(work)
        attempt = ray.remote(max_retries=RETRIES)(worker.attempt)
        sent: dict[str, list[tuple[str, Any]]] = {}
        waiting: dict[Any, int] = {}
        started: set[int] = set()
        nodes: dict[str, Mapping[str, Any] | None] = {}  # each node's software where it differs from the driver's

        def submit(place: int) -> None:
            cell, folder = todo[place]
            placed = attempt.options(**self.needs(cell))
            waiting[placed.remote([held], cell, folder.resolve(), lock, dict(sent))] = place

        def start(place: int) -> None:
            if place not in started:
                started.add(place)
                begun(place)

        try:
            for place in range(len(todo)):
                submit(place)
            while waiting:
                ray.wait([*waiting])
                for stream in ray.wait([*waiting], num_returns=len(waiting), timeout=0)[0]:
                    place = waiting[stream]
                    try:
                        said = ray.get(next(stream))
                    except ray.exceptions.RayError as error:  # the worker died too often, or took too much memory
                        said = RuntimeError(_words(error))
                    if isinstance(said, Begun):
                        start(place)
                        if said.node not in nodes:
                            other = software.version_differences(here, said.software)
                            nodes[said.node] = said.software if other else None
                            if other:
                                logger.warning("%s works with %s; manifest.json names both", said.host, other)
                        continue
                    del waiting[stream]
                    if isinstance(said, Lacking):
                        if said.sha256 not in sent:
                            sent[said.sha256] = put_model(said.source)
                        submit(place)
                    else:
                        start(place)
                        yield _ended(place, said, todo[place][1], nodes)
        except BaseException:
            leave()  # ends what is being worked on
            raise


def _words(error: Exception) -> str:
    """A line of Ray's many: of an error in the worker, such as that the package is not installed there, the last."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if 'RayTaskError' in type(error).__name__ else 0]}"


class _WorkerTraceError(Exception):
    """The traceback of a worker, as text: the cause of the error that it raised."""


def _ended(
    place: int, said: Done | Failed | Exception, folder: Path, nodes: Mapping[str, Mapping[str, Any] | None]
) -> Ended:
    """A result, once the files that came with it are in the cell's folder; or the error, with its traceback."""
    if isinstance(said, Failed):
        said.error.__cause__ = _WorkerTraceError(f"on {said.host}:\n{said.trace}")
        return Ended(place, said.error)
    if isinstance(said, Exception):
        return Ended(place, said)
    if said.files:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt before
        for name, content in said.files.items():
            path = files.resolve_inside(folder, name, where=f"a cell of node {said.node}")
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, content)
    return Ended(place, said.value, said.seconds, said.node, nodes.get(said.node))


def _put(work: Callable[..., Any]) -> Any:
    """The work in Ray's object store; JAX's arrays go there as NumPy's, whose bytes are not copied once more."""
    ray = the_ray()
    if (jax := sys.modules.get("jax")) is not None:
        array = type(jax.numpy.zeros(()))
        ray.util.register_serializer(array, serializer=_to_host, deserializer=_to_device)
    return ray.put(work)


def _to_host(array: Any) -> Any:
    import numpy as np

    return array.__reduce__() if array.weak_type else np.asarray(array)


def _to_device(value: Any) -> Any:
    import jax.numpy as jnp

    return value[0](*value[1]) if isinstance(value, tuple) else jnp.array(value)
