"""Submit all cells to Ray from the driver, and return them as they end."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.runs import files, software
from rora_theory.runs.cells import CellOutcome
from rora_theory.runs.cluster import worker
from rora_theory.runs.cluster.connection import RETRIES, import_ray, leave
from rora_theory.runs.cluster.models import put_model
from rora_theory.runs.cluster.worker import Done, Failed, MissingModel, Started, read_lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayRunner:
    """Runner of `rora_theory.runs.cells` that computes cells with Ray.

    Attributes:
      needs: Resources of each cell, as options of `ray.remote`.
    """

    needs: Mapping[str, Any]

    def __call__(
        self, work: Callable[[Any, Path], Any], todo: Sequence[tuple[Any, Path]], on_start: Callable[[int], None]
    ) -> Iterator[CellOutcome]:
        """Compute cells and yield their outcomes as they end.

        Args:
          work: Function of a cell and its folder. It is sent to the workers with all objects that it refers to.
          todo: Cells with their folders.
          on_start: Function called with the index of a cell when a worker has started it.

        Raises:
          InputError: A file cannot be written.
        """
        if not todo:
            return
        ray = import_ray()
        environment = software.environment()
        lock = read_lock(todo[0][1])
        work_reference = _put(work)
        attempt = ray.remote(max_retries=RETRIES)(worker.attempt)
        sent_models: dict[str, list[tuple[str, Any]]] = {}  # references of the files that were sent, by digest
        index_of_stream: dict[Any, int] = {}  # position of the cell that each stream of messages reports on
        started: set[int] = set()
        nodes: dict[str, Mapping[str, Any] | None] = {}  # software of each node if it differs from the driver's

        def submit(index: int) -> None:
            cell, folder = todo[index]
            remote_attempt = attempt.options(**self.needs)
            stream = remote_attempt.remote([work_reference], cell, folder.resolve(), lock, dict(sent_models))
            index_of_stream[stream] = index

        def start(index: int) -> None:
            if index not in started:
                started.add(index)
                on_start(index)

        try:
            # Submit all cells at once: Ray keeps them until a node has their resources.
            for index in range(len(todo)):
                submit(index)
            while index_of_stream:
                # Wait for a message, then handle all that have arrived.
                ray.wait([*index_of_stream])
                for stream in ray.wait([*index_of_stream], num_returns=len(index_of_stream), timeout=0)[0]:
                    index = index_of_stream[stream]
                    try:
                        message = ray.get(next(stream))
                    except ray.exceptions.RayError as error:  # the worker died too often, or used too much memory
                        message = RuntimeError(_first_line(error))
                    if isinstance(message, Started):
                        start(index)
                        # Warn once about each node with other versions, which may compute other results.
                        if message.node not in nodes:
                            differences = software.version_differences(environment, message.software)
                            nodes[message.node] = message.software if differences else None
                            if differences:
                                logger.warning("%s uses %s; manifest.json records both", message.host, differences)
                        continue
                    # The stream has ended: send the model that the node lacks and submit the cell again, or finish it.
                    del index_of_stream[stream]
                    if isinstance(message, MissingModel):
                        if message.sha256 not in sent_models:
                            sent_models[message.sha256] = put_model(message.source)
                        submit(index)
                    else:
                        start(index)
                        yield _to_outcome(index, message, todo[index][1], nodes)
        except BaseException:
            leave()  # stops the cells that are running
            raise


def _first_line(error: Exception) -> str:
    """Return the informative line of Ray's message: the last of an error in the worker, otherwise the first."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if 'RayTaskError' in type(error).__name__ else 0]}"


class _WorkerTraceError(Exception):
    """Traceback of a worker as text, the cause of the exception that it raised."""


def _to_outcome(
    index: int, message: Done | Failed | Exception, folder: Path, nodes: Mapping[str, Mapping[str, Any] | None]
) -> CellOutcome:
    """Write the files of a result to the cell's folder and return the outcome, or that of an error."""
    if isinstance(message, Failed):
        message.error.__cause__ = _WorkerTraceError(f"on {message.host}:\n{message.trace}")
        return CellOutcome(index, message.error)
    if isinstance(message, Exception):
        return CellOutcome(index, message)
    if message.files:
        shutil.rmtree(folder, ignore_errors=True)  # left by an earlier attempt
        for name, content in message.files.items():
            path = files.resolve_inside(folder, name, where=f"a cell of node {message.node}")
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, content)
    return CellOutcome(index, message.value, message.seconds, message.node, nodes.get(message.node))


def _put(work: Callable[..., Any]) -> Any:
    """Put the work function into Ray's object store, with JAX arrays as NumPy arrays, which avoids a copy."""
    ray = import_ray()
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
