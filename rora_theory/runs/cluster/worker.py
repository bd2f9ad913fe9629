"""Compute one cell in a worker, and return a result that can be sent to the driver."""

import contextlib
import functools
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

from rora_theory.lab.llama.model_cache import MissingModelError
from rora_theory.runs import files, software
from rora_theory.runs.cluster.models import cache_sent_model
from rora_theory.runs.reading import CHECKPOINTS, LOCK


class Started(NamedTuple):
    """Message that a worker has started a cell.

    Attributes:
      host: Name of the worker's machine.
      software: Software environment of the worker, `rora_theory.runs.software.environment`.
      node: Ray's id of the worker's node.
    """

    host: str
    software: Mapping[str, Any]
    node: str


class Done(NamedTuple):
    """Result of a cell.

    Attributes:
      value: Result of the cell.
      files: Content of the files that are part of the result, by name; empty if the worker wrote into the run folder.
      seconds: Run time of the cell, including the loading of the model.
      node: Ray's id of the worker's node.
    """

    value: Any
    files: Mapping[str, bytes]
    seconds: float
    node: str


class Failed(NamedTuple):
    """Failure of a cell.

    Attributes:
      error: Exception that the cell raised.
      trace: Traceback as text.
      host: Name of the worker's machine.
    """

    error: Exception
    trace: str
    host: str


class MissingModel(NamedTuple):
    """Message that the node does not have a model, see `MissingModelError`."""

    source: Path
    sha256: str


_NODE_ID_LENGTH = 12
"""Number of characters of Ray's node id that are recorded, out of 56."""

_cached_work: list[tuple[Any, Callable[[Any, Path], Any]]] = []
"""Last work function of this process, with its reference: the next cell reuses its models and compiled functions."""

_environment = functools.cache(software.environment)


@no_type_check  # Ray does not recognise a generator function behind a type-checking decorator
def attempt(
    work_reference: list[Any], cell: Any, folder: Path, lock: str | None, sent: Mapping[str, Sequence[tuple[str, Any]]]
) -> Iterator[Started | Done | Failed | MissingModel]:
    """Compute a cell, and yield `Started` and then its outcome.

    Args:
      work_reference: Reference of the work function, in a list so that Ray does not fetch it.
      cell: Cell to compute.
      folder: Folder of the cell on the driver's machine.
      lock: Content of the run folder's lock there, `read_lock`.
      sent: Models that the driver has put into the object store, by digest.
    """
    yield Started(platform.node(), _environment(), _node())
    yield _compute(work_reference[0], cell, folder, lock, sent)


def _compute(
    work_reference: Any, cell: Any, folder: Path, lock: str | None, sent: Mapping[str, Sequence[tuple[str, Any]]]
) -> Done | Failed | MissingModel:
    try:
        try:
            return _run(_fetch(work_reference), cell, folder, lock)
        # The driver sends the model and submits the cell again; then its files are at hand.
        except MissingModelError as error:
            if error.sha256 not in sent:
                return MissingModel(error.source, error.sha256)
            cache_sent_model(error.sha256, sent[error.sha256])
            return _run(_fetch(work_reference), cell, folder, lock)
    except Exception as error:
        return _failed(error)


def read_lock(folder: Path) -> str | None:
    """Return the content of the lock of a cell's run folder, or None if there is none.

    It describes the process that owns the folder. A worker that reads the same content as the driver sees the driver's
    folder, not another one of the same name.
    """
    with contextlib.suppress(OSError):
        return (folder.resolve().parents[1] / LOCK).read_text()
    return None


def _fetch(work_reference: Any) -> Callable[[Any, Path], Any]:
    import ray

    if not _cached_work or _cached_work[0][0] != work_reference:
        _cached_work.clear()  # free its memory before the next one is loaded
        _cached_work.append((work_reference, ray.get(work_reference)))
    return _cached_work[0][1]


def _run(work: Callable[[Any, Path], Any], cell: Any, folder: Path, lock: str | None) -> Done:
    started, node = time.monotonic(), _node()
    # The driver's own folder is visible from here, by its lock: work in it.
    if lock is not None and read_lock(folder) == lock:
        return Done(work(cell, folder), {}, time.monotonic() - started, node)
    # Otherwise send the files with the result. Checkpoints are of no use after the end.
    with tempfile.TemporaryDirectory(prefix="rora-cell-", ignore_cleanup_errors=True) as scratch:
        scratch_folder = Path(scratch) / folder.name
        value = work(cell, scratch_folder)
        seconds = time.monotonic() - started
        names = [path.relative_to(scratch_folder) for path in sorted(scratch_folder.rglob("*")) if path.is_file()]
        products = {str(name): (scratch_folder / name).read_bytes() for name in names if name.parts[0] != CHECKPOINTS}
        return Done(value, products, seconds, node)


def _node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()[:_NODE_ID_LENGTH]


def _failed(error: Exception) -> Failed:
    """Return a failure that can be sent to the driver.

    An exception that cannot be serialised is replaced by its text. So is an error of a full disk, because the driver
    would take it for an error of its own disk.
    """
    trace = "".join(traceback.format_exception(error))
    description = f"{type(error).__name__}: {error}"
    try:
        from ray import cloudpickle

        if files.is_disk_error(error):
            raise error
        # Causes may not be serialisable; the trace has their text.
        error.__cause__ = error.__context__ = None
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        error = RuntimeError(description)
    return Failed(error.with_traceback(None), trace, platform.node())
