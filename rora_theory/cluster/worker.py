"""A worker's side: one cell, from what the driver put into the object store to a result that can be carried back."""

import contextlib
import functools
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

from rora_theory.cluster.models import LackingError, keep_model
from rora_theory.io import files
from rora_theory.runs import software
from rora_theory.runs.reading import CHECKPOINTS, LOCK


class Begun(NamedTuple):
    """A worker has the cell before it.

    Attributes:
      host: Name of the worker's machine.
      software: `rora_theory.runs.software.circumstances` there.
      node: Ray's id of the worker's node.
    """

    host: str
    software: Mapping[str, Any]
    node: str


class Done(NamedTuple):
    """A result, and the files that are part of it, by name; none where the worker wrote into the run folder.

    Attributes:
      seconds: of the work, the model's loading with it.
      node: Ray's id of the worker's.
    """

    value: Any
    files: Mapping[str, bytes]
    seconds: float
    node: str


class Failed(NamedTuple):
    """What the cell raised, and the traceback."""

    error: Exception
    trace: str
    host: str


class Lacking(NamedTuple):
    """This node has no such model, see `LackingError`."""

    source: Path
    sha256: str


_LETTERS = 12
"""Of Ray's id of a node, of 56."""

_held: list[tuple[Any, Callable[[Any, Path], Any]]] = []
"""The work that this process had last, with its reference: models and compiled functions stay for the next cell."""

_circumstances = functools.cache(software.circumstances)


@no_type_check  # Ray takes a function for a generator only as it is, behind no decorator that checks types
def attempt(
    held: list[Any], cell: Any, folder: Path, lock: str | None, sent: Mapping[str, Sequence[tuple[str, Any]]]
) -> Iterator[Begun | Done | Failed | Lacking]:
    """Work on a cell: a stream of `Begun` and how it ended, see `_end`.

    Args:
      held: the reference of the work.
      cell: which.
      folder: its own, on the driver's machine.
      lock: `lock_of` that folder there.
      sent: models that the driver put into the object store, by digest.
    """
    yield Begun(platform.node(), _circumstances(), _node())
    yield _end(held[0], cell, folder, lock, sent)


def _end(
    held: Any, cell: Any, folder: Path, lock: str | None, sent: Mapping[str, Sequence[tuple[str, Any]]]
) -> Done | Failed | Lacking:
    try:
        try:
            return _work(_fetched(held), cell, folder, lock)
        except LackingError as error:
            if error.sha256 not in sent:
                return Lacking(error.source, error.sha256)
            keep_model(error.sha256, sent[error.sha256])
            return _work(_fetched(held), cell, folder, lock)
    except Exception as error:
        return _failed(error)


def lock_of(folder: Path) -> str | None:
    """What the lock of a cell's run folder says: which process drives it, and since when; None where there is none.

    A worker that reads there what the driver read sees the driver's folder, not one of the same name.
    """
    with contextlib.suppress(OSError):
        return (folder.resolve().parents[1] / LOCK).read_text()
    return None


def _fetched(held: Any) -> Callable[[Any, Path], Any]:
    import ray

    if not _held or _held[0][0] != held:
        _held.clear()  # its memory is free before the next takes its own
        _held.append((held, ray.get(held)))
    return _held[0][1]


def _work(work: Callable[[Any, Path], Any], cell: Any, folder: Path, lock: str | None) -> Done:
    started, node = time.monotonic(), _node()
    if lock is not None and lock_of(folder) == lock:
        return Done(work(cell, folder), {}, time.monotonic() - started, node)
    with tempfile.TemporaryDirectory(prefix="rora-cell-", ignore_cleanup_errors=True) as scratch:
        own = Path(scratch) / folder.name
        value = work(cell, own)
        seconds = time.monotonic() - started
        names = [path.relative_to(own) for path in sorted(own.rglob("*")) if path.is_file()]
        kept = {str(name): (own / name).read_bytes() for name in names if name.parts[0] != CHECKPOINTS}
        return Done(value, kept, seconds, node)


def _node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()[:_LETTERS]


def _failed(error: Exception) -> Failed:
    """The error, or its words where it can't be carried; a full disk of this node's is none of the driver's."""
    trace = "".join(traceback.format_exception(error))
    words = f"{type(error).__name__}: {error}"
    try:
        from ray import cloudpickle

        if files.is_disk_error(error):
            raise error
        error.__cause__ = error.__context__ = None
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        error = RuntimeError(words)
    return Failed(error.with_traceback(None), trace, platform.node())
