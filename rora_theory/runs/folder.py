"""Run folders: ``results/NAME/RUN_ID/`` with `manifest.json` and `results.csv`, whole after any kill."""

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rora_theory.errors import InputError
from rora_theory.io import digests, files, frames
from rora_theory.runs import lock, seals, software
from rora_theory.runs.reading import as_json, check_files, key_of, read_manifest

if TYPE_CHECKING:
    import pandas as pd

    from rora_theory.llama import Located


logger = logging.getLogger(__name__)

_open: "dict[Path, RunFolder]" = {}
"""Folders that this process owns now."""


def count_open() -> int:
    """How many run folders this process owns."""
    return len(_open)


def check_free(path: Path) -> None:
    """Refuse a folder that another process drives, before records and weights are read for nothing.

    Raises:
      InputError: it is another process's, which is named.
    """
    if path.resolve() not in _open:
        lock.check_unowned(path)


def path_of(name: str, config: Any, out: Path | None = None) -> Path:
    """The folder of a run that `RunFolder.open` opens: ``out``, or ``results/NAME/RUN_ID``."""
    return Path(out) if out is not None else Path("results") / name / _identity(config)


def _identity(config: Any) -> str:
    """The hash of a run's configuration, of 12 hexadecimal digits."""
    return key_of(config)[:12]


def end_all(status: str, error: str | None = None, *, but: int = 0) -> None:
    """`RunFolder.stop` all that are open, the last first, but for the first ``but``."""
    for folder in reversed(list(_open.values())[but:]):
        folder.stop(status, error)


