"""Run folders: complete files after a full disk, one owner, damaged files, and interruption in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import checkpoint

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.runs import lock as folder_lock
from rora_theory.runs import software
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal, read_entries
from rora_theory.runs.reading import CELLS, read_finished_cells
from sims.common import cli
from sims.common.cells import run_with_bar


def opened(path: Path, **config) -> RunFolder:
    return RunFolder.open("sweep", {"rank": 4} | config, out=path)


def manifest(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def test_a_partial_line_on_a_full_disk_is_removed(tmp_path, full_disk):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"step": 1})
    before = journal.path.read_bytes()
    full_disk()
    with pytest.raises(InputError, match=r"j\.jsonl: cannot be written \(No space left on device\)"):
        journal.append({"step": 2})
    assert journal.path.read_bytes() == before
    assert journal.entries == [{"step": 1}]


def test_entries_of_any_run_are_read(tmp_path):
    """A truncated last entry is left out."""
    journal = Journal(tmp_path / "j.jsonl")
    for step in (1, 2):
        journal.append({"step": step})
    assert [entry["step"] for entry in read_entries(journal.path)] == [1, 2]
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    assert [entry["step"] for entry in read_entries(journal.path)] == [1]
    with pytest.raises(InputError) as missing:
        read_entries(tmp_path / "none.jsonl")
    assert str(missing.value).count(". ") == 1, "the error is printed once"


def test_the_weights_that_a_run_reads_are_named(tmp_path, capsys):
    model = checkpoint.model(tmp_path / "model")
    RunFolder.open("sweep", {}, out=tmp_path / "run", models=[llama.locate(model)]).finish()
    assert capsys.readouterr().out.startswith("model hf: safetensors, not quantised (F32 100%); sha256 ")
    (weights,) = manifest(tmp_path / "run")["weights"]
    assert (weights["sha256"], weights["storage"]) == (
        llama.model_digest(model),
        "safetensors, not quantised (F32 100%)",
    )


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": 3, "loss": 0.', "[1]", "\0" * 9, "\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    for read in (Journal, read_entries):
        with pytest.raises(InputError, match=r"j\.jsonl: line 2 is damaged"):
            read(path)


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [entry["step"] for entry in read_entries(path)] == [0, 1]
    journal = Journal(path)
    assert [entry["step"] for entry in journal.entries] == [0, 1]
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n', "cut off, so that the next line starts on a new line"
    journal.append({"step": 2})
    assert [entry["step"] for entry in Journal(path).entries] == [0, 1, 2]


# ---- one owner

HOLDER = """
import sys, time
from pathlib import Path
from rora_theory.runs.folder import RunFolder
RunFolder.open("sweep", {"rank": 4}, out=Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_releases_its_lock(tmp_path):
    """Of two processes one gets the folder and the other a line that names it; a killed owner frees the folder."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = tmp_path / "run"
    both = [subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], **streams) for _ in range(2)]
    while all(process.poll() is None for process in both):  # the loser ends
        time.sleep(0.02)
    [loser] = [process for process in both if process.poll() is not None]
    [winner] = [process for process in both if process is not loser]
    assert winner.stdout.readline() == "open\n"
    assert f"{run}: is in use by process {winner.pid} on " in loser.communicate()[1].splitlines()[-1]
    with pytest.raises(InputError, match=f"is in use by process {winner.pid} on .* since 2"):
        opened(run)
    assert [session["process"] for session in manifest(run)["sessions"]] == [winner.pid]
    winner.kill()
    winner.communicate()
    opened(run).finish()
    assert [session["status"] for session in manifest(run)["sessions"]] == ["killed", "complete"]


def test_a_run_that_ended_while_waiting_for_the_lock_is_resumed(tmp_path, monkeypatch):
    """The folder was empty before the lock; once the lock is held, another process has run a part."""
    opened(tmp_path / "other").finish()
    real = folder_lock.acquire

    def acquire(folder: Path) -> int:
        (folder / "manifest.json").write_bytes((tmp_path / "other" / "manifest.json").read_bytes())
        return real(folder)

    monkeypatch.setattr(folder_lock, "acquire", acquire)
    folder = opened(tmp_path / "run")
    assert folder.resumed
    folder.finish()
    assert [session["status"] for session in manifest(tmp_path / "run")["sessions"]] == ["complete", "complete"]


def test_nothing_is_written_to_a_foreign_folder(tmp_path):
    """A process may open its own folder again, as an error leaves it open in a notebook."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("mine")
    opened(tmp_path / "run")
    opened(tmp_path / "run").finish()
    (tmp_path / "run" / folder_lock.LOCK).unlink()
    for name, message in (("thesis", "holds files but no manifest"), ("run", "rank there 4, here 5")):
        before = sorted((tmp_path / name).iterdir())
        with pytest.raises(InputError, match=message):
            opened(tmp_path / name, rank=5)
        assert sorted((tmp_path / name).iterdir()) == before
    opened(tmp_path / "run").finish()


# ---- what is damaged


def write_entries(path: Path, entries: dict) -> None:
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("{"), "is damaged"),
        (lambda path: path.write_text("[]"), r"is damaged \(.*not an object"),
        (lambda path: path.write_text("{}"), r"is damaged \(it has no experiment\)"),
        (lambda path: path.write_text("[" * 100_000), "is damaged"),
        (lambda path: path.write_bytes(b"\xff"), "is damaged"),
        (lambda path: path.unlink(), "holds files but no manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, damage, message):
    folder = opened(tmp_path / "run")
    folder.write("results.csv", "a\n1\n")
    folder.finish(best=1.5)
    damage(tmp_path / "run" / "manifest.json")
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": {"a": "0"}}, "outputs is"),
        ({"config": [1]}, "config is"),
        ({"experiment": 3}, "experiment is 3"),
        ({"sessions": {"a": 1}}, "sessions is"),
        ({"sessions": [3]}, "3 is not an object"),
        ({"sessions": [{"status": 3}]}, "status is 3"),
        ({"sessions": [{"status": "running", "packages": [1]}]}, "packages is"),
        ({"run_id": None}, "run_id is None"),
    ],
)
def test_a_manifest_with_values_of_the_wrong_type_is_refused(tmp_path, change, message):
    opened(tmp_path).finish()
    write_entries(tmp_path / "manifest.json", manifest(tmp_path) | change)
    for read in (lambda: opened(tmp_path), lambda: read_finished_cells(tmp_path)):
        with pytest.raises(InputError, match=rf"manifest\.json: .*{message}"):
            read()


