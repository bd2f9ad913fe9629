"""What the folder of a run holds, read by whoever wants its results: the manifest, and the cells that are finished.

manifest.json        what the run is, sealed, with the digests of its files
cells.jsonl          a sealed line a finished cell: its key, what it is, its result, the digests of its files
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

from rora_theory.errors import InputError, shown
from rora_theory.io import files
from rora_theory.runs import seals
from rora_theory.runs.journal import Journal

CELLS = "cells.jsonl"
CHECKPOINTS = "checkpoints"
"""Of a cell's folder: what an interrupted cell goes on from; removed when the cell is done."""
LOCK = ".lock"
"""Held (flock) by the process that owns a folder, and says which; the kernel lets go of it when that dies."""

_ENTRIES = {
    "experiment": str,
    "run_id": str,
    "status": str,
    "config": dict,
    "files": dict,
    "sessions": list,
    "model_layers": int,
}
_SESSION = {"status": str, "python": str, "packages": dict, "git_revision": str | None, "cells": dict}
"""Types of the entries of a manifest and of its sessions that are read again. An entry may be absent."""


def as_json(value: Any) -> Any:
    """Convert a value to JSON types: dataclasses to dicts, tuples to lists, paths and non-finite floats to text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def flat(config: Any) -> dict[str, Any]:
    """The settings of a dataclass and of the dataclasses in it by their names, which are the options'."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished cell as its folder has it: its key, what it is in JSON types, its result, digests of its files."""

    key: str
    cell: Any
    value: Any
    files: Mapping[str, str]


def key_of(cell: Any) -> str:
    """The hash of a cell, or of a configuration, as JSON: of 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(as_json(cell), sort_keys=True).encode()).hexdigest()[:16]


def finished(path: Path) -> dict[str, Finished]:
    """The finished cells of a run folder, by key, in the order they were finished in; whoever drives it.

    One of which a file was removed is not among them: it is done again.

    Raises:
      InputError: a line is not as the run wrote it, its key is not the hash of its cell, or it names a file outside
        the folder.
    """
    manifest = read_manifest(path, ("run_id",))
    if manifest is None:
        return {}
    found: dict[str, Finished] = {}
    for number, entry in enumerate(Journal(path / CELLS, manifest["run_id"], mend=False).entries, start=1):
        one = _cell_of(entry, f"{path / CELLS}: line {number}")
        found[one.key] = one
    return {
        key: one
        for key, one in found.items()
        if all(files.resolve_inside(path, name, where=path / CELLS).exists() for name in one.files)
    }


def _cell_of(entry: Mapping[str, Any], where: str) -> Finished:
    """Parse a line of a finished cell, whose key names a folder and must therefore be the hash of the cell."""
    with files.naming_damage(where):
        key, cell = entry["key"], entry["cell"]
        if key != key_of(cell):
            raise InputError(f"{where}: key {shown(key)} is not the hash of its cell; accepted is the line as written")
        return Finished(key, cell, entry["value"], dict(entry["files"]))


def read_manifest(path: Path, keys: Sequence[str]) -> dict[str, Any] | None:
    """A run's manifest, with at least ``keys``; None where a folder holds nothing yet.

    Raises:
      InputError: it is damaged, was changed, is of a version that kept no digests, or is missing beside other files.
    """
    file = path / "manifest.json"
    if not os.path.lexists(file):
        if path.is_dir() and any(entry for entry in path.iterdir() if not entry.name.startswith(".")):
            raise InputError(
                f"{path}: holds files but no manifest.json; accepted is an empty folder or a run's own"
            ) from None
        return None
    try:
        manifest = files.read_json(file)
    except InputError as error:
        reason = str(error).removeprefix(f"{file}: ").partition("; accepted")[0]
        raise InputError(f"{file}: is damaged ({reason}); accepted is the file as the run wrote it") from error
    missing = [key for key in keys if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise InputError(f"{file}: is damaged (it has no {missing[0]}); accepted is the file as the run wrote it")
    if seals.DIGEST not in manifest:
        raise InputError(
            f"{file}: has no digest, as a run of an earlier version has none; accepted is another folder (--out)"
        )
    if not seals.is_sealed(manifest):
        raise InputError(f"{file}: was changed since the run wrote it; accepted is the file as the run wrote it")
    del manifest[seals.DIGEST]
    check_manifest(file, manifest)
    return dict(manifest)


def check_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Check the types of a manifest's entries, and that the files it lists are in its folder.

    Args:
      file: The manifest's path.
      manifest: Its content.

    Raises:
      InputError: An entry has another type, or a listed file is outside the folder.
    """
    _check_types(file, manifest, _ENTRIES)
    for session in manifest.get("sessions", []):
        _check_types(file, session, _SESSION, of="a session's ")
    for name, digest in manifest.get("files", {}).items():
        files.resolve_inside(file.parent, name, where=file)
        _check_types(file, {name: digest}, {name: str})


def _check_types(file: Path, entries: Any, types: Mapping[str, Any], of: str = "") -> None:
    if not isinstance(entries, dict):
        raise InputError(
            f"{file}: is damaged ({shown(entries)} is no object); accepted is the file as the run wrote it"
        )
    for name, kind in types.items():
        if name in entries and not isinstance(entries[name], kind):
            what = f"{of}{name} is {shown(entries[name])}, not {getattr(kind, '__name__', kind)}"
            raise InputError(f"{file}: is damaged ({what}); accepted is the file as the run wrote it")


def check_files(folder: Path, known: Any) -> None:
    """Raise `InputError` where one of a folder's files is not the one of the digests ``known``; names it."""
    for name in seals.changed_files(folder, known):
        raise InputError(
            f"{folder / name}: was changed since the run wrote it; accepted is the file as the run wrote it, or none: "
            "removed, it is made again by the same command"
        )
