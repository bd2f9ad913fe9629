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
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rora_theory import digests, files, frames
from rora_theory.errors import InputError
from rora_theory.journal import Journal
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import CELLS, Finished, as_json, check_files, finished, key_of
from sims.common import cli
from sims.common.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

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


def run_cells(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    *,
    runner: Runner = in_process,
    title: str = "cells",
    words: Callable[[Any], str] | None = None,
    write: Callable[[list[Any]], object] = lambda values: None,
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
      words: of a result, for a line that is printed with each cell that is done; None prints none.
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
    failed: list[str] = []

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
            seconds, (cell, own), index = time.monotonic() - started[place], tasks[place], todo[place]
            if isinstance(result, Exception):
                failed.append(f"{cell} ({_failure(cell, own, result)})")
            else:
                one = done[keys[index]] = _keep(keys[index], cell, own, result, folder)
                journal.append(vars(one))
                shutil.rmtree(own / CHECKPOINTS, ignore_errors=True)
                if words is not None:
                    print(f"[{index + 1}/{len(cells)}] {cell}: {words(one.value)}, {seconds:.0f} s", flush=True)
            if time.monotonic() - written > EVERY:
                write(values())
                written = time.monotonic()
            bar.advance(1)
    write(values())
    if failed:
        raise cli.FailedError(
            f"{len(failed)} of {len(cells)} cells failed, the first {failed[0]}; the others are done, and the same "
            "command tries these again"
        )
    return values()


def run_table(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    columns: Sequence[str],
    *,
    title: str,
    name: str = "results.csv",
) -> "pd.DataFrame":
    """`run_cells` where a cell's result is rows of a table: the table, also written as the cells come."""

    def table(parts: list[Any]) -> "pd.DataFrame":
        return frames.of((row for part in parts for row in part), columns)

    return table(
        run_cells(cells, work, folder, title=title, write=lambda parts: folder.write_frame(table(parts), name))
    )


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
