"""Run cells from a command: `rora_theory.runs.cells` with a progress bar, and a line for each finished cell."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rora_theory.runs import cells as engine
from rora_theory.runs import frames
from rora_theory.runs.cells import Cell, CellOutcome, Runner, Work, in_process
from rora_theory.runs.folder import RunFolder
from sims.common import tables
from sims.common.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd


def run_with_bar(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    *,
    runner: Runner = in_process,
    title: str = "cells",
    describe: Callable[[Any], str] | None = None,
    write: Callable[[list[Any]], object] = lambda values: None,
) -> list[Any]:
    """Run `rora_theory.runs.cells.run_cells` under a progress bar.

    If cells ran on the nodes of a cluster, a line with the number of cells of each node is printed at the end.

    Args:
      cells: Cells to run.
      work: Function that computes the result of a cell.
      folder: Run folder.
      runner: Function that runs the cells, in this process or on a cluster.
      title: Title of the bar.
      describe: Function that returns a description of a result for a line per finished cell; None prints no line.
      write: Function that writes the results so far.

    Returns:
      The results in the order of the cells.
    """
    cells_of_node: Counter[str] = Counter()

    def report_finish(index: int, value: Any, outcome: CellOutcome) -> None:
        cells_of_node.update([outcome.node] if outcome.node else [])
        if describe is not None:
            print(f"[{index + 1}/{len(cells)}] {cells[index]}: {describe(value)}, {outcome.seconds:.0f} s", flush=True)

    with progress_bar(title, len(cells), fields="{cell}") as bar:
        values = engine.run_cells(
            cells,
            work,
            folder,
            runner=runner,
            on_start=lambda cell, ended_count: bar.reach(ended_count, cell=cell),
            on_finish=report_finish,
            write=write,
        )
    # Cells that ran in this process have no node.
    if cells_of_node:
        counts = ", ".join(f"{count} on {node}" for node, count in cells_of_node.most_common())
        tables.print_text(f"{title} per node: {counts}.")
    return values


def run_table(
    cells: Sequence[Cell],
    work: Work[Cell],
    folder: RunFolder,
    columns: Sequence[str],
    *,
    runner: Runner = in_process,
    title: str,
    name: str = "results.csv",
) -> "pd.DataFrame":
    """Run cells whose results are rows of a table, and write the table every few seconds and at the end."""

    def table(parts: list[Any]) -> "pd.DataFrame":
        return frames.from_rows((row for part in parts for row in part), columns)

    def write(parts: list[Any]) -> None:
        folder.write_frame(table(parts), name)

    return table(run_with_bar(cells, work, folder, runner=runner, title=title, write=write))
