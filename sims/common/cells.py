"""Cells as a command works on them: `rora_theory.runs.cells` with a progress bar, and a line for each that is done."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rora_theory.io import frames
from rora_theory.runs import cells as engine
from rora_theory.runs.cells import Cell, CellOutcome, Runner, Work, in_process
from rora_theory.runs.folder import RunFolder
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
    words: Callable[[Any], str] | None = None,
    write: Callable[[list[Any]], object] = lambda values: None,
) -> list[Any]:
    """`rora_theory.runs.cells.run_cells`, beside a bar with this ``title``.

    With ``words`` of a result, a line is printed with each cell that is done; where a cluster worked, one at the end.
    """
    nodes: Counter[str] = Counter()

    def done(index: int, value: Any, ended: CellOutcome) -> None:
        nodes.update([ended.node] if ended.node else [])
        if words is not None:
            print(f"[{index + 1}/{len(cells)}] {cells[index]}: {words(value)}, {ended.seconds:.0f} s", flush=True)

    with progress_bar(title, len(cells), fields="{cell}") as bar:
        found = engine.run_cells(
            cells, work, folder, runner=runner, on_start=lambda cell, passed: bar.reach(passed, cell=cell),
            on_finish=done, write=write,
        )  # fmt: skip
    if nodes:
        shares = ", ".join(f"{count} on node {node}" for node, count in nodes.most_common())
        print(f"{title} done here: {shares}; the session's entry in manifest.json says which, and seconds", flush=True)
    return found


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
    """`run_with_bar` where a cell's result is rows of a table: the table, also written as the cells come."""

    def table(parts: list[Any]) -> "pd.DataFrame":
        return frames.from_rows((row for part in parts for row in part), columns)

    def write(parts: list[Any]) -> None:
        folder.write_frame(table(parts), name)

    return table(run_with_bar(cells, work, folder, runner=runner, title=title, write=write))
