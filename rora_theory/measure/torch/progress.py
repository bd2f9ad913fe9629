"""Progress bars of the measurements: the bars of transformers, which the user can switch off there too."""

import time
from collections.abc import Callable
from typing import Any

from transformers.utils import logging


def bar(total: int, *, description: str, unit: str, shown: bool) -> Any:
    """Return a progress bar, as a context manager that shows nothing unless ``shown``.

    Args:
      total: Amount of work.
      description: Text before the bar, which states the cost.
      unit: Name of a unit of work.
      shown: Whether to show the bar.
    """
    return logging.tqdm(total=total, desc=description, unit=unit, unit_scale=total > 10**4, disable=not shown)


def seconds_of(work: Callable[[], Any]) -> float:
    """Return how long a function takes in its second call, when libraries are loaded."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_words(seconds: float) -> str:
    """Return a duration as a sentence states it.

    Examples:
      >>> in_words(0.4), in_words(41.0), in_words(190.0)
      ('1 s', '41 s', '3 min')
    """
    return f"{max(round(seconds), 1)} s" if seconds < 100 else f"{round(seconds / 60)} min"
