"""The progress bar of the commands, shown only on a terminal."""

import math
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

BURST_SECONDS = 1.0
"""Results within this time of each other count as simultaneous: their spacing is not a measure of the speed."""

WINDOW_SECONDS, MIN_MARKS = 30.0, 5
"""The speed is measured over the last 30 seconds, but over at least five times at which results arrived."""


@contextmanager
def progress_bar(description: str, total: float, *, fields: str = "") -> Iterator["Bar"]:
    """Show a progress bar on standard error while the block runs.

    Args:
      description: Title of the bar.
      total: Number of steps.
      fields: Format string of the values that are shown after the times.

    Yields:
      Handle that advances the bar.

    Examples:
      >>> with progress_bar("training", 1, fields="loss {loss:.3f}") as bar:
      ...     bar.advance(1, loss=2.0)
    """
    console = Console(file=sys.stderr)
    # The values take the remaining width, so that the times stay visible on a narrow terminal.
    remaining_width = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    live = progress.TextColumn("{task.fields[text]}", table_column=remaining_width, markup=False)
    times = progress.TimeElapsedColumn(), _TimeLeft()
    size = progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=16), progress.MofNCompleteColumn()
    shown = console.is_terminal
    with progress.Progress(
        *size, *times, live, console=console, expand=True, transient=True, disable=not shown
    ) as bars:
        yield Bar(bars, bars.add_task(description, total=total, text="", end=None), fields)


class Bar:
    """Handle of a `progress_bar`."""

    def __init__(self, bars: progress.Progress, task: int, fields: str) -> None:
        self._bars, self._task, self._fields = bars, task, fields
        self._pace = _Pace(bars.get_time())

    def reach(self, steps: float, **values: object) -> None:
        """Move the bar forward to ``steps``; it never moves back."""
        self.advance(max(steps - self._bars.tasks[self._task].completed, 0), **values)

    def advance(self, steps: float = 1, **values: object) -> None:
        """Advance the bar.

        Args:
          steps: Number of steps to add.
          **values: Values for the format string ``fields``.
        """
        text = {"text": self._fields.format(**values)} if values else {}
        task = self._bars.tasks[self._task]
        self._pace.mark(self._bars.get_time(), task.completed + steps)
        self._bars.update(self._task, advance=steps, end=self._pace.end(task.total or 0), **text)  # type: ignore[arg-type]


class _Pace:
    """Times at which results arrived, from which the end is estimated.

    Rich's own estimate uses the last 30 seconds, in which slow work may not have two results, and it takes the spacing
    of simultaneous results for the speed.
    """

    def __init__(self, start: float) -> None:
        self._marks = deque([(start, 0.0)])

    def mark(self, now: float, done: float) -> None:
        # Simultaneous results share one mark; at the start these are the results of an earlier run.
        if now - self._marks[-1][0] < BURST_SECONDS:
            now, _ = self._marks.pop()
        self._marks.append((now, done))
        while len(self._marks) > MIN_MARKS and now - self._marks[1][0] > WINDOW_SECONDS:
            self._marks.popleft()

    def end(self, total: float) -> float | None:
        """Estimate the time at which all steps are done; None before the first result."""
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        return last + (total - done) * (last - first) / (done - before) if done > before else None


class _TimeLeft(progress.ProgressColumn):
    """Column with the estimated remaining time."""

    max_refresh = 0.5

    def render(self, task: progress.Task) -> Text:
        end = task.fields["end"]
        left = "-:--:--" if end is None else timedelta(seconds=math.ceil(max(end - task.get_time(), 0.0)))
        return Text(str(left), style="progress.remaining")
