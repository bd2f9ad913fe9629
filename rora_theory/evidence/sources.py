"""Public sweeps: who published them, at which commit, under which licence and with which settings, and their tables.

The tables are figures that were computed from the sweeps, and that the package contains. They stand for the sources
whose licence does not allow to copy the losses themselves. ``benchmarks/public_sweeps.py FOLDER`` writes them from the
original files.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from rora_theory.errors import InputError
from rora_theory.runs import frames
from rora_theory.scaling import check_choice

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = files("rora_theory.evidence")
"""Folder of the package's data files."""


@dataclass(frozen=True)
class Source:
    """A public sweep and its settings.

    Attributes:
      name: Short name of the source.
      title: Name in tables and figures.
      repository: GitHub repository.
      path: Path of the figures in the repository; empty if it was not recorded.
      commit: Commit of the repository.
      licence: Licence of the repository; ``"none stated"`` if it states none.
      file: File of the package with the losses; None if the licence does not allow copies.
      original: Name of the file with the losses in a folder of originals, see `original_path`.
      models: Models of the runs.
      alpha: Alpha of the adapters.
      rule: Scaling rule of the adapters.
      ranks: Ranks of the adapters.
      targets: Adapted modules.
      data: Training data.
      optimizer: Optimizer.
      batch_size: Number of examples in a batch.
      steps: Number of optimizer steps.
      schedule: Learning-rate schedule.
      loss: Loss that was reported, with its unit.
      seeds: Number of runs of each setting.
      remarks: Further limits of the source.
    """

    name: str
    title: str
    repository: str
    path: str
    commit: str
    licence: str
    file: str | None
    original: str
    models: str
    alpha: str
    rule: str
    ranks: str
    targets: str
    data: str
    optimizer: str
    batch_size: int
    steps: int
    schedule: str
    loss: str
    seeds: str
    remarks: str


SOURCES: dict[str, Source] = {
    name: Source(name, **entry) for name, entry in json.loads(PACKAGE.joinpath("sources.json").read_text()).items()
}
"""Public sweeps by name."""

SWEEPS = ("tinker", "qwen2.5-7b", "qwen3-4b")
"""Sources of losses by rank and rate, from which best rates and regrets are computed."""

HISTORIES = "apertus"
"""Source of the loss of every step."""


def original_path(source: str, folder: Path) -> Path:
    """Return the path of a source's losses in a folder of originals.

    Args:
      source: Name of the source.
      folder: Folder with the files that the sources' authors published, as CSV.

    Raises:
      InputError: If the source is unknown, or the folder does not have its file.
    """
    check_choice("source", source, SOURCES)
    path = folder / SOURCES[source].original
    if not path.is_file():
        raise InputError(f"{folder} must contain {path.name}, the losses of {SOURCES[source].title}")
    return path


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
