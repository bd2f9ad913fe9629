"""A matrix of experiments in one folder: each cell done once, whoever works on it and whoever dies at it.

    FOLDER/manifest.json           what all cells have in common, and the runs that worked on them
    FOLDER/results.csv             a line a cell
    FOLDER/cells/KEY/cell.json     the cell's full configuration; KEY is its hash
    FOLDER/cells/KEY/attempts.jsonl  a line a beginning, a line an end
    FOLDER/cells/KEY/result.json   there when the cell is done: the last file written
    FOLDER/cells/KEY/lock          held (flock) by the process at work; the kernel lets go of it when that dies

Several processes, on one machine or on several that share the folder, may work on one matrix.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rora_theory.errors import InputError
from sims.common.run_folder import as_json, write_whole

State = Literal["new", "running", "dead", "failed", "done"]
"""``dead``: the process at work was gone before there was a result; ``failed``: the work raised an error."""


@dataclass(frozen=True)
class Status:
    """Where a cell stands.

    Attributes:
      state: see `State`.
      attempts: how often it was begun.
      error: of the last attempt, where that failed.
    """

    state: State
    attempts: int
    error: str | None = None


class Cell:
    """One cell's folder.

    Args:
      folder: of all cells.
      config: everything that determines the result; a dataclass or mapping.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.config = as_json(config)
        self.key = key_of(config)
        self.path = folder / self.key

    def result(self) -> dict[str, Any] | None:
        """The finished cell's result; None where there is none yet. Raises `InputError` for a damaged file."""
        path = self.path / "result.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: is damaged ({error}); accepted is the file as it was written") from error

    def status(self) -> Status:
        """Where the cell stands now."""
        attempts, error = self._attempts()
        if (self.path / "result.json").exists():
            return Status("done", attempts)
        with self._lock() as free:
            if not free:
                return Status("running", attempts)
        if not attempts:
            return Status("new", 0)
        return Status("dead" if error is None else "failed", attempts, error)

    def work(self, run: Callable[[Path], Mapping[str, Any]], *, most: int) -> Status | None:
        """Do the cell's work, unless it is done, in another process's hands, or was begun ``most`` times.

        Args:
          run: called with the cell's folder; returns the result. What it raises is kept with the cell, but for
            `KeyboardInterrupt` and other calls to stop: such a beginning is not counted.
          most: attempts in all.

        Returns:
          The status after the work; None where nothing was done.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock(exclusive=True) as free:
            attempts, _ = self._attempts()
            if not free or attempts >= most or (self.path / "result.json").exists():
                return None
            write_whole(self.path / "cell.json", json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            self._note(event="begin", attempt=attempts + 1, process=os.getpid(), host=platform.node(), time=now())
            try:
                result = as_json(dict(run(self.path)))
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                self._note(event="error", attempt=attempts + 1, error=text, trace=traceback.format_exc(), time=now())
                return Status("failed", attempts + 1, text)
            except BaseException:
                self._note(event="stopped", attempt=attempts + 1, time=now())
                raise
            write_whole(self.path / "result.json", json.dumps(result, indent=2, sort_keys=True) + "\n")
            return Status("done", attempts + 1)

    def _attempts(self) -> tuple[int, str | None]:
        """How often the cell was begun, but for beginnings that were stopped on purpose; the last one's error."""
        try:
            text = (self.path / "attempts.jsonl").read_text()
        except FileNotFoundError:
            return 0, None
        events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
        count = sum({"begin": 1, "stopped": -1}.get(event["event"], 0) for event in events)
        errors = {event["attempt"]: event["error"] for event in events if event["event"] == "error"}
        return count, errors.get(count)

    def _note(self, **event: Any) -> None:
        path = self.path / "attempts.jsonl"
        before = path.read_bytes() if path.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        write_whole(path, whole + json.dumps(event).encode() + b"\n")

    @contextlib.contextmanager
    def _lock(self, *, exclusive: bool = False) -> Iterator[bool]:
        """Whether nobody else holds the cell; if so it is held until the block ends."""
        if not self.path.exists():
            yield True
            return
        with open(self.path / "lock", "a") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


