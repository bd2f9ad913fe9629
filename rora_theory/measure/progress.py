"""Progress bars of the measurements, which use and follow the settings of transformers' own bars."""

from typing import Any

from transformers.utils import logging


def progress_bar(total: int, *, description: str, unit: str, shown: bool) -> Any:
    """Return a progress bar as a context manager.

    Args:
      total: Number of units of work.
      description: Text before the bar.
      unit: Name of one unit of work.
      shown: Whether to show the bar; a hidden one accepts the same calls.
    """
    return logging.tqdm(total=total, desc=description, unit=unit, unit_scale=total > 10**4, disable=not shown)
