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
from pathlib import Path
from typing import Any, Literal

from rora_theory import digests, files, seals
from rora_theory.errors import InputError
from sims.common import disk, stopping
from sims.common.disk import now
from sims.common.run_folder import (
    as_json,
    check_files,
    circumstances,
    make_folder,
    read_manifest,
    say_other_versions,
)

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


class Place:
    """Where a cell is done: its folder.

    Args:
      folder: of all cells.
      config: everything that determines the result; a dataclass or mapping.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.config = as_json(config)
        self.key = key_of(config)
        self.path = folder / self.key

    def result(self) -> dict[str, Any] | None:
        """The finished cell's result; None where there is none yet. Raises `InputError` for one that was changed."""
        sealed = self._sealed()
        if sealed is None:
            return None
        return {name: value for name, value in sealed.items() if name not in ("files", seals.DIGEST)}

    def check(self) -> None:
        """Raise `InputError` where a file of the finished cell is not as it was written."""
        check_files(self.path, (self._sealed() or {}).get("files"))

    def _sealed(self) -> dict[str, Any] | None:
        path = self.path / "result.json"
        try:
            sealed = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            sealed = None
        if not seals.is_sealed(sealed, of=self.key):
            raise InputError(
                f"{path}: is damaged or was changed since it was written; accepted is the file as it was written, or "
                "none: removed, its cell is done again"
            )
        return dict(sealed)

    def status(self) -> Status:
        """Where the cell stands now."""
        attempts, error = self._attempts()
        if self._sealed() is not None:
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
            if not free or attempts >= most or self._sealed() is not None:
                return None
            files.write_whole(self.path / "cell.json", json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            self._note(event="begin", attempt=attempts + 1, process=os.getpid(), host=platform.node(), time=now())
            try:
                result = as_json(dict(run(self.path)))
            except Exception as error:
                if files.is_disk_error(error):  # no fault of the cell's, and the next one would meet it too
                    self._stopped(attempts + 1)
                    if isinstance(error, OSError):
                        what = error.strerror or str(error)
                        raise InputError(
                            f"{self.path}: cannot be written ({what}); accepted is a disk with room"
                        ) from error
                    raise
                text = f"{type(error).__name__}: {error}"
                self._note(event="error", attempt=attempts + 1, error=text, trace=traceback.format_exc(), time=now())
                return Status("failed", attempts + 1, text)
            except BaseException:
                self._stopped(attempts + 1)
                raise
            result["files"] = {name: digests.of_file(self.path / name) for name in self._products()}
            sealed = seals.seal(result, of=self.key)
            files.write_whole(self.path / "result.json", json.dumps(sealed, indent=2, sort_keys=True) + "\n")
            return Status("done", attempts + 1)

    def _attempts(self) -> tuple[int, str | None]:
        """How often the cell was begun, but for beginnings that were stopped on purpose; the last one's error."""
        try:
            text = (self.path / "attempts.jsonl").read_text()
        except FileNotFoundError:
            return 0, None
        try:
            events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
            count = sum({"begin": 1, "stopped": -1}.get(event["event"], 0) for event in events)
            errors = {event["attempt"]: event["error"] for event in events if event["event"] == "error"}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path / 'attempts.jsonl'}: is damaged ({error!r}); accepted is the file as it was written, or "
                "none: removed, the attempts are counted anew"
            ) from error
        return count, errors.get(count)

    def _stopped(self, attempt: int) -> None:
        """A beginning that does not count, as far as the disk takes that note."""
        with contextlib.suppress(InputError):
            self._note(event="stopped", attempt=attempt, time=now())

    def _products(self) -> list[str]:
        """What the work wrote, but for its checkpoints, which nobody reads any more."""
        own = ("lock", "cell.json", "attempts.jsonl", "result.json")
        paths = [path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file()]
        return sorted(str(path) for path in paths if str(path) not in own and path.parts[0] != "checkpoints")

    def _note(self, **event: Any) -> None:
        path = self.path / "attempts.jsonl"
        before = path.read_bytes() if path.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        files.write_whole(path, whole + json.dumps(event).encode() + b"\n")

    @contextlib.contextmanager
    def _lock(self, *, exclusive: bool = False) -> Iterator[bool]:
        """Whether nobody else holds the cell; if so it is held until the block ends."""
        if not self.path.exists():
            yield True
            return
        with _opened(self.path / "lock") as lock:
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if exclusive:
                disk.say_who(lock)
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
        make_folder(path)
        self._number = 0
        self._read()  # before a lock is laid into a folder that may not be a matrix's
        with self._lock():
            manifest = self._read()
            if manifest is None:
                manifest = {"experiment": name, "config": plain, "start": now(), "runs": [], "files": {}}
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
            check_files(path, manifest["files"])
            self._number, here = len(manifest["runs"]), circumstances()
            say_other_versions(path, manifest["runs"], here)
            begun = {"start": now(), "process": os.getpid(), "host": platform.node(), "status": "running"}
            manifest["runs"].append(begun | here)
            self._write(manifest)
        for cell in self.done():
            cell.check()
        stopping.opened(self.stop)

    def place(self, config: Any) -> Place:
        """The place of the cell of a configuration."""
        return Place(self.cells_path, config)

    def done(self) -> Iterator[Place]:
        """Every finished cell in the folder. Raises `InputError` for a cell whose configuration was changed."""
        yield from (cell for cell in self.begun() if (cell.path / "result.json").exists())

    def begun(self) -> Iterator[Place]:
        """Every cell in the folder that was begun. Raises `InputError` for one whose configuration was changed."""
        for file in sorted(self.cells_path.glob("*/cell.json")):
            try:
                cell = self.place(json.loads(file.read_bytes()))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}: is damaged ({error}); accepted is the file as it was written") from error
            if cell.path != file.parent:
                raise InputError(
                    f"{file}: was changed since it was written; accepted is the file as it was written, or none: with "
                    "its folder removed, the cell is done again"
                )
            yield cell

    def finish(self, status: str) -> None:
        """Mark this process's part as ended."""
        stopping.closed(self.stop)
        self.update({"status": status, "end": now()})

    def stop(self, status: str, error: str | None = None) -> None:
        """`finish` a part that did not come to its end, as far as the disk takes it."""
        with contextlib.suppress(InputError, OSError):
            self.update({"status": status, "end": now(), "error": error})

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
            manifest, content = self._read(), make()
            assert manifest is not None
            digest = hashlib.sha256(content.encode()).hexdigest()
            if manifest["files"].pop(name, digest) != digest:  # killed between, the new table is not taken for changed
                self._write(manifest)
            files.write_whole(self.path / name, content)
            manifest["files"][name] = digest
            self._write(manifest)

    def _read(self) -> dict[str, Any] | None:
        return read_manifest(self.path, KEYS)

    def _write(self, manifest: Mapping[str, Any]) -> None:
        sealed = seals.seal(manifest)
        files.write_whole(self.path / "manifest.json", json.dumps(sealed, indent=2, sort_keys=True) + "\n")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with _opened(self.path / disk.LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def config_of(path: Path) -> dict[str, Any]:
    """What the cells of a folder have in common; nothing where there is no matrix. Raises `InputError` as `Matrix`."""
    return dict((read_manifest(path, KEYS) or {}).get("config", {}))


KEYS = ("experiment", "config", "runs", "files")
"""What a matrix's manifest has at least."""


@dataclass(frozen=True)
class Worked:
    """A cell this process has worked on."""

    index: int
    status: Status
    seconds: float


def work_through(
    cells: Sequence[Place],
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


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[int]:
    """A lock's file, made where it is missing; a symbolic link is refused."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
