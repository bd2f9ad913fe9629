"""Cells, the parts of an experiment that are each done once: the one place that experiments resume from.

    FOLDER/cells.jsonl   a sealed line a finished cell, see `rora_theory.runs.reading`
    FOLDER/cells/KEY/    files of a cell that has any, with cell.json, what it is; error.txt of one that failed

A cell is a frozen dataclass: beside what the run folder is known by, all that determines its result. Its key is the
hash of it, its ``str`` its name in output. Tables and figures are made from the results in the order of the cells, so
that a run that was stopped leaves the same bytes as one that was not. One process drives a folder (see `RunFolder`);
where cells are worked on is the runner's: one after another in this process, or elsewhere, several at a time.
"""

import contextlib
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from rora_theory.errors import FailedError, InputError
from rora_theory.io import digests, files
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal
from rora_theory.runs.reading import CELLS, CHECKPOINTS, Finished, as_json, check_files, finished, key_of

logger = logging.getLogger(__name__)

FOLDERS = "cells"
ERROR = "error.txt"
EVERY = 5.0
"""Seconds between two writings of the tables while cells are worked on."""

Cell = TypeVar("Cell")

Work = Callable[[Cell, Path], Any]
"""The function of a cell: returns its result in JSON types (numpy's numbers become Python's), be it one number or the
rows of many. It may use the folder it is given, which it makes itself: for checkpoints, and for files that are part of
the result."""


class Ended(NamedTuple):
    """A cell that has ended.

    Attributes:
      place: its place in the list.
      result: or the error that it raised.
      seconds: that it took.
      node: of a cluster, by its id there; None is this process.
      software: `rora_theory.runs.software.circumstances` of the node where they differ from this process's; else None.
    """

    place: int
    result: Any
    seconds: float = 0.0
    node: str | None = None
    software: Mapping[str, Any] | None = None


@runtime_checkable
class Runner(Protocol):
    """Where and in which order cells are worked on.

    Called with the work, the cells with their folders, and what to call with a cell's place in that list when it is
    begun. Yields each cell as it ends. What else it raises, such as `KeyboardInterrupt`, ends the run.
    """

    def __call__(
        self, work: Work[Cell], todo: Sequence[tuple[Cell, Path]], begun: Callable[[int], None]
    ) -> Iterator[Ended]: ...


def in_process(work: Work[Cell], todo: Sequence[tuple[Cell, Path]], begun: Callable[[int], None]) -> Iterator[Ended]:
    """The `Runner` that works on one cell after another in this process."""
    for place, (cell, folder) in enumerate(todo):
        begun(place)
        started = time.monotonic()
        try:
            result = work(cell, folder)
        except Exception as error:
            result = error
        yield Ended(place, result, time.monotonic() - started)


def run_cells(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    *,
    runner: Runner = in_process,
    begun: Callable[[Cell, int], object] = lambda cell, passed: None,
    done: Callable[[int, Any, Ended], object] = lambda index, value, ended: None,
    write: Callable[[list[Any]], object] = lambda values: None,
) -> list[Any]:
    """The results of all cells, in their order: those of earlier parts of the run, and of ``work``, which are kept.

    A cell that fails is named by a warning of `logging`, with its traceback in its folder; the others are done, and the
    next call tries it again.

    Args:
      cells: frozen dataclasses.
      work: the function of a cell.
      folder: of the run, which this process owns.
      runner: where cells are worked on.
      begun: called with each cell that is begun, and how many are behind it, done or failed.
      done: called with the place in ``cells`` of each that is done now, its result as it is kept, and how it ended.
      write: called with the results so far, in the order of the cells: at the start where there are any, every few
        seconds, and at the end.

    Raises:
      FailedError: cells failed; all others are done.
      InputError: a full disk, or a line or file that is not as the run wrote it; the cells before are kept.
    """
    keys = [key_of(cell) for cell in cells]
    kept, known = finished(folder.path), folder.entry("files")
    for one in kept.values():  # those in the manifest were looked at when the folder was opened
        check_files(folder.path, {name: digest for name, digest in one.files.items() if name not in known})
        # Where the run ended after a cell was kept and before its checkpoints went, they are still there.
        shutil.rmtree(folder.path / FOLDERS / one.key / CHECKPOINTS, ignore_errors=True)
    journal = Journal(folder.path / CELLS, folder.identity)
    todo = [index for index, key in enumerate(keys) if key not in kept and key not in keys[:index]]
    for index in todo:
        folder.forget(f"{FOLDERS}/{keys[index]}")
    tasks = [(cells[index], folder.path / FOLDERS / keys[index]) for index in todo]
    failed: list[str] = []
    passed, written = len(cells) - len(todo), time.monotonic()

    def values() -> list[Any]:
        return [kept[key].value for key in keys if key in kept]

    def start(place: int) -> None:
        begun(tasks[place][0], passed)

    if earlier := values():
        with files.naming_damage(folder.path / CELLS):  # results of the wrong type are refused before work starts
            write(earlier)
    for ended in runner(work, tasks, start):
        (cell, own), index = tasks[ended.place], todo[ended.place]
        passed += 1
        if isinstance(ended.result, Exception):
            failed.append(f"{cell} ({_failure(cell, own, ended.result)})")
        else:
            one = kept[keys[index]] = _keep(keys[index], cell, own, ended.result, folder)
            journal.append(vars(one))
            shutil.rmtree(own / CHECKPOINTS, ignore_errors=True)
            folder.ran(keys[index], ended.seconds, ended.node, ended.software)
            done(index, one.value, ended)
        if time.monotonic() - written > EVERY:
            write(values())
            written = time.monotonic()
    order = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    lines = sorted(journal.entries, key=lambda line: order.get(line.get("key", ""), -1))
    if todo and lines != journal.entries:  # the file is the same in whatever order they ended
        journal.rewrite(lines)
    write(values())
    if failed:
        raise FailedError(
            f"{len(failed)} of {len(cells)} cells failed, the first {failed[0]}; the others are done, and the same "
            "command tries these again"
        )
    return values()


def _keep(key: str, cell: Any, own: Path, value: Any, folder: RunFolder) -> Finished:
    """A cell that is done, with its files, whose digests the run's manifest will have too."""
    products: dict[str, str] = {}
    (own / ERROR).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        own.rmdir()  # it has no files: the folder was made for the error alone
    if own.exists():
        files.write_whole(own / "cell.json", json.dumps(as_json(cell), indent=2, sort_keys=True) + "\n")
        for path in sorted(path for path in own.rglob("*") if path.is_file()):
            if path.relative_to(own).parts[0] != CHECKPOINTS:
                products[str(path.relative_to(folder.path))] = digests.of_file(path)
        folder.wrote(products)
    # As it will be read back, so that a run that goes on has the same bits.
    plain = json.loads(json.dumps(value, default=lambda number: number.item()))
    return Finished(key, as_json(cell), plain, products)


def _failure(cell: Any, own: Path, error: Exception) -> str:
    """Name a cell that failed, and keep the traceback. Raises `InputError` for a full disk, no fault of the cell's."""
    if files.is_disk_error(error):
        if isinstance(error, OSError):
            what = error.strerror or str(error)
            raise InputError(f"{own}: cannot be written ({what}); accepted is a disk with room") from error
        raise error
    words = f"{type(error).__name__}: {error}"
    with contextlib.suppress(InputError, OSError):
        own.mkdir(parents=True, exist_ok=True)
        files.write_whole(own / ERROR, "".join(traceback.format_exception(error)))
    logger.warning("%s failed (%s); its traceback is in %s", cell, words, own / ERROR)
    return words
