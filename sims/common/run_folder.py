"""Run folders: ``results/NAME/RUN_ID/`` with `manifest.json` and `results.csv`, whole after any kill."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError

PACKAGES = ("rora-theory", "jax", "jaxlib", "numpy", "scipy", "optax")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path`` and rename it there: readers see the old file or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def as_json(value: Any) -> Any:
    """``value`` as plain JSON types: dataclasses to dicts, paths to strings, tuples to lists, non-finite to text."""
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


class RunFolder:
    """One run's folder: opened by its configuration, resumed by the same configuration, refused to any other.

    Attributes:
      path: the folder.
      resumed: whether it held an earlier part of the same run.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, resumed: bool) -> None:
        self.path, self._manifest, self.resumed = path, manifest, resumed

    @classmethod
    def open(
        cls,
        name: str,
        config: Any,
        *,
        out: Path | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "RunFolder":
        """Open or make the folder of a run, and write its manifest with status ``running``.

        Args:
          name: the experiment, ``results/NAME``.
          config: dataclass or mapping: everything that determines the results. Leave out what does not (devices,
            output folder), so that a run may go on elsewhere.
          out: the folder; None is ``results/NAME/RUN_ID`` with RUN_ID the configuration's hash.
          seed: written to the manifest.
          extra: further entries of the manifest (units, device, protocol).

        Raises:
          InputError: the folder can't be written, holds another run, or holds files but no readable manifest.
        """
        plain = as_json(config)
        identity = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
        path = Path(out) if out is not None else Path("results") / name / identity
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; accepted is a folder to write the run to")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be made ({error.strerror}); accepted is a writable folder") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written to; accepted is a writable folder")
        manifest_path = path / "manifest.json"
        resumed = manifest_path.exists()
        if resumed:
            manifest = _read_manifest(manifest_path)
            if manifest["experiment"] != name or manifest["config"] != plain:
                raise InputError(
                    f"{path}: holds a run with other arguments ({_difference(manifest, name, plain)}); accepted is an "
                    "empty folder or one of the same arguments"
                )
        elif any(entry for entry in path.iterdir() if not entry.name.startswith(".")):
            raise InputError(f"{path}: holds files but no manifest.json; accepted is an empty folder or a run's own")
        else:
            manifest = {"experiment": name, "config": plain, "seed": seed, "start": _now()}
        manifest |= {"status": "running", "end": None, "command": sys.argv[1:]} | circumstances()
        manifest |= as_json(dict(extra or {}))
        folder = cls(path, manifest, resumed=resumed)
        folder._write_manifest()
        return folder

    def update(self, **entries: Any) -> None:
        """Add or change entries of the manifest."""
        self._manifest |= as_json(entries)
        self._write_manifest()

    def finish(self, status: str = "complete", **entries: Any) -> None:
        """Mark the run as ended, with its end time."""
        self.update(status=status, end=_now(), **entries)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write the file ``name`` of this run whole."""
        write_whole(self.path / name, content)
        return self.path / name

    def write_rows(self, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], name: str = "results.csv") -> Path:
        """Write a tidy CSV whole; floats keep every digit (``repr``), None is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in columns])
        return self.write(name, text.getvalue())

    def read_rows(self, columns: Sequence[str], name: str = "results.csv") -> list[dict[str, str]]:
        """The rows of an earlier part of this run; none where there is no file.

        Raises:
          InputError: the file is not what `write_rows` wrote, with the line.
        """
        path = self.path / name
        if not path.exists():
            return []
        return read_rows(path, columns)

    def _write_manifest(self) -> None:
        write_whole(self.path / "manifest.json", json.dumps(self._manifest, indent=2, sort_keys=True) + "\n")


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV that must have exactly ``columns``.

    Raises:
      InputError: unreadable, other columns, or a line with another number of fields; names the line.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; accepted is the file as the run wrote it"
        ) from error
    if text and not text.endswith("\n"):
        raise InputError(f"{path}: line {text.count(chr(10)) + 1} is cut off; accepted is the file as the run wrote it")
    lines = list(csv.reader(io.StringIO(text)))
    if not lines or lines[0] != list(columns):
        raise InputError(f"{path}: line 1 is not the header {','.join(columns)}")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise InputError(f"{path}: line {number} has {len(line)} fields; accepted are {len(columns)}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        manifest["experiment"], manifest["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); accepted is the file as the run wrote it") from error
    return manifest


def _difference(manifest: Mapping[str, Any], name: str, config: Any) -> str:
    if manifest["experiment"] != name:
        return f"it is a run of {manifest['experiment']}, this is {name}"
    old = manifest["config"]
    keys = [key for key in sorted(set(old) | set(config)) if old.get(key) != config.get(key)]
    return "; ".join(f"{key} there {old.get(key)!r}, here {config.get(key)!r}" for key in keys[:3])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def circumstances() -> dict[str, Any]:
    """What a manifest says of the software: Python, packages, revision of the source tree."""
    return {"python": platform.python_version(), "packages": _versions(), "git_revision": _git_revision()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Revision of the source tree, with ``+changes`` where the tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
