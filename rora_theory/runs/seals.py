"""Digests that detect changes of what a run wrote.

A seal is not a signature: a change of a value together with its digest is not detected. A seal detects flipped bytes,
truncated lines and values edited by hand.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, reason_of
from rora_theory.runs import digests, files

DIGEST = "digest"
"""Key of an entry's digest."""

RESTORE = "Restore the file as the run wrote it."
"""Advice at the end of a message about a damaged or changed file."""


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


def check_files(folder: Path, known: Mapping[str, str]) -> None:
    """Check that no file differs from its recorded SHA-256. A missing file is not a change.

    Args:
      folder: Folder of the run.
      known: Recorded digests by file name.

    Raises:
      InputError: A file was changed or cannot be read, or a name leads out of the folder.
    """
    manifest_path = folder / "manifest.json"
    paths = {name: files.resolve_inside(folder, name, where=manifest_path) for name in known}
    for name, path in paths.items():
        try:
            is_changed = path.is_file() and digests.of_file(path) != known[name]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}). {RESTORE}") from error
        if is_changed:
            raise InputError(
                f"{path}: was changed since the run wrote it. Restore the file, or remove it and run the command that "
                "wrote it again."
            )


def read_sealed(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a manifest, which must be unchanged since the run wrote it.

    Args:
      path: Path of the manifest.
      keys: Entries that it must have.

    Returns:
      The manifest without its digest.

    Raises:
      InputError: The manifest is damaged, lacks an entry, has no digest, or was changed.
    """
    try:
        manifest = files.read_json(path)
    except InputError as error:
        raise InputError(f"{path}: is damaged ({reason_of(error, path)}). {RESTORE}") from error
    missing = [key for key in keys if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise InputError(f"{path}: is damaged (it has no {missing[0]}). {RESTORE}")
    if not isinstance(manifest, dict) or DIGEST not in manifest:
        raise InputError(f"{path}: has no digest. {RESTORE}")
    if not is_sealed(manifest):
        raise InputError(f"{path}: was changed since the run wrote it. {RESTORE}")
    del manifest[DIGEST]
    return manifest


def check_unchanged(folder: Path, subfolder: str = "") -> None:
    """Check that the manifest and the files of a run are as the run wrote them.

    The files of a killed run have no digests, so that changes of them are not detected. A folder without a manifest
    has nothing to compare with.

    Args:
      folder: Folder of the run, with its ``manifest.json``.
      subfolder: Folder whose files are verified, such as ``cells/KEY``; by default ``folder`` itself.

    Raises:
      InputError: The manifest or a file directly in the requested folder was changed, is damaged or cannot be read.
    """
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        return
    with files.naming_damage(path):
        recorded = read_sealed(path).get("files") or {}
        known = {name: digest for name, digest in recorded.items() if name.rpartition("/")[0] == subfolder}
        check_files(folder, known)