def test_a_table_is_replaced_as_a_whole(tmp_path):
    folder = opened(tmp_path)
    folder.write("slopes.csv", "a\n2\n")
    folder._release()
    folder = opened(tmp_path)
    folder.write("slopes.csv", "a\n3\n")
    folder.finish()
    assert (tmp_path / "slopes.csv").read_text() == "a\n3\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json", "slopes.csv"]


def test_a_recorded_file_that_was_removed_is_missing(tmp_path):
    folder = opened(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    assert not folder.has_files("model"), "not recorded yet"
    folder.record_files("model")
    folder.finish()
    folder = opened(tmp_path)
    assert folder.has_files("model")
    (model / "model.safetensors").unlink()
    assert not folder.has_files("model")
    folder.clear("model")
    assert not model.exists()
    folder.finish()
    assert manifest(tmp_path)["outputs"] == []


@pytest.mark.parametrize("name", ["cells", "cells/deeper/one", "results.csv"])
def test_links_in_a_circle_are_refused_before_work(tmp_path, name):
    opened(tmp_path).finish()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(Path(name).name)
    with pytest.raises(InputError, match=rf"{name}: symbolic link"):
        opened(tmp_path)


def test_other_versions_are_logged_and_both_recorded(tmp_path, monkeypatch, capsys):
    opened(tmp_path).finish()
    opened(tmp_path).finish()
    assert capsys.readouterr().err == "", "not for the same versions"
    environment = software.environment()
    newer = environment | {"packages": environment["packages"] | {"rora-theory": "99.0"}}
    monkeypatch.setattr(software, "environment", lambda: newer)
    opened(tmp_path).finish()
    old = environment["packages"]["rora-theory"]
    note = f"note: {tmp_path} is resumed with rora-theory 99.0 (was {old}); its manifest.json records both\n"
    assert capsys.readouterr().err == note
    versions = [session["packages"]["rora-theory"] for session in manifest(tmp_path)["sessions"]]
    assert versions == [old, old, "99.0"]


# ---- stopped


def status_and_error(main, capsys) -> tuple[int, str]:
    """Run a command that ends early, and return its exit status and what it prints to standard error."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(main)
    return stopped.value.code, capsys.readouterr().err


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it would end these tests"
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(10**8):  # the signal comes between two of these
        pass


@pytest.mark.parametrize(("stop", "status"), [(interrupt, 130), (terminate, 143)])
def test_a_stopped_run_is_reported_in_one_line_and_in_its_manifest(tmp_path, capsys, stop, status):
    """Only an open run folder can be resumed, not a benchmark or a command that has finished its folder."""

    def stop_after_finish() -> None:
        opened(tmp_path / "done").finish()
        stop()

    assert status_and_error(stop, capsys) == (status, "Interrupted.\n")
    assert status_and_error(stop_after_finish, capsys) == (status, "Interrupted.\n")

    def stop_within_run() -> None:
        opened(tmp_path / "run").write("results.csv", "a\n1\n")
        stop()

    before = signal.getsignal(signal.SIGTERM)
    assert status_and_error(stop_within_run, capsys) == (status, cli.RESUMABLE + "\n")
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = manifest(tmp_path / "run")
    assert (stopped["status"], stopped["sessions"][-1]["status"]) == ("interrupted", "interrupted")
    assert stopped["end"]
    opened(tmp_path / "run").finish()
    assert manifest(tmp_path / "run")["status"] == "complete"


def test_a_failed_run_records_the_reason_and_other_runs_continue(tmp_path, capsys):
    """A command ends the runs that it opened, also after a bug, and no run that was open before."""
    earlier = opened(tmp_path / "earlier")

    def fail(error: Exception) -> None:
        opened(tmp_path / "run")
        raise error

    assert status_and_error(lambda: fail(InputError("no such thing")), capsys) == (2, "error: no such thing\n")
    assert (manifest(tmp_path / "run")["status"], manifest(tmp_path / "run")["error"]) == ("failed", "no such thing")
    with pytest.raises(ZeroDivisionError):
        cli.run_command(lambda: fail(ZeroDivisionError()))
    assert [manifest(tmp_path / name)["status"] for name in ("run", "earlier")] == ["failed", "running"]
    earlier.finish()
    assert manifest(tmp_path / "earlier")["status"] == "complete"


def test_a_run_on_a_full_disk_ends_in_one_line_and_keeps_the_cells_before(tmp_path, monkeypatch, capsys, full_disk):
    """The disk is full in the middle of a line of the journal; `test_cells` has one that is full before it."""

    def fill_disk(cell: str, _: Path) -> str:
        if cell == "two":
            full_disk()
        return cell

    def only_two(cell: str, _: Path) -> str:
        assert cell == "two", "the cell was computed twice"
        return cell

    cells = ["one", "two"]
    status, error = status_and_error(lambda: run_with_bar(cells, fill_disk, opened(tmp_path)) and None, capsys)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {tmp_path / CELLS}: cannot be written (No space left on device)")
    monkeypatch.undo()
    assert run_with_bar(cells, only_two, opened(tmp_path)) == cells
