"""The progress bar of the commands, shown only on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.table import Column

SPEED_SECONDS = 600.0
"""Time over which the speed is measured: cells of a sweep take minutes."""


@contextmanager
def progress_bar(description: str, total: float, *, fields: str = "") -> Iterator["Bar"]:
    """Show a progress bar on standard error while the block runs.

    Yields:
      Handle that advances the bar.

    Examples:
      >>> with progress_bar("training", 1, fields="loss {loss:.3f}") as bar:
      ...     bar.advance(1, loss=2.0)
    """
    console = Console(file=sys.stderr)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=16),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        # The values take the remaining width, so that the times stay visible on a narrow terminal.
        progress.TextColumn(
            "{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1), markup=False
        ),
    )
    with progress.Progress(
        *columns,
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=SPEED_SECONDS,
    ) as bars:
        yield Bar(bars, bars.add_task(description, total=total, text=""), fields)


class Bar:
    """Handle of a `progress_bar`."""

    def __init__(self, bars: progress.Progress, task: progress.TaskID, fields: str) -> None:
        self._bars, self._task, self._fields = bars, task, fields

    def reach(self, steps: float, **values: object) -> None:
        """Move the bar forward to ``steps``; it never moves back."""
        self.advance(max(steps - self._bars.tasks[self._task].completed, 0), **values)

    def advance(self, steps: float = 1, **values: object) -> None:
        """Advance the bar."""
        self._bars.update(self._task, advance=steps)
        if values:
            self._bars.update(self._task, text=self._fields.format(**values))
