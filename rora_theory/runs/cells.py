"""Run the cells of an experiment, each once: the single place where experiments resume.

    FOLDER/cells.jsonl   one line for each finished cell, see `rora_theory.runs.reading`
    FOLDER/cells/KEY/    files of a cell that has any, with its configuration in cell.json; error.txt if it failed

A cell is a frozen dataclass that, together with the identity of the run folder, determines its result. Its key is the
hash of its fields, and its ``str`` names it in output. Tables and figures use the results in the order of the cells, so
that an interrupted run yields the same bytes as an uninterrupted one. One process owns a folder, see `RunFolder`. The
runner decides where the cells are computed: one after another in this process, or several at a time elsewhere.
"""

import contextlib
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from rora_theory.errors import FailedError, InputError
from rora_theory.runs import files
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal
from rora_theory.runs.reading import CELLS, CHECKPOINTS, FinishedCell, as_json, key_of, read_finished_cells

logger = logging.getLogger(__name__)

CELLS_FOLDER = "cells"
"""Folder in a run folder that holds the folders of its cells."""

ERROR_FILE = "error.txt"
"""File in a cell's folder with the traceback of a failure."""

WRITE_INTERVAL = 5.0
"""Seconds between two writes of the tables while cells are computed."""

Cell = TypeVar("Cell")

Work = Callable[[Cell, Path], Any]
"""Function that computes a cell.

It returns the result in JSON types (NumPy numbers are converted), for example one number or the rows of a table. It may
create the folder that it is given, for checkpoints and for files that are part of the result.
"""


class CellOutcome(NamedTuple):
    """Outcome of one cell.

    Attributes:
      position: Index of the cell in the list given to the runner.
      result: Result, or the exception that the cell raised.
      seconds: Run time of the cell.
      node: Id of the cluster node that computed the cell; None is this process.
    """

    position: int
    result: Any
    seconds: float = 0.0
    node: str | None = None


@runtime_checkable
class Runner(Protocol):
    """Function that computes cells in an order and a place of its choice.

    It yields the outcome of each cell as it ends. Any exception that it raises, such as `KeyboardInterrupt`, ends the
    run.

    Args:
      work: Function that computes a cell.
      todo: Cells with their folders.
      on_start: Function that is called with the index of each cell when it starts.
    """

    def __call__(
        self, work: Work[Cell], todo: Sequence[tuple[Cell, Path]], on_start: Callable[[int], None]
    ) -> Iterator[CellOutcome]:
        """Compute the cells."""
        ...


def in_process(
    work: Work[Cell], todo: Sequence[tuple[Cell, Path]], on_start: Callable[[int], None]
) -> Iterator[CellOutcome]:
    """Compute one cell after another in this process, see `Runner`."""
    for index, (cell, folder) in enumerate(todo):
        on_start(index)
        started = time.monotonic()
        try:
            result = work(cell, folder)
        except Exception as error:
            result = error
        yield CellOutcome(index, result, time.monotonic() - started)


