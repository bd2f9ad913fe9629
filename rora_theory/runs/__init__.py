"""Run folders, ``results/NAME/RUN_ID/``: written whole, owned by one process, gone on with cell by cell, and read.

Examples:
  >>> import tempfile
  >>> from pathlib import Path
  >>> from rora_theory.runs import RunFolder
  >>> with tempfile.TemporaryDirectory() as place:
  ...     run = RunFolder.open("mine", {"ranks": (8, 32)}, out=Path(place) / "run")
  ...     path = run.write("answer.txt", "42")
  ...     run.finish()
  ...     run.entry("status"), RunFolder.open("mine", {"ranks": (8, 32)}, out=run.path).resumed
  ('complete', True)
"""

from rora_theory.runs.cells import run_cells
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import Finished, finished, read_manifest

__all__ = ["Finished", "RunFolder", "finished", "read_manifest", "run_cells"]
