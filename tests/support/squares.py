"""Cells that take no time, for tests of their scheduling. ``python -m support.squares OUT [OPTIONS]`` runs them.

Files next to OUT control each cell, so that a test can make it wait, fail or end its process.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Square:
    """Cell that squares a number; ``marks`` is the test's folder."""

    side: int
    marks: str

    def __str__(self) -> str:
        return f"side {self.side}"


def cells(marks: Path, count: int = 6) -> list[Square]:
    """Return ``count`` squares."""
    return [Square(side, str(marks)) for side in range(1, count + 1)]


def work(cell: Square, folder: Path) -> dict[str, Any]:
    """Compute the area and write a file; each attempt is noted in the test's folder."""
    marks = Path(cell.marks)
    mark = marks / f"{cell.side}-{os.getpid()}-{time.time_ns()}.begun"
    mark.write_text(f"{folder} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    while (marks / f"{cell.side}.wait").exists():
        time.sleep(0.02)
    if (marks / f"{cell.side}.die").exists():
        os._exit(7)
    if (marks / f"{cell.side}.fail").exists():
        raise ValueError(f"no square of side {cell.side}")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "half").write_text("half")
    (folder / "losses.csv").write_text(f"loss\n{cell.side / 3}\n")
    return {"area": cell.side**2 / 3}


def hold(marks: Path, *sides: int) -> Callable[[], None]:
    """Make cells wait once they have started; return a function that releases them."""
    waits = [marks / f"{side}.wait" for side in sides]
    for wait in waits:
        wait.touch()

    def release() -> None:
        for wait in waits:
            wait.unlink()

    return release


def attempts(marks: Path, side: int) -> list[str]:
    """Return where a cell was started and with which GPUs, once for each attempt."""
    return [mark.read_text() for mark in sorted(marks.glob(f"{side}-*.begun"))]


@dataclass(frozen=True)
class SquaresOptions:
    """Options of the driver."""

    out: Path
    marks: Path
    cluster: Any
    count: int = 6


def add_squares(config: SquaresOptions) -> None:
    """Run the cells as an experiment does."""
    from rora_theory.runs.folder import RunFolder
    from sims.common.cells import run_with_bar

    runner = config.cluster.runner()
    folder = RunFolder.open("squares", {"unit": "m"}, out=config.out)

    def write(values: list[Any]) -> None:
        folder.write("results.csv", "".join(f"{value['area']}\n" for value in values))

    def describe(value: Any) -> str:
        return f"area {value['area']:.3f}"

    run_with_bar(cells(config.marks, config.count), work, folder, runner=runner, describe=describe, write=write)
    folder.finish()


def main(out: str, marks: str, *options: str) -> None:
    """Run the driver."""
    from rora_theory.runs.cluster import ClusterConfig
    from sims.common import cli

    cli.run_command(
        lambda: add_squares(SquaresOptions(Path(out), Path(marks), cli.parse(ClusterConfig, options, description="")))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
