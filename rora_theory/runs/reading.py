"""Read the manifest and the finished cells of a run folder.

manifest.json        configuration, environment and sessions of the run
cells.jsonl          one line for each finished cell: key, configuration, result, names of its files
cells/KEY/           files of a cell that has any
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, reason_of, shown
from rora_theory.runs import files
from rora_theory.runs.journal import read_entries

RESTORE = "Restore the file as the run wrote it."
"""Advice at the end of a message about a damaged file."""

CELLS = "cells.jsonl"
CHECKPOINTS = "checkpoints"
"""Folder inside a cell's folder from which an interrupted cell resumes; removed when the cell is finished."""
LOCK = ".lock"
"""File that the owner of a folder locks (flock) and describes itself in. The kernel releases the lock if it dies."""

_ENTRIES = {
    "experiment": str,
    "run_id": str,
    "status": str,
    "config": dict,
    "sessions": list,
    "model_layers": int,
    "outputs": list,
}
_SESSION = {"status": str, "python": str, "packages": dict, "git_revision": str | None}
"""Types of the entries of a manifest and of its sessions that are read again. Any entry may be missing."""


def as_json(value: Any) -> Any:
    """Convert a value to JSON types: dataclasses to dicts, tuples to lists, paths and non-finite floats to text.

    Numbers of NumPy and JAX become Python numbers. Values of other types are returned unchanged.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of NumPy or JAX
        return as_json(value.item())
    # JSON has no NaN and no infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def flatten(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass and of all dataclasses nested in it as one dictionary by name."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        settings |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return settings


@dataclasses.dataclass(frozen=True)
class FinishedCell:
    """Finished cell as stored in its run folder.

    Attributes:
      key: Key of the cell, see `key_of`.
      cell: Configuration of the cell in JSON types.
      value: Result of the cell in JSON types.
      files: Paths of its files relative to the run folder.
    """

    key: str
    cell: Any
    value: Any
    files: Sequence[str]


def key_of(cell: Any) -> str:
    """Return the hash of the JSON text of a cell or of a configuration, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(as_json(cell), sort_keys=True).encode()).hexdigest()[:16]


def read_finished_cells(path: Path) -> dict[str, FinishedCell]:
    """Read the finished cells of a run folder, which may belong to another process.

    A cell with a missing file is left out, so that it is computed again.

    Args:
      path: Run folder.

    Returns:
      The cells by key, in the order in which they finished.

    Raises:
      InputError: A line is damaged, its key is not the hash of its cell, or it names a file outside the folder.
    """
    if read_manifest(path, ()) is None or not os.path.lexists(path / CELLS):
        return {}
    # A cell that was computed again has a later line, which replaces the earlier one.
    cells: dict[str, FinishedCell] = {}
    for number, entry in enumerate(read_entries(path / CELLS), start=1):
        cell = _parse_cell(path, entry, f"{path / CELLS}: line {number}")
        cells[cell.key] = cell
    return {key: cell for key, cell in cells.items() if all((path / name).exists() for name in cell.files)}


def _parse_cell(folder: Path, entry: Mapping[str, Any], where: str) -> FinishedCell:
    """Parse an entry of the journal. The key names a folder, so it must be the hash of the cell."""
    with files.naming_damage(where):
        key, cell = entry["key"], entry["cell"]
        if key != key_of(cell):
            raise InputError(f"{where}: key {shown(key)} is not the hash of its cell. {RESTORE}")
        for name in entry["files"]:
            files.resolve_inside(folder, name, where=where)
        return FinishedCell(key, cell, entry["value"], list(entry["files"]))


def read_manifest(path: Path, keys: Sequence[str]) -> dict[str, Any] | None:
    """Read the manifest of a run.

    Args:
      path: Run folder.
      keys: Entries that the manifest must have.

    Returns:
      The manifest, or None if the folder is empty or does not exist.

    Raises:
      InputError: The manifest is damaged, lacks an entry, or is missing although the folder has files.
    """
    file = path / "manifest.json"
    # Without a manifest the folder must be empty: files of unknown origin are not overwritten.
    if not os.path.lexists(file):
        if path.is_dir() and any(entry for entry in path.iterdir() if not entry.name.startswith(".")):
            raise InputError(f"{path}: holds files but no manifest.json. Use an empty folder or the folder of a run.")
        return None
    try:
        manifest = files.read_json(file)
    except InputError as error:
        raise InputError(f"{file}: is damaged ({reason_of(error, file)}). {RESTORE}") from error
    check_manifest(file, manifest)
    if missing := [key for key in keys if key not in manifest]:
        raise InputError(f"{file}: is damaged (it has no {missing[0]}). {RESTORE}")
    return manifest


def check_manifest(file: Path, manifest: Any) -> None:
    """Check the types of a manifest's entries.

    Args:
      file: Path of the manifest.
      manifest: Content of the manifest.

    Raises:
      InputError: The content is not an object, or an entry has another type.
    """
    _check_types(file, manifest, _ENTRIES)
    for session in manifest.get("sessions", []):
        _check_types(file, session, _SESSION, owner="a session's ")


def _check_types(file: Path, entries: Any, types: Mapping[str, Any], owner: str = "") -> None:
    if not isinstance(entries, dict):
        raise InputError(f"{file}: is damaged ({shown(entries)} is not an object). {RESTORE}")
    for name, kind in types.items():
        if name in entries and not isinstance(entries[name], kind):
            reason = f"{owner}{name} is {shown(entries[name])}, not {getattr(kind, '__name__', kind)}"
            raise InputError(f"{file}: is damaged ({reason}). {RESTORE}")