class Matrix:
    """A folder of cells whose configurations have an identity in common, the attribute ``config``.

    Args:
      path: the folder, made if it is not there.
      name: the experiment.
      identity: what all cells share. An entry that is None here or there is not compared: it is filled in by the
        run that knows it.

    Raises:
      InputError: the folder holds another experiment or another identity, or can't be written.
    """

    def __init__(self, path: Path, name: str, identity: Mapping[str, Any]) -> None:
        self.path, self.name = path, name
        self.cells_path = path / "cells"
        plain = as_json(dict(identity))
        _check_folder(path)
        self._file = path / "manifest.json"
        self._number = 0
        with self._lock():
            manifest = self._read()
            if manifest is None:
                if any(entry for entry in path.iterdir() if not entry.name.startswith(".")):
                    raise InputError(f"{path}: holds files but no manifest.json; accepted is an empty folder")
                manifest = {"experiment": name, "config": plain, "start": now(), "runs": []}
            found = manifest["config"]
            differing = [
                key for key in sorted(plain) if None not in (plain[key], found.get(key)) and plain[key] != found[key]
            ]
            if manifest["experiment"] != name or differing:
                what = "; ".join(f"{key} there {found[key]!r}, here {plain[key]!r}" for key in differing[:3])
                raise InputError(
                    f"{path}: holds a matrix of {manifest['experiment']} with another identity ({what or name}); "
                    "accepted is an empty folder or one of the same model, data, settings and evaluation"
                )
            manifest["config"] = found | {key: value for key, value in plain.items() if value is not None}
            self.config: dict[str, Any] = manifest["config"]
            self._number = len(manifest["runs"])
            manifest["runs"].append({"start": now(), "process": os.getpid(), "status": "running"})
            self._write(manifest)

    def cell(self, config: Any) -> Cell:
        """The cell of a configuration."""
        return Cell(self.cells_path, config)

    def update(self, run: Mapping[str, Any], **entries: Any) -> None:
        """Add to the manifest's entry of this run, and to the manifest itself."""
        with self._lock():
            manifest = self._read()
            assert manifest is not None
            manifest["runs"][self._number] |= as_json(dict(run))
            manifest |= as_json(entries)
            self._write(manifest)

    def write_table(self, make: Callable[[], str], name: str = "results.csv") -> None:
        """Write what ``make`` returns; whoever writes last has seen all that others wrote before."""
        with self._lock():
            write_whole(self.path / name, make())

    def _read(self) -> dict[str, Any] | None:
        return _manifest(self._file)

    def _write(self, manifest: Mapping[str, Any]) -> None:
        write_whole(self._file, json.dumps(manifest, indent=2, sort_keys=True) + "\n")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.path / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def config_of(path: Path) -> dict[str, Any]:
    """What the cells of a folder have in common; nothing where there is no matrix. Raises `InputError` as `Matrix`."""
    return dict((_manifest(path / "manifest.json") or {}).get("config", {}))


@dataclass(frozen=True)
class Worked:
    """A cell this process has worked on."""

    index: int
    status: Status
    seconds: float


def work_through(
    cells: Sequence[Cell],
    run: Callable[[int, Path], Mapping[str, Any]],
    *,
    most: int,
    wait: float = 2.0,
    seen: Callable[[int, Status], None] = lambda index, status: None,
) -> Iterator[Worked]:
    """Work on every cell that is not done, then wait for those in other processes' hands, taking over the dead ones.

    Args:
      cells: in the order of work.
      run: called with a cell's index and folder.
      most: attempts a cell, over all runs and processes. A cell that fails is tried once by this call.
      wait: seconds between looks at the cells of others.
      seen: called once with each cell that needs no work, or that is taken up after another attempt.

    Yields:
      each cell worked on here, when it is done or has failed.
    """
    tried: set[int] = set()
    told: set[int] = set()
    while True:
        others = False
        for index, cell in enumerate(cells):
            if index in tried:
                continue
            status = cell.status()
            if status.state == "running":
                others = True
                continue
            if index not in told and status.state != "new":
                told.add(index)
                seen(index, status)
            if status.state == "done" or status.attempts >= most:
                tried.add(index)
                continue
            begun = time.perf_counter()
            after = cell.work(lambda path, index=index: run(index, path), most=most)  # type: ignore[misc]
            if after is None:  # another process was faster
                others = True
                continue
            tried.add(index)
            told.add(index)
            yield Worked(index, after, time.perf_counter() - begun)
        if not others:
            return
        time.sleep(wait)


def key_of(config: Any) -> str:
    """A cell's key: the hash of its configuration."""
    return hashlib.sha256(json.dumps(as_json(config), sort_keys=True).encode()).hexdigest()[:16]


def count(statuses: Iterable[Status]) -> dict[str, int]:
    """How many cells are in each state."""
    found: dict[str, int] = {}
    for status in statuses:
        found[status.state] = found.get(status.state, 0) + 1
    return found


def _manifest(file: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(file.read_text())
        manifest["experiment"], manifest["config"], manifest["runs"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is damaged ({error}); accepted is the file as it was written") from error
    return dict(manifest)


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; accepted is a folder to write the matrix to")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); accepted is a writable folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written to; accepted is a writable folder")


def now() -> str:
    """The time, in UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
