"""Figures that were computed from public sweeps, and that the package contains.

``benchmarks/public_sweeps.py FOLDER`` writes them from the original files. They stand for the sources whose licence
does not allow to copy the losses themselves.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rora_theory.evidence.sources import PACKAGE
from rora_theory.runs import frames
from rora_theory.scaling import check_choice

if TYPE_CHECKING:
    import pandas as pd

TABLES = (
    "best_rates", "exponents", "regrets", "absolute_rates", "calibration", "full_ratios", "loss_differences", "speeds",
)  # fmt: skip
"""Names of the tables."""

TEXT_COLUMNS = ("source", "model", "policy", "place", "old_place", "steps_of_fit")
"""Columns that are not read as numbers."""


def table_path(table: str) -> Path:
    """Return the path of a table in the package."""
    check_choice("table", table, TABLES)
    return Path(str(PACKAGE.joinpath("tables", f"{table}.csv")))


def read_table(table: str) -> "pd.DataFrame":
    """Read a table.

    Args:
      table: Name of the table, one of `TABLES`.

    Returns:
      The table; infinite regrets are those of runs that diverged.

    Raises:
      InputError: If there is no such table.
    """
    return frames.read_csv(table_path(table), text_columns=TEXT_COLUMNS)
