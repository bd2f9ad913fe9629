"""Finished cells of a run, in `cells.jsonl`: the one place that experiments resume from.

A cell is a part of a run that is done once: a pure function of the run's configuration and the cell's name. Its result
is kept in a sealed line as soon as it is there. Tables and figures are made from these lines, never read back.
"""

import json
from collections.abc import Callable
from typing import Any

from sims.common.disk import Journal
from sims.common.run_folder import RunFolder

CELLS = "cells.jsonl"


class Cells:
    """The cells of a run that are done.

    Args:
      folder: of the run.
      name: of the file.

    Raises:
      InputError: a line is not as the run wrote it; names the file and the line.
    """

    def __init__(self, folder: RunFolder, name: str = CELLS) -> None:
        self._journal = Journal(folder.path / name, folder.identity)
        self._done = {entry["cell"]: entry["value"] for entry in self._journal.entries}

    def __contains__(self, cell: str) -> bool:
        return cell in self._done

    def __len__(self) -> int:
        return len(self._done)

    def do(self, cell: str, work: Callable[[], Any]) -> Any:
        """A cell's result: that of an earlier part of the run, or of ``work``, then kept.

        Args:
          cell: its name, different from all others of the run.
          work: returns JSON types; numpy's numbers become Python's.

        Raises:
          InputError: a disk that is full; the cells before are kept.
        """
        if cell not in self._done:
            # As it will be read back, so that a run that goes on has the same bits.
            value = json.loads(json.dumps(work(), default=lambda number: number.item()))
            self._journal.append({"cell": cell, "value": value})
            self._done[cell] = value
        return self._done[cell]
