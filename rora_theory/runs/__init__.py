"""Run folders, ``results/NAME/RUN_ID/``: written atomically, owned by one process, resumed cell by cell, and read.

Examples:
  >>> import tempfile
  >>> from pathlib import Path
  >>> from rora_theory.runs import RunFolder
  >>> with tempfile.TemporaryDirectory() as parent:
  ...     run = RunFolder.open("my_experiment", {"ranks": (8, 32)}, out=Path(parent) / "run")
  ...     path = run.write("answer.txt", "42")
  ...     run.finish()
  ...     run.entry("status"), RunFolder.open("my_experiment", {"ranks": (8, 32)}, out=run.path).resumed
  ('complete', True)
"""

from rora_theory.runs.cells import run_cells
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import FinishedCell, read_finished_cells, read_manifest
from rora_theory.runs.summary import KeyFigure, write_summary

__all__ = [
    "FinishedCell",
    "KeyFigure",
    "RunFolder",
    "read_finished_cells",
    "read_manifest",
    "run_cells",
    "write_summary",
]
