"""Journals: files of JSON lines that grow during a run, with a digest in each line that detects later changes."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, reason_of
from rora_theory.runs import seals
from rora_theory.runs.files import append, parse_json, read_bytes, write_whole


class Journal:
    """File of JSON lines, each bound by its digest to the line before it and the first line to the run's identity.

    An incomplete last line, left by a killed process, is dropped. Changed, moved and removed lines are detected.

    Args:
      path: Path of the journal, which need not exist.
      identity: Identity of the run that the journal belongs to.
      repair: Whether to cut an incomplete last line off the file. Pass False if another process may be writing it.

    Attributes:
      entries: Entries of all lines, without their digests.

    Raises:
      InputError: A line is not as it was written; the message names the file and the line.
    """

    def __init__(self, path: Path, identity: str, *, repair: bool = True) -> None:
        """Read the journal, if it exists."""
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._digests = [identity]
        if not os.path.lexists(path):
            return
        data = read_bytes(path)
        complete_lines = _complete_lines(data)
        for number, line in enumerate(complete_lines.splitlines(), start=1):
            # A line that cannot be parsed is treated as a changed line.
            entry: Any = None
            with contextlib.suppress(InputError, UnicodeDecodeError):
                entry = parse_json(line.decode(), where=str(path))
            # Each line is sealed with the digest of the line before it, so that no line can be removed or moved.
            if not seals.is_sealed(entry, context=self._digests[-1]):
                raise InputError(
                    f"{path}: line {number} is damaged or was changed since the run wrote it. Restore the file, or "
                    f"remove its lines from {number} on and run the same command again."
                )
            self._digests.append(entry.pop(seals.DIGEST))
            self.entries.append(entry)
        # A killed process leaves an incomplete last line, which the resumed run writes again.
        if repair and len(complete_lines) < len(data):
            os.truncate(path, len(complete_lines))

    def append(self, entry: dict[str, Any], *, sync: bool = True) -> None:
        """Append one line.

        Args:
          entry: Entry of the line.
          sync: Whether to wait until the disk has the line, see `rora_theory.runs.files.append`.
        """
        sealed = seals.seal(entry, context=self._digests[-1])
        append(self.path, json.dumps(sealed) + "\n", sync=sync)
        self._digests.append(sealed[seals.DIGEST])
        self.entries.append(entry)

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Replace all lines by the given entries."""
        digests, lines = self._digests[:1], []
        for entry in entries:
            sealed = seals.seal(entry, context=digests[-1])
            digests.append(sealed[seals.DIGEST])
            lines.append(json.dumps(sealed) + "\n")
        write_whole(self.path, "".join(lines))
        self.entries, self._digests = list(entries), digests


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a journal of any run, without verifying their digests. An incomplete last line is dropped.

    Raises:
      InputError: The file does not exist, or a line is not a JSON object.
    """
    complete_lines = _complete_lines(read_bytes(path))
    try:
        return [
            dict(parse_json(line.decode(), where=f"line {number}"))
            for number, line in enumerate(complete_lines.splitlines(), start=1)
        ]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({reason_of(error)}). Restore the file as the run wrote it.") from error


def _complete_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]
