"""Progress bars of the measurements, which use and follow the settings of transformers' own bars."""

import time
from collections.abc import Callable
from typing import Any

from transformers.utils import logging


def bar(total: int, *, description: str, unit: str, shown: bool) -> Any:
    """Return a progress bar as a context manager.

    Args:
      total: Number of units of work.
      description: Text before the bar, which states the cost.
      unit: Name of one unit of work.
      shown: Whether to show the bar; a hidden one accepts the same calls.
    """
    return logging.tqdm(total=total, desc=description, unit=unit, unit_scale=total > 10**4, disable=not shown)


def time_shortest_call(work: Callable[[], Any], calls: int = 4) -> float:
    """Return the duration in seconds of a function's shortest call.

    The shortest call excludes the loading of libraries and moments in which another process has the processor.
    """
    durations = []
    for _ in range(calls):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return min(durations)


def format_duration(seconds: float) -> str:
    """Format a duration in seconds or minutes.

    Examples:
      >>> format_duration(0.4), format_duration(41.0), format_duration(190.0)
      ('1 s', '41 s', '3 min')
    """
    return f"{max(round(seconds), 1)} s" if seconds < 100 else f"{round(seconds / 60)} min"
