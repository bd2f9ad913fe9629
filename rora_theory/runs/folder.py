"""Run folders, ``results/NAME/RUN_ID/``, with `manifest.json` and `results.csv`: intact after any interruption."""

import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rora_theory.errors import InputError
from rora_theory.runs import files, frames, lock, software
from rora_theory.runs.reading import as_json, key_of, read_manifest

if TYPE_CHECKING:
    import pandas as pd


logger = logging.getLogger(__name__)

_open_folders: "dict[Path, RunFolder]" = {}
"""Folders that this process owns, by their resolved paths."""


def count_open() -> int:
    """Return the number of run folders that this process owns."""
    return len(_open_folders)


def check_free(path: Path) -> None:
    """Check that no other process owns a folder, before records and weights are read in vain.

    Raises:
      InputError: Another process owns the folder.
    """
    if path.resolve() not in _open_folders:
        lock.check_unowned(path)


def path_of(name: str, config: Any, out: Path | None = None) -> Path:
    """Return the folder that `RunFolder.open` opens: ``out``, or ``results/NAME/RUN_ID``."""
    return Path(out) if out is not None else Path("results") / name / _identity(config)


def _identity(config: Any) -> str:
    """Return the hash of a run's configuration, 12 hexadecimal digits."""
    return key_of(config)[:12]


def end_all(status: str, error: str | None = None, *, skip: int = 0) -> None:
    """Stop the open run folders, the latest first.

    Args:
      status: Status written to the manifests.
      error: Error message written to the manifests.
      skip: Number of folders, opened first, that stay open.
    """
    for folder in reversed(list(_open_folders.values())[skip:]):
        folder.stop(status, error)


@runtime_checkable
class WeightSource(Protocol):
    """Source of a model's weights, such as `rora_theory.lab.llama.ModelSource`."""

    @property
    def summary(self) -> str:
        """One line with the name, storage, origin and digest of the weights."""

    def manifest_entries(self) -> dict[str, Any]:
        """Return the details of the weights that a run's manifest records."""