def run_cells(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    *,
    runner: Runner = in_process,
    on_start: Callable[[Cell, int], object] = lambda cell, ended_count: None,
    on_finish: Callable[[int, Any, CellOutcome], object] = lambda index, value, outcome: None,
    write: Callable[[list[Any]], object] = lambda values: None,
) -> list[Any]:
    """Compute all cells that the run folder does not have, and return the results of all cells in their order.

    A cell that fails is logged as a warning, and its traceback is written to its folder. The other cells continue, and
    the next call computes the failed cell again.

    Args:
      cells: Frozen dataclasses.
      work: Function that computes a cell.
      folder: Run folder, owned by this process.
      runner: Function that decides where cells are computed.
      on_start: Function called when a cell starts, with the cell and the number of cells that have ended.
      on_finish: Function called when a cell has finished, with its position in ``cells``, its result in JSON types, and
        its outcome.
      write: Function called with the available results, in the order of the cells: at the start if there are any, every
        few seconds, and at the end.

    Raises:
      FailedError: Cells failed; all others have finished.
      InputError: A line or folder of a cell is damaged; or the disk is full, and results so far are saved.
    """
    keys = [key_of(cell) for cell in cells]
    journal = Journal(folder.path / CELLS)
    finished = read_finished_cells(folder.path)
    for key in finished:
        # A run that ended between saving a cell and removing its checkpoints has left them.
        shutil.rmtree(folder.path / CELLS_FOLDER / key / CHECKPOINTS, ignore_errors=True)
    # Collect the cells to compute; equal cells are computed once.
    todo = [index for index, key in enumerate(keys) if key not in finished and key not in keys[:index]]
    # Each cell has a folder of its own, named by the hash of its settings.
    tasks = [(cells[index], folder.path / CELLS_FOLDER / keys[index]) for index in todo]
    for _, cell_folder in tasks:
        for path in (cell_folder.parent, cell_folder):
            if path.exists() and not path.is_dir():
                raise InputError(f"{path}: is a file. Remove it: the run keeps a folder there.")
    failures: list[str] = []
    ended_count, written_at = len(cells) - len(todo), time.monotonic()

    def available_values() -> list[Any]:
        return [finished[key].value for key in keys if key in finished]

    def start(task_index: int) -> None:
        on_start(tasks[task_index][0], ended_count)

    # Refuse results of the wrong type before work starts.
    if earlier_values := available_values():
        with files.naming_damage(folder.path / CELLS):
            write(earlier_values)
    # Save each cell as it ends.
    for outcome in runner(work, tasks, start):
        (cell, cell_folder), index = tasks[outcome.position], todo[outcome.position]
        ended_count += 1
        # A failed cell does not stop the others; it is retried when the command runs again.
        if isinstance(outcome.result, Exception):
            failures.append(f"{cell} ({_record_failure(cell, cell_folder, outcome.result)})")
        else:
            cell_record = _save_cell(keys[index], cell, cell_folder, outcome.result, folder)
            finished[keys[index]] = cell_record
            journal.append(vars(cell_record))
            shutil.rmtree(cell_folder / CHECKPOINTS, ignore_errors=True)
            on_finish(index, cell_record.value, outcome)
        # Writing all results takes time, so it is not done after every short cell.
        if time.monotonic() - written_at > WRITE_INTERVAL:
            write(available_values())
            written_at = time.monotonic()
    if todo:
        _sort_journal(journal, keys)
    write(available_values())
    if failures:
        raise FailedError(
            f"{len(failures)} of {len(cells)} cells failed, the first {failures[0]}. The others have finished. Run the "
            "same command again to retry."
        )
    return available_values()


def _sort_journal(journal: Journal, keys: Sequence[str]) -> None:
    """Sort the journal by the order of the cells, so that its bytes do not depend on the order in which they ended.

    Lines of other cells, which an earlier run of the folder computed, come first in their order.
    """
    # Equal cells have one line, at the position of the first of them.
    position: dict[str, int] = {}
    for index, key in enumerate(keys):
        position.setdefault(key, index)
    lines = sorted(journal.entries, key=lambda line: position.get(line.get("key", ""), -1))
    if lines != journal.entries:
        journal.rewrite(lines)


def _save_cell(key: str, cell: Any, cell_folder: Path, value: Any, folder: RunFolder) -> FinishedCell:
    """Write the configuration of a finished cell that has files, and return its record."""
    products: list[str] = []
    (cell_folder / ERROR_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        cell_folder.rmdir()  # succeeds if the folder was created for the error alone
    if cell_folder.exists():
        files.write_whole(cell_folder / "cell.json", json.dumps(as_json(cell), indent=2, sort_keys=True) + "\n")
        paths = sorted(path for path in cell_folder.rglob("*") if path.is_file())
        inner = [path for path in paths if path.relative_to(cell_folder).parts[0] != CHECKPOINTS]
        products = [str(path.relative_to(folder.path)) for path in inner]
    # Convert the value as reading the journal would, so that a resumed run has the same bits.
    plain = json.loads(json.dumps(value, default=lambda number: number.item()))
    return FinishedCell(key, as_json(cell), plain, products)


def _record_failure(cell: Any, cell_folder: Path, error: Exception) -> str:
    """Write the traceback of a failed cell, log a warning and return the error as text.

    Raises:
      InputError: The disk is full, which is not the cell's fault.
    """
    # On a full disk every further cell would fail, so the run stops.
    if files.is_disk_error(error):
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise InputError(f"{cell_folder}: cannot be written ({reason}). Use a disk with free space.") from error
        raise error
    description = f"{type(error).__name__}: {error}"
    # A traceback that cannot be written must not replace the error itself.
    with contextlib.suppress(InputError, OSError):
        cell_folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(cell_folder / ERROR_FILE, "".join(traceback.format_exception(error)))
    logger.warning("%s failed (%s); its traceback is in %s", cell, description, cell_folder / ERROR_FILE)
    return description
