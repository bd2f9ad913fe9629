"""One progress bar for every command: on a terminal only, silent elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.table import Column


@contextmanager
def progress_bar(description: str, total: float, *, fields: str = "") -> Iterator["Bar"]:
    """A bar on stderr that vanishes when done; ``fields`` is a format string for live figures beside it.

    Example: ``with progress_bar("training", steps, fields="loss {loss:.3f}") as bar: bar.advance(1, loss=2.0)``
    """
    console = Console(file=sys.stderr)
    # The live figures take what room is left, so that the times stay on a narrow terminal.
    room = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    live = progress.TextColumn("{task.fields[text]}", table_column=room, markup=False)
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    size = progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=16), progress.MofNCompleteColumn()
    shown = console.is_terminal
    with progress.Progress(
        *size, *times, live, console=console, expand=True, transient=True, disable=not shown
    ) as bars:
        yield Bar(bars, bars.add_task(description, total=total, text=""), fields)


class Bar:
    """Handle of a `progress_bar`."""

    def __init__(self, bars: progress.Progress, task: int, fields: str) -> None:
        self._bars, self._task, self._fields = bars, task, fields

    def reach(self, steps: float, **values: object) -> None:
        """Have ``steps`` behind, not fewer than before."""
        self.advance(max(steps - self._bars.tasks[self._task].completed, 0), **values)

    def advance(self, steps: float = 1, **values: object) -> None:
        """Move on by ``steps``; ``values`` fill the bar's ``fields``."""
        text = {"text": self._fields.format(**values)} if values else {}
        self._bars.update(self._task, advance=steps, **text)  # type: ignore[arg-type]
