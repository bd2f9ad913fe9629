"""Digests that detect changes of what a run wrote.

A seal is not a signature: a change of a value together with its digest is not detected. A seal detects flipped bytes,
truncated lines and values edited by hand.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, reason_of
from rora_theory.io import digests, files

DIGEST = "digest"
"""Key of an entry's digest."""


def seal(entry: Mapping[str, Any], *, context: str = "") -> dict[str, Any]:
    """Return an entry with its digest, the first 16 hexadecimal digits of the SHA-256 of its JSON text.

    Args:
      entry: Entry of JSON types; a digest in it is replaced.
      context: Text that the digest also covers, such as the digest of the previous entry. The seal is invalid in any
        other context.
    """
    plain = {name: value for name, value in entry.items() if name != DIGEST}
    text = context + json.dumps(plain, sort_keys=True)
    return plain | {DIGEST: hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_sealed(entry: Any, *, context: str = "") -> bool:
    """Return whether an entry is unchanged since `seal` returned it with the same context."""
    return isinstance(entry, Mapping) and DIGEST in entry and seal(entry, context=context)[DIGEST] == entry[DIGEST]


def changed_files(folder: Path, known: Mapping[str, str]) -> list[str]:
    """Return the names of the files whose SHA-256 differs from the recorded one. A missing file is not a change.

    Args:
      folder: Folder of the run.
      known: Recorded digests by file name.

    Raises:
      InputError: A file cannot be read, or a name leads out of the folder.
    """
    manifest_path = folder / "manifest.json"
    paths = {name: files.resolve_inside(folder, name, where=manifest_path) for name in known}
    return [name for name, path in paths.items() if path.is_file() and digests.of_file(path) != known[name]]


def describe_problem(folder: Path, subfolder: str = "") -> str | None:
    """Describe the first difference between a run's folder and what the run wrote.

    The files of a killed run have no digests, so that changes of them are not detected.

    Args:
      folder: Folder of the run, with its ``manifest.json``.
      subfolder: Folder whose files are verified, such as ``cells/KEY``; by default ``folder`` itself.

    Returns:
      The difference, or None if there is none or the folder has no manifest.
    """
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        return None
    try:
        manifest = files.read_json(path)
        if DIGEST not in manifest:
            return f"{path}: has no digest"
        if not is_sealed(manifest):
            return f"{path}: was changed since the run wrote it"
        # Digests of the files directly in the requested folder.
        recorded = manifest.get("files") or {}
        verified = {name: digest for name, digest in recorded.items() if name.rpartition("/")[0] == subfolder}
        for name in changed_files(folder, verified):
            return f"{folder / name}: was changed since the run wrote it"
    except InputError as error:
        return f"{path}: is damaged ({reason_of(error, path)})"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path}: is damaged ({error})"
    return None