class RunFolder:
    """One run's folder: opened by its configuration, resumed by the same configuration, refused to any other.

    One process owns it, from `open` to `finish` or `stop`, or to its own end. The manifest is sealed and holds a
    digest of every file that a finished or interrupted run wrote.

    Attributes:
      path: the folder.
      identity: hash of the experiment's configuration.
      resumed: whether it held an earlier part of the same run.
    """

    def __init__(self, path: Path, identity: str, manifest: dict[str, Any], held: int, *, resumed: bool) -> None:
        self.path, self.identity, self.resumed = path, identity, resumed
        self._manifest, self._lock = manifest, held
        self._written: dict[str, str] = {}
        self._opened = time.monotonic()

    @classmethod
    def open(
        cls,
        name: str,
        config: Any,
        *,
        out: Path | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
        grows: Mapping[str, Any] | None = None,
        models: Collection["Located"] = (),
    ) -> "RunFolder":
        """Open or make the folder of a run, own it, and write its manifest with status ``running``.

        A run that goes on with other versions than it was begun with says so by a warning of `logging`.

        Args:
          name: the experiment, ``results/NAME``.
          config: dataclass or mapping: everything that determines the results. Leave out what does not (devices,
            output folder), so that a run may go on elsewhere.
          out: the folder; None is ``results/NAME/RUN_ID`` with RUN_ID the configuration's hash.
          seed: written to the manifest.
          extra: further entries of the manifest (units, device, protocol).
          grows: further entries of the configuration that a later part of the run may add: None is not compared.
          models: that the run reads: how their weights are stored is logged, and kept in the manifest.

        Raises:
          InputError: the folder can't be written, is another process's, holds another run, holds files but no
            readable manifest, files that are not as the run wrote them, or a symbolic link that leads out of it.
        """
        plain = as_json(config)
        identity, path = _identity(plain), path_of(name, plain, out)
        files.check_folder(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be made ({error.strerror}); accepted is a writable folder") from error
        if stale := _open.get(path.resolve()):  # this process's own, left by an error
            stale._let_go()
        later = as_json(dict(grows or {}))
        _earlier(path, name, plain, later)  # before anything is written into a folder that may not be this run's
        files.check_links(path)
        held = lock.take(path)
        try:
            manifest = _earlier(path, name, plain, later)
            resumed = manifest is not None
            for part in path.glob(f".*{files.PART}"):  # what killed processes left, this one alone being at work
                part.unlink(missing_ok=True)
            here = software.circumstances()
            if manifest is None:
                manifest = {"experiment": name, "run_id": identity, "config": later | plain, "seed": seed}
                manifest |= {"start": lock.now(), "sessions": []}
            else:
                if changed := software.version_differences((manifest["sessions"] or [here])[-1], here):
                    logger.warning("%s goes on with %s; its manifest.json names both", path, changed)
                manifest.pop("error", None)
                for session in manifest["sessions"]:
                    session["status"] = session.get("status", "").replace("running", "killed")
            manifest["config"] |= {key: value for key, value in later.items() if value is not None}
            manifest |= {"status": "running", "end": None, "command": sys.argv[1:]} | here
            manifest |= as_json(dict(extra or {}))
            if described := [model.described() for model in models]:
                manifest["weights"] = described
            for model in models:
                logger.info(model.sentence)
            manifest.setdefault("files", {})
            session = {"start": lock.now(), "end": None, "status": "running", "command": sys.argv[1:]}
            manifest["sessions"].append(session | {"process": os.getpid(), "host": platform.node()} | here)
            folder = cls(path, identity, manifest, held, resumed=resumed)
            folder._write_manifest()
        except BaseException:
            os.close(held)
            raise
        _open[path.resolve()] = folder
        return folder

    def update(self, **entries: Any) -> None:
        """Add or change entries of the manifest."""
        self._manifest |= as_json(entries)
        self._write_manifest()

    def finish(self, status: str = "complete", **entries: Any) -> None:
        """Mark the run as ended, with its end time, how long its last part took and its files' digests, and give the
        folder back."""
        self._manifest["files"] |= self._written
        end = {"status": status, "end": lock.now()}
        self._manifest["sessions"][-1] |= end
        self.update(**end, last_session_seconds=round(time.monotonic() - self._opened, 1), **entries)
        self._let_go()

    def stop(self, status: str, error: str | None = None) -> None:
        """`finish` a run that did not come to its end, as far as the disk takes it."""
        try:
            self.finish(status, error=error)
        except (InputError, OSError):
            self._let_go()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write the file ``name`` of this run whole."""
        data = content.encode() if isinstance(content, str) else content
        digest = hashlib.sha256(data).hexdigest()
        if self._manifest["files"].get(name, digest) != digest:  # killed between, the new file is not taken for changed
            del self._manifest["files"][name]
            self._write_manifest()
        files.write_whole(self.path / name, data)
        self._written[name] = digest
        return self.path / name

    def wrote(self, written: Mapping[str, str]) -> None:
        """Have the manifest, when the run ends, hold the digests of files that were written otherwise."""
        self._written |= written

    def ran(self, key: str, seconds: float, node: str | None = None, software: Mapping[str, Any] | None = None) -> None:
        """Have the manifest, when the run ends, say of this session's cell where it ran and how long.

        Args:
          key: The cell's key.
          seconds: How long it took.
          node: Node of a cluster; None is this process.
          software: Software of the node, where it differs from this process's.
        """
        session, name = self._manifest["sessions"][-1], node or "this process"
        session.setdefault("cells", {}).setdefault(name, {})[key] = round(seconds, 3)
        if software is not None:
            session.setdefault("other_software", {})[name] = as_json(software)

    def record(self, name: str) -> None:
        """Have the manifest hold the digest of a file that was written otherwise, or of all files in a folder but a
        model card, which is its owner's to go on writing."""
        place = self.path / name
        found = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        found = [path for path in found if path.name != "README.md"]
        self._manifest["files"] |= {str(path.relative_to(self.path)): digests.of_file(path) for path in found}
        self._write_manifest()

    def holds(self, name: str) -> bool:
        """Whether what was recorded of ``name`` is all there; that none of it was changed was seen on opening."""
        known = [file for file in self._manifest["files"] if file == name or file.startswith(f"{name}/")]
        return bool(known) and all((self.path / file).is_file() for file in known)

    def entry(self, name: str) -> Any:
        """An entry of the manifest; None where there is none."""
        return self._manifest.get(name)

    def clear(self, name: str) -> None:
        """Remove a folder of this run's that is not whole, or no longer the one asked for."""
        shutil.rmtree(self.path / name, ignore_errors=True)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Have the manifest hold no digest of the files in a folder, which are to be written anew."""
        known = self._manifest["files"]
        kept = {file: digest for file, digest in known.items() if not file.startswith(f"{name}/")}
        if len(kept) < len(known):
            self.update(files=kept)

    def write_frame(self, frame: "pd.DataFrame", name: str = "results.csv") -> Path:
        """Write a table whole, floats with every digit, see `rora_theory.io.frames`."""
        return self.write(name, frames.to_csv(frame))

    def _let_go(self) -> None:
        if _open.get(self.path.resolve()) is self:
            del _open[self.path.resolve()]
            os.close(self._lock)

    def _write_manifest(self) -> None:
        sealed = seals.seal(self._manifest)
        files.write_whole(self.path / "manifest.json", json.dumps(sealed, indent=2, sort_keys=True) + "\n")


def _earlier(path: Path, name: str, config: Any, grows: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of an earlier part of this very run; None where there is none."""
    manifest = read_manifest(path, ("experiment", "config", "sessions"))
    if manifest is None:
        return None
    there, here = manifest["config"], dict(config) | dict(grows)
    free = {key for key in grows if None in (there.get(key), here[key])}
    old, new = ({key: value for key, value in one.items() if key not in free} for one in (there, here))
    if manifest["experiment"] != name or old != new:
        raise InputError(
            f"{path}: holds a run with other arguments ({_difference(manifest, name, old, new)}); accepted is an "
            "empty folder or one of the same arguments"
        )
    known = manifest.get("files") or {}
    # Journals seal their own lines, by which what was changed is named, and grow while the run goes on.
    manifest["files"] = {file: digest for file, digest in known.items() if not file.endswith(".jsonl")}
    check_files(path, manifest["files"])
    return manifest


def _difference(manifest: Mapping[str, Any], name: str, old: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if manifest["experiment"] != name:
        return f"it is a run of {manifest['experiment']}, this is {name}"
    keys = [key for key in sorted(set(old) | set(config)) if old.get(key) != config.get(key)]
    return "; ".join(f"{key} there {old.get(key)!r}, here {config.get(key)!r}" for key in keys[:3])
