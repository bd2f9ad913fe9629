"""Journals: files of JSON lines that grow during a run."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.runs.files import append, parse_json, read_bytes, write_whole


class Journal:
    """File of JSON objects, one a line. An incomplete last line, left by a killed process, is dropped.

    Args:
      path: Path of the journal, which need not exist.

    Attributes:
      entries: Entries of all lines.

    Raises:
      InputError: A line is not a JSON object; the message names the file and the line.
    """

    def __init__(self, path: Path) -> None:
        """Read the journal, if it exists, and cut an incomplete last line off the file."""
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if os.path.lexists(path):
            self.entries, length = _read(path)
            if length < path.stat().st_size:
                os.truncate(path, length)

    def append(self, entry: dict[str, Any], *, sync: bool = True) -> None:
        """Append one line.

        Args:
          entry: Entry of the line.
          sync: Whether to wait until the disk has the line, see `rora_theory.runs.files.append`.
        """
        append(self.path, json.dumps(entry) + "\n", sync=sync)
        self.entries.append(entry)

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Replace all lines by the given entries."""
        write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self.entries = list(entries)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a journal without changing it. An incomplete last line is left out.

    Raises:
      InputError: The file does not exist, or a line is not a JSON object.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a journal, and the number of bytes of its complete lines."""
    data = read_bytes(path)
    complete = data[: data.rfind(b"\n") + 1]
    entries = []
    for number, line in enumerate(complete.splitlines(), start=1):
        entry: Any = None
        with contextlib.suppress(ValueError):  # InputError and UnicodeDecodeError
            entry = parse_json(line.decode(), where=str(path))
        if not isinstance(entry, dict):
            raise InputError(
                f"{path}: line {number} is damaged. Restore the file, or remove the line and run the same command "
                "again."
            )
        entries.append(entry)
    return entries, len(complete)