class RunFolder:
    """Folder of one run, which the same configuration resumes and any other configuration cannot open.

    One process owns the folder, from `open` to `finish` or `stop`, or until the process ends.

    Attributes:
      path: Path of the folder.
      identity: Hash of the experiment's configuration.
      resumed: Whether the folder held an earlier part of the same run.
    """

    def __init__(
        self, path: Path, identity: str, manifest: dict[str, Any], lock_descriptor: int, *, resumed: bool
    ) -> None:
        self.path, self.identity, self.resumed = path, identity, resumed
        self._manifest, self._lock = manifest, lock_descriptor
        self._opened_at = time.monotonic()

    @classmethod
    def open(
        cls,
        name: str,
        config: Any,
        *,
        out: Path | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
        models: Collection[WeightSource] = (),
    ) -> "RunFolder":
        """Open or create the folder of a run, own it, and write its manifest with status ``running``.

        A run that is resumed with other software versions logs a warning.

        Args:
          name: Name of the experiment, ``results/NAME``.
          config: Dataclass or mapping with everything that determines the results. Leave out what does not (devices,
            output folder), so that a run can be resumed elsewhere.
          out: Path of the folder; None is ``results/NAME/RUN_ID`` with RUN_ID the configuration's hash.
          seed: Seed written to the manifest.
          extra: Further entries of the manifest, such as units, device and protocol.
          models: Models that the run reads. The storage format of their weights is logged and written to the manifest.

        Raises:
          InputError: The folder cannot be written, belongs to another process, holds another run, holds files but no
            readable manifest, or has a symbolic link that leads out of it or nowhere.
        """
        plain = as_json(config)
        identity, path = _identity(plain), path_of(name, plain, out)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path}: cannot be created ({reason}). Use a writable folder.") from error
        if stale := _open_folders.get(path.resolve()):  # left open by an error in this process
            stale._release()
        # Refuse a folder of another run before anything is written to it.
        _read_previous(path, name, plain)
        files.check_links(path)
        # The lock makes this process the only one that writes to the folder.
        lock_descriptor = lock.acquire(path)
        try:
            # Read the manifest again: another process may have changed it before this one owned the folder.
            manifest = _read_previous(path, name, plain)
            resumed = manifest is not None
            # Remove the temporary files of killed processes, which would count as files of a cell.
            for part in path.rglob(f".*{files.PARTIAL_SUFFIX}"):
                part.unlink(missing_ok=True)
            # Start the manifest, or continue the existing one.
            environment = software.environment()
            if manifest is None:
                manifest = {"experiment": name, "run_id": identity, "config": plain, "seed": seed}
                manifest |= {"start": lock.now(), "sessions": []}
            else:
                _resume_manifest(path, manifest, environment)
            # Record this session.
            manifest |= {"status": "running", "end": None, "command": sys.argv[1:]} | environment
            manifest |= as_json(dict(extra or {}))
            if described := [model.manifest_entries() for model in models]:
                manifest["weights"] = described
            for model in models:
                logger.info(model.summary)
            session = {"start": lock.now(), "end": None, "status": "running", "command": sys.argv[1:]}
            manifest["sessions"].append(session | {"process": os.getpid(), "host": platform.node()} | environment)
            # From here on, the folder object owns the lock and writes the manifest.
            folder = cls(path, identity, manifest, lock_descriptor, resumed=resumed)
            folder._write_manifest()
        except BaseException:
            os.close(lock_descriptor)
            raise
        _open_folders[path.resolve()] = folder
        return folder

    def update(self, **entries: Any) -> None:
        """Set entries of the manifest."""
        self._manifest |= as_json(entries)
        self._write_manifest()

    def finish(self, status: str = "complete", **entries: Any) -> None:
        """Mark the run as ended and release the folder.

        Args:
          status: Final status.
          **entries: Further entries of the manifest.
        """
        end = {"status": status, "end": lock.now()}
        self._manifest["sessions"][-1] |= end
        self.update(**end, last_session_seconds=round(time.monotonic() - self._opened_at, 1), **entries)
        self._release()

    def stop(self, status: str, error: str | None = None) -> None:
        """Finish an incomplete run; if the manifest cannot be written, release the folder all the same."""
        try:
            self.finish(status, error=error)
        except (InputError, OSError):
            self._release()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of this run atomically and return its path."""
        files.write_whole(self.path / name, content)
        return self.path / name

    def record_files(self, name: str) -> None:
        """Write the names of all files in a folder to the manifest, when the folder is complete.

        Args:
          name: Name of a folder whose files were written without `write`.
        """
        paths = sorted(path for path in (self.path / name).rglob("*") if path.is_file())
        self.update(outputs=[*self._other_outputs(name), *(str(path.relative_to(self.path)) for path in paths)])

    def has_files(self, name: str) -> bool:
        """Return whether all recorded files of a folder exist, and there are any."""
        recorded = [file for file in self._manifest.get("outputs", []) if file.startswith(f"{name}/")]
        return bool(recorded) and all((self.path / file).is_file() for file in recorded)

    def entry(self, name: str) -> Any:
        """Return an entry of the manifest, or None."""
        return self._manifest.get(name)

    def clear(self, name: str) -> None:
        """Remove a folder of this run that is incomplete or obsolete."""
        self.update(outputs=self._other_outputs(name))
        shutil.rmtree(self.path / name, ignore_errors=True)

    def _other_outputs(self, name: str) -> list[str]:
        """Return the recorded files of other folders."""
        return [file for file in self._manifest.get("outputs", []) if not file.startswith(f"{name}/")]

    def write_frame(self, frame: "pd.DataFrame", name: str = "results.csv") -> Path:
        """Write a table atomically, with all digits of its floats, see `rora_theory.runs.frames`."""
        return self.write(name, frames.to_csv(frame))

    def _release(self) -> None:
        if _open_folders.get(self.path.resolve()) is self:
            del _open_folders[self.path.resolve()]
            os.close(self._lock)

    def _write_manifest(self) -> None:
        files.write_whole(self.path / "manifest.json", json.dumps(self._manifest, indent=2, sort_keys=True) + "\n")


def _read_previous(path: Path, name: str, config: Any) -> dict[str, Any] | None:
    """Read the manifest of an earlier part of this run; None if there is none.

    Raises:
      InputError: The folder holds another run.
    """
    manifest = read_manifest(path, ("experiment", "config", "sessions"))
    if manifest is None:
        return None
    if manifest["experiment"] != name or manifest["config"] != config:
        raise InputError(
            f"{path}: holds a run with other arguments ({_difference(manifest, name, config)}). Use another folder, "
            "or repeat the arguments of that run."
        )
    return manifest


def _resume_manifest(path: Path, manifest: dict[str, Any], environment: Mapping[str, Any]) -> None:
    """Mark the sessions of killed processes in a manifest, and warn of software that has changed since the last."""
    if changed := software.version_differences((manifest["sessions"] or [environment])[-1], environment):
        logger.warning("%s is resumed with %s; its manifest.json records both", path, changed)
    manifest.pop("error", None)
    for session in manifest["sessions"]:
        session["status"] = session.get("status", "").replace("running", "killed")


def _difference(manifest: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> str:
    if manifest["experiment"] != name:
        return f"it is a run of {manifest['experiment']}, this is {name}"
    old = manifest["config"]
    keys = [key for key in sorted(set(old) | set(config)) if old.get(key) != config.get(key)]
    return "; ".join(f"{key} there {old.get(key)!r}, here {config.get(key)!r}" for key in keys[:3])
