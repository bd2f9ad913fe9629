"""Cells, the parts of an experiment that are each done once: the one place that experiments resume from.

    FOLDER/cells.jsonl   a sealed line a finished cell: its key, what it is, its result, the digests of its files
    FOLDER/cells/KEY/    files of a cell that has any, with cell.json, what it is; error.txt of one that failed

A cell is a frozen dataclass: beside what the run folder is known by, all that determines its result. Its key is the
hash of it, its ``str`` its name in output. Tables and figures are made from the results in the order of the cells, so
that a run that was stopped leaves the same bytes as one that was not. One process drives a folder (see `RunFolder`);
where cells are worked on is the runner's: one after another in this process, or elsewhere, several at a time.
"""

import contextlib
import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from rora_theory import digests, files, frames
from rora_theory.errors import InputError
from rora_theory.journal import Journal
from sims.common import cli
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder, as_json, check_files, read_manifest

if TYPE_CHECKING:
    import pandas as pd

CELLS = "cells.jsonl"
FOLDERS = "cells"
CHECKPOINTS = "checkpoints"
"""Of a cell's folder: what an interrupted cell goes on from; removed when the cell is done."""
ERROR = "error.txt"
EVERY = 5.0
"""Seconds between two writings of the tables while cells are worked on."""

Cell = TypeVar("Cell")

Work = Callable[[Cell, Path], Any]
"""The function of a cell: returns its result in JSON types (numpy's numbers become Python's), be it one number or the
rows of many. It may use the folder it is given, which it makes itself: for checkpoints, and for files that are part of
the result."""


class Runner(Protocol):
    """Where and in which order cells are worked on.

    Called with the work, the cells with their folders, and what to call with a cell's place in that list when it is
    begun. Yields, as each cell ends, that place, and the cell's result or the error that it raised. What else it
    raises, such as `KeyboardInterrupt`, ends the run.
    """

    def __call__(
        self, work: Work[Cell], todo: Sequence[tuple[Cell, Path]], begun: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]: ...


def in_process(
    work: Work[Cell], todo: Sequence[tuple[Cell, Path]], begun: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """The `Runner` that works on one cell after another in this process."""
    for place, (cell, folder) in enumerate(todo):
        begun(place)
        try:
            result = work(cell, folder)
        except Exception as error:
            result = error
        yield place, result


@dataclass(frozen=True)
class Ended(Generic[Cell]):
    """A cell that this run worked on.

    Attributes:
      cell: which.
      index: its place among all cells of the call.
      value: its result, as it is kept; None where it failed.
      error: what it raised, in words; None where it is done.
      seconds: that it took.
    """

    cell: Cell
    index: int
    value: Any
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Finished:
    """A finished cell as its folder has it: its key, what it is in JSON types, its result, digests of its files."""

    key: str
    cell: Mapping[str, Any]
    value: Any
    files: Mapping[str, str]


def key_of(cell: Any) -> str:
    """The hash of a cell, of 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(as_json(cell), sort_keys=True).encode()).hexdigest()[:16]


def finished(path: Path) -> dict[str, Finished]:
    """The finished cells of a run folder, by key, in the order they were finished in; whoever drives it.

    One of which a file was removed is not among them: it is done again.

    Raises:
      InputError: a line is not as the run wrote it.
    """
    manifest = read_manifest(path, ("run_id",))
    if manifest is None:
        return {}
    found: dict[str, Finished] = {}
    for entry in Journal(path / CELLS, manifest["run_id"], mend=False).entries:
        if "key" in entry:
            found[entry["key"]] = Finished(entry["key"], entry["cell"], entry["value"], entry["files"])
    return {key: one for key, one in found.items() if all((path / name).exists() for name in one.files)}


def run_cells(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    *,
    runner: Runner = in_process,
    title: str = "cells",
    each: Callable[[Ended[Cell]], None] = lambda ended: None,
    write: Callable[[list[Any]], None] = lambda values: None,
) -> list[Any]:
    """The results of all cells, in their order: those of earlier parts of the run, and of ``work``, which are kept.

    A cell that fails is named on standard error, with its traceback in its folder; the others are done, and the next
    call tries it again.

    Args:
      cells: frozen dataclasses.
      work: the function of a cell.
      folder: of the run, which this process owns.
      runner: where cells are worked on.
      title: of the progress bar, beside which the cell's name is.
      each: called with each cell that ends.
      write: called with the results so far, in the order of the cells: at the end and, meanwhile, every few seconds.

    Raises:
      FailedError: cells failed; all others are done.
      InputError: a full disk, or a line or file that is not as the run wrote it; the cells before are kept.
    """
    keys = [key_of(cell) for cell in cells]
    done, known = finished(folder.path), folder.entry("files")
    for one in done.values():  # those in the manifest were looked at when the folder was opened
        check_files(folder.path, {name: digest for name, digest in one.files.items() if name not in known})
    journal = Journal(folder.path / CELLS, folder.identity)
    todo = [index for index, key in enumerate(keys) if key not in done and key not in keys[:index]]
    failed: list[Ended[Cell]] = []

    def values() -> list[Any]:
        return [done[key].value for key in keys if key in done]

    with progress_bar(title, len(cells), fields="{cell}") as bar:
        bar.advance(len(cells) - len(todo))
        for index in todo:
            folder.forget(f"{FOLDERS}/{keys[index]}")
        tasks = [(cells[index], folder.path / FOLDERS / keys[index]) for index in todo]
        written, started = time.monotonic(), {}

        def begun(place: int) -> None:
            started[place] = time.monotonic()
            bar.advance(0, cell=tasks[place][0])

        for place, result in runner(work, tasks, begun):
            seconds = time.monotonic() - started[place]
            (cell, own), index, error = tasks[place], todo[place], None
            if isinstance(result, Exception):
                error, result = _failure(cell, own, result), None
            else:
                one = _keep(keys[index], cell, own, result, folder)
                journal.append(vars(one))
                shutil.rmtree(own / CHECKPOINTS, ignore_errors=True)
                done[one.key], result = one, one.value
            ended = Ended(cell, index, result, error, seconds)
            failed += [ended] if error is not None else []
            each(ended)
            if time.monotonic() - written > EVERY:
                write(values())
                written = time.monotonic()
            bar.advance(1)
    write(values())
    if failed:
        raise cli.FailedError(
            f"{len(failed)} of {len(cells)} cells failed, the first {failed[0].cell} ({failed[0].error}); the others "
            "are done, and the same command tries these again"
        )
    return values()


def announce(cells: Sequence[Cell], words: Callable[[Any], str]) -> Callable[[Ended[Cell]], None]:
    """What `run_cells` may call with ``each`` cell that ends: it prints a line with the ``words`` of the result."""

    def each(ended: Ended[Cell]) -> None:
        if ended.error is None:
            line = f"[{ended.index + 1}/{len(cells)}] {ended.cell}: {words(ended.value)}, {ended.seconds:.0f} s"
            print(line, flush=True)

    return each


def run_table(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    columns: Sequence[str],
    *,
    runner: Runner = in_process,
    title: str = "cells",
    name: str = "results.csv",
) -> "pd.DataFrame":
    """`run_cells` where a cell's result is rows of a table: the table, also written as the cells come."""

    def rows(parts: Sequence[Any]) -> list[Any]:
        return [row for part in parts for row in part]

    def write(parts: list[Any]) -> None:
        folder.write_rows(columns, rows(parts), name)

    return frames.of(rows(run_cells(cells, work, folder, runner=runner, title=title, write=write)), columns)


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
    cli.tell([f"{cell} failed ({words}); its traceback is in {own / ERROR}"])
    return words
