"""Files of JSON lines that grow while a run goes on, each line sealed: what was cut or changed since is found."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.io.files import append, parse_json, read_bytes, write_whole
from rora_theory.runs import seals


class Journal:
    """A file of JSON lines, each sealed and bound to the line before it, the first to the run's identity.

    A last line that a kill cut off is dropped. Lines that were changed, moved or taken out are found.

    Args:
      path: need not be there.
      identity: of the run the lines belong to.
      mend: whether such an end is cut off the file too; not where another process may be writing it.

    Attributes:
      entries: of all lines, without their digests.

    Raises:
      InputError: a line is not as it was written; names the file and the line.
    """

    def __init__(self, path: Path, identity: str, *, mend: bool = True) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._digests = [identity]
        if not os.path.lexists(path):
            return
        data = read_bytes(path)
        whole = _whole_lines(data)
        for number, line in enumerate(whole.splitlines(), start=1):
            entry: Any = None
            with contextlib.suppress(InputError, UnicodeDecodeError):
                entry = parse_json(line.decode(), where=str(path))
            if not seals.is_sealed(entry, of=self._digests[-1]):
                raise InputError(
                    f"{path}: line {number} is damaged or was changed since the run wrote it; accepted is the file as "
                    f"the run wrote it, or without its lines from {number} on, which the same command makes again"
                )
            self._digests.append(entry.pop(seals.DIGEST))
            self.entries.append(entry)
        if mend and len(whole) < len(data):
            os.truncate(path, len(whole))

    def append(self, entry: dict[str, Any], *, sync: bool = True) -> None:
        """Write one line more; ``sync`` as for `append`."""
        sealed = seals.seal(entry, of=self._digests[-1])
        append(self.path, json.dumps(sealed) + "\n", sync=sync)
        self._digests.append(sealed[seals.DIGEST])
        self.entries.append(entry)

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Put ``entries`` in the place of all lines."""
        digests, lines = self._digests[:1], []
        for entry in entries:
            sealed = seals.seal(entry, of=digests[-1])
            digests.append(sealed[seals.DIGEST])
            lines.append(json.dumps(sealed) + "\n")
        write_whole(self.path, "".join(lines))
        self.entries, self._digests = list(entries), digests


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file as they stand, whatever run it is of; a last line that was cut off is left out.

    Raises:
      InputError: there is no such file, or a line is not a JSON object.
    """
    whole = _whole_lines(read_bytes(path))
    try:
        return [dict(parse_json(line.decode(), where=f"line {n}")) for n, line in enumerate(whole.splitlines(), 1)]
    except (ValueError, TypeError) as error:
        reason = str(error).partition("; accepted")[0]
        raise InputError(f"{path}: is damaged ({reason}); accepted is the file as the run wrote it") from error


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]
