"""One progress bar for every command: on a terminal only, silent elsewhere."""

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

TOGETHER = 1.0  # seconds within which results have come at once, and say nothing of the speed
PERIOD, FEWEST = 30.0, 5  # the speed is that of so many seconds, and of so many times at which results came


@contextmanager
def progress_bar(description: str, total: float, *, fields: str = "") -> Iterator["Bar"]:
    """A bar on stderr that vanishes when done; ``fields`` is a format string for live figures beside it.

    Examples:
      >>> with progress_bar("training", 1, fields="loss {loss:.3f}") as bar:
      ...     bar.advance(1, loss=2.0)
    """
    console = Console(file=sys.stderr)
    # The live figures take what room is left, so that the times stay on a narrow terminal.
    room = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    live = progress.TextColumn("{task.fields[text]}", table_column=room, markup=False)
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
        """Have ``steps`` behind, not fewer than before."""
        self.advance(max(steps - self._bars.tasks[self._task].completed, 0), **values)

    def advance(self, steps: float = 1, **values: object) -> None:
        """Move on by ``steps``; ``values`` fill the bar's ``fields``."""
        text = {"text": self._fields.format(**values)} if values else {}
        task = self._bars.tasks[self._task]
        self._pace.mark(self._bars.get_time(), task.completed + steps)
        self._bars.update(self._task, advance=steps, end=self._pace.end(task.total or 0), **text)  # type: ignore[arg-type]


class _Pace:
    """How much was done when, by which the end is told.

    Rich's own estimate is of the last 30 seconds, in which slow work has no two results, and of results that come
    several at once it makes a speed.
    """

    def __init__(self, begun: float) -> None:
        self._marks = deque([(begun, 0.0)])

    def mark(self, now: float, done: float) -> None:
        if now - self._marks[-1][0] < TOGETHER:  # at the beginning: what an earlier run has done
            now, _ = self._marks.pop()
        self._marks.append((now, done))
        while len(self._marks) > FEWEST and now - self._marks[1][0] > PERIOD:
            self._marks.popleft()

    def end(self, total: float) -> float | None:
        """When all will be done; None where nothing tells."""
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        return last + (total - done) * (last - first) / (done - before) if done > before else None


class _TimeLeft(progress.ProgressColumn):
    """The time to the end that is foreseen."""

    max_refresh = 0.5

    def render(self, task: progress.Task) -> Text:
        end = task.fields["end"]
        left = "-:--:--" if end is None else timedelta(seconds=math.ceil(max(end - task.get_time(), 0.0)))
        return Text(str(left), style="progress.remaining")
