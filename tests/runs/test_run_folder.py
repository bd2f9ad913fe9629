"""Run folders: files whole after a full disk, one owner, nothing changed by hand taken over, stopped in one line."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import checkpoint

import sims
from rora_theory import llama
from rora_theory.errors import InputError
from rora_theory.io import files
from rora_theory.runs import lock as folder_lock
from rora_theory.runs import seals, software
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal, read_entries
from rora_theory.runs.reading import CELLS, read_finished_cells
from sims.common import cli
from sims.common.cells import run_with_bar


def opened(path: Path, **config) -> RunFolder:
    return RunFolder.open("sweep", {"rank": 4} | config, out=path)


def manifest(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def test_a_line_half_written_on_a_full_disk_is_taken_back(tmp_path, full_disk):
    journal = Journal(tmp_path / "j.jsonl", "run")
    journal.append({"step": 1})
    before = journal.path.read_bytes()
    full_disk()
    with pytest.raises(InputError, match=r"j\.jsonl: cannot be written \(No space left on device\)"):
        journal.append({"step": 2})
    assert journal.path.read_bytes() == before
    assert journal.entries == [{"step": 1}]


def test_entries_are_read_whatever_run_they_are_of(tmp_path):
    """Without the last, where it is cut off; what is no JSON is named."""
    journal = Journal(tmp_path / "j.jsonl", "run")
    for step in (1, 2):
        journal.append({"step": step})
    assert [entry["step"] for entry in read_entries(journal.path)] == [1, 2]
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    assert [entry["step"] for entry in read_entries(journal.path)] == [1]
    journal.path.write_bytes(b'{"step": 1}\n{"ste\n')
    with pytest.raises(InputError, match=r"j\.jsonl: is damaged \(.*\)\. Restore the file"):
        read_entries(journal.path)
    with pytest.raises(InputError) as missing:
        read_entries(tmp_path / "none.jsonl")
    assert str(missing.value).count(". ") == 1, "the one fault, said once"


def test_the_weights_that_a_run_reads_are_named(tmp_path, capsys):
    model = checkpoint.model(tmp_path / "model")
    RunFolder.open("sweep", {}, out=tmp_path / "run", models=[llama.locate(model)]).finish()
    assert capsys.readouterr().out.startswith("model hf: safetensors, not quantised (F32); sha256 ")
    (own,) = manifest(tmp_path / "run")["weights"]
    assert (own["sha256"], own["quantised"]) == (llama.model_digest(model), False)


# ---- sealed lines


def journal_of(path: Path, count: int = 4) -> list[str]:
    journal = Journal(path, "run")
    for step in range(count):
        journal.append({"step": step, "loss": 1.5 / (step + 1)})
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace("0.75", "0.25"), *lines[2:]], 2),
        (lambda lines: [lines[0], *lines[2:]], 2),  # one taken out
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),  # moved
        (lambda lines: [*lines, lines[-1]], 5),  # twice
        (lambda lines: [*lines[:3], lines[3].replace("digest", "dagest")], 4),
        (lambda lines: [*lines[:3], "{}\n"], 4),
        (lambda lines: [*lines[:3], "[" * 100_000 + "\n"], 4),
        (lambda lines: [*lines[:3], '{"step": 3, "loss": 0.\n'], 4),
    ],
)
def test_a_changed_line_is_named(tmp_path, damage, line):
    path = tmp_path / "j.jsonl"
    path.write_text("".join(damage(journal_of(path))))
    with pytest.raises(InputError, match=rf"j\.jsonl: line {line} is damaged or was changed"):
        Journal(path, "run")
    kept = "".join(path.read_text().splitlines(keepends=True)[: line - 1])
    path.write_text(kept)  # as the message says
    assert len(Journal(path, "run").entries) == line - 1


def test_lines_of_another_run_are_refused_and_a_cut_end_is_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = journal_of(path)
    with pytest.raises(InputError, match="line 1 "):
        Journal(path, "another run")
    path.write_text("".join(lines) + lines[0][:20])
    journal = Journal(path, "run")
    assert [entry["step"] for entry in journal.entries] == [0, 1, 2, 3]
    assert path.read_text() == "".join(lines), "cut from the file, or the next line would follow half a line"
    journal.append({"step": 4})
    assert len(Journal(path, "run").entries) == 5


# ---- one owner

HOLDER = """
import sys, time
from pathlib import Path
from rora_theory.runs.folder import RunFolder
RunFolder.open("sweep", {"rank": 4}, out=Path(sys.argv[1]))
print("open", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(path), str(seconds)], **streams)


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    """Two open at once: one gets the folder, the other a line that names it; killed, it frees the folder."""
    both = [holder(tmp_path / "run", 60) for _ in range(2)]
    while all(process.poll() is None for process in both):  # the loser ends
        pass
    [loser] = [process for process in both if process.poll() is not None]
    [winner] = [process for process in both if process is not loser]
    assert winner.stdout.readline() == "open\n"
    said = loser.communicate()[1].splitlines()[-1]
    assert f"{tmp_path / 'run'}: is in use by process {winner.pid} on " in said
    with pytest.raises(InputError, match=f"is in use by process {winner.pid} on .* since 2"):
        opened(tmp_path / "run")
    assert [session["process"] for session in manifest(tmp_path / "run")["sessions"]] == [winner.pid]
    winner.kill()
    winner.communicate()
    opened(tmp_path / "run").finish()
    assert [session["status"] for session in manifest(tmp_path / "run")["sessions"]] == ["killed", "complete"]


def test_a_run_that_ended_while_this_one_waited_is_gone_on_from(tmp_path, monkeypatch):
    """Looked at before the lock, the folder was empty; by the time it is held, another process has done a part."""
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


def test_a_process_may_open_its_own_folder_again(tmp_path):
    opened(tmp_path / "run")  # as an error leaves it in a notebook
    opened(tmp_path / "run").finish()
    opened(tmp_path / "run").finish()


def test_a_folder_that_is_no_run_gets_nothing(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("mine")
    other = opened(tmp_path / "run")
    other.finish()
    (tmp_path / "run" / folder_lock.LOCK).unlink()
    for path, said in (
        (tmp_path / "thesis", "holds files but no manifest"),
        (tmp_path / "run", "rank there 4, here 5"),
    ):
        before = sorted(path.iterdir())
        with pytest.raises(InputError, match=said):
            opened(path, rank=5)
        assert sorted(path.iterdir()) == before
    opened(tmp_path / "run").finish()


# ---- what was changed by hand


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: edit(path, best_loss=0.5), "was changed since the run wrote it"),
        (lambda path: edit(path, digest="0" * 16), "was changed since the run wrote it"),
        (lambda path: path.write_text("{"), "is damaged"),
        (lambda path: path.write_text("[]"), r"is damaged \(it has no experiment\)"),
        (lambda path: path.write_text("[" * 100_000), "is damaged"),
        (lambda path: path.write_bytes(b"\xff"), "is damaged"),
        (
            lambda path: path.write_text(json.dumps({k: v for k, v in manifest(path.parent).items() if k != "digest"})),
            "has no digest",
        ),
        (lambda path: path.unlink(), "holds files but no manifest"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, damage, said):
    folder = opened(tmp_path / "run")
    folder.write("results.csv", "a\n1\n")
    folder.finish(best_loss=1.5)
    damage(tmp_path / "run" / "manifest.json")
    with pytest.raises(InputError, match=said):
        opened(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../victim": "0"}}, r"names '\.\./victim'"),
        ({"files": {"/etc/passwd": "0"}}, "names '/etc/passwd'"),
        ({"files": ["results.csv"]}, "files is"),
        ({"files": {"results.csv": 3}}, r"results\.csv is 3"),
        ({"config": [1]}, "config is"),
        ({"experiment": 3}, "experiment is 3"),
        ({"sessions": {"a": 1}}, "sessions is"),
        ({"sessions": [3]}, "3 is not an object"),
        ({"sessions": [{"status": 3}]}, "status is 3"),
        ({"sessions": [{"status": "running", "packages": [1]}]}, "packages is"),
        ({"run_id": None}, "run_id is None"),
    ],
)
def test_a_manifest_with_values_of_the_wrong_type_is_refused(tmp_path, change, said):
    """Sealed, as whoever made the folder could have."""
    folder = opened(tmp_path)
    folder.finish()
    (tmp_path / "manifest.json").write_text(json.dumps(seals.seal(manifest(tmp_path) | change)))
    for read in (lambda: opened(tmp_path), lambda: read_finished_cells(tmp_path)):
        with pytest.raises(InputError, match=rf"manifest\.json: .*{said}"):
            read()


def test_a_changed_table_is_refused_and_a_removed_one_is_not(tmp_path):
    folder = opened(tmp_path / "run")
    for name in ("results.csv", "slopes.csv"):
        folder.write(name, "a\n1\n")
    folder.finish()
    assert seals.describe_problem(tmp_path / "run") is None
    (tmp_path / "run" / "slopes.csv").write_text("a\n2\n")
    assert "slopes.csv: was changed" in seals.describe_problem(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"slopes\.csv: was changed since the run wrote it.* remove it and run the same"
    ):
        opened(tmp_path / "run")
    (tmp_path / "run" / "slopes.csv").unlink()
    folder = opened(tmp_path / "run")
    folder.write("slopes.csv", "a\n3\n")  # a new one takes its place, and a kill now is no change by hand
    folder._release()
    opened(tmp_path / "run").finish()
    assert not seals.describe_problem(tmp_path / "run")


def test_what_was_recorded_is_missed(tmp_path):
    folder = opened(tmp_path / "run")
    model = tmp_path / "run" / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    assert not folder.has_files("model"), "not recorded yet"
    folder.record_files("model")
    folder.finish()
    folder = opened(tmp_path / "run")
    assert folder.has_files("model")
    (model / "model.safetensors").unlink()
    assert not folder.has_files("model")
    folder.clear("model")
    assert not model.exists()
    folder.finish()
    assert manifest(tmp_path / "run")["files"] == {}


def test_other_versions_are_said_and_both_kept(tmp_path, monkeypatch, capsys):
    opened(tmp_path / "run").finish()
    opened(tmp_path / "run").finish()
    assert capsys.readouterr().err == "", "the same ones are not"
    here = software.environment()
    newer = here | {"packages": here["packages"] | {"rora-theory": "99.0"}}
    monkeypatch.setattr(software, "environment", lambda: newer)
    opened(tmp_path / "run").finish()
    said = capsys.readouterr().err
    old = here["packages"]["rora-theory"]
    assert (
        said
        == f"note: {tmp_path / 'run'} is resumed with rora-theory 99.0 (was {old}); its manifest.json records both\n"
    )
    versions = [session["packages"]["rora-theory"] for session in manifest(tmp_path / "run")["sessions"]]
    assert versions == [old, old, "99.0"]


# ---- stopped


def ended(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    return stopped.value.code, capsys.readouterr().err


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it would end these tests"
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(10**8):  # the signal comes between two of these
        pass


@pytest.mark.parametrize(("stop", "status"), [(interrupt, 130), (terminate, 143)])
def test_only_a_run_folder_can_be_resumed(tmp_path, capsys, stop, status):
    """A benchmark, or a command that has finished its folder, starts anew."""
    assert ended(stop, capsys) == (status, "Interrupted.\n")

    def main() -> None:
        opened(tmp_path / "run").finish()
        stop()

    assert ended(main, capsys) == (status, "Interrupted.\n")


@pytest.mark.parametrize(("stop", "status"), [(interrupt, 130), (terminate, 143)])
def test_a_stopped_run_says_so_in_one_line_and_in_its_manifest(tmp_path, capsys, stop, status):
    def main() -> None:
        opened(tmp_path / "run").write("results.csv", "a\n1\n")
        stop()

    before = signal.getsignal(signal.SIGTERM)
    assert ended(main, capsys) == (status, sims.STOPPED + "\n")
    assert signal.getsignal(signal.SIGTERM) is before
    found = manifest(tmp_path / "run")
    assert (found["status"], found["sessions"][-1]["status"]) == ("interrupted", "interrupted")
    assert found["end"]
    (tmp_path / "run" / "results.csv").write_text("a\n2\n")
    assert "results.csv: was changed" in seals.describe_problem(tmp_path / "run"), (
        "its figures are not those that were measured"
    )
    (tmp_path / "run" / "results.csv").unlink()
    opened(tmp_path / "run").finish()
    assert manifest(tmp_path / "run")["status"] == "complete"


def test_a_failed_run_says_why(tmp_path, capsys):
    def main() -> None:
        opened(tmp_path / "run")
        raise InputError("no such thing")

    assert ended(main, capsys) == (2, "error: no such thing\n")
    assert (manifest(tmp_path / "run")["status"], manifest(tmp_path / "run")["error"]) == ("failed", "no such thing")

    def bug() -> None:
        opened(tmp_path / "run")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(bug)
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_command_ends_its_own_runs_alone(tmp_path, capsys):
    """Those that were open before it began go on."""
    before = opened(tmp_path / "before")

    def main() -> None:
        opened(tmp_path / "run")
        raise InputError("no such thing")

    assert ended(main, capsys)[0] == 2
    assert [manifest(tmp_path / name)["status"] for name in ("run", "before")] == ["failed", "running"]
    before.finish()
    assert manifest(tmp_path / "before")["status"] == "complete"


def test_a_run_on_a_full_disk_ends_in_one_line(tmp_path, capsys, full_disk):
    def work(cell: str, _: Path) -> str:
        if cell == "two":
            full_disk()
        return cell

    code, said = ended(lambda: run_with_bar(["one", "two"], work, opened(tmp_path / "run")) and None, capsys)
    assert code == 2
    assert said.startswith(f"error: {tmp_path / 'run' / CELLS}: cannot be written (No space left on device)")
    assert said.count("\n") == 1


def test_the_cells_before_a_full_disk_are_kept(tmp_path, monkeypatch, capsys):
    test_a_run_on_a_full_disk_ends_in_one_line(tmp_path, capsys, lambda: monkeypatch.setattr(files, "_write", _full))
    monkeypatch.undo()

    def work(cell: str, _: Path) -> str:
        assert cell == "two", "done twice"
        return cell

    assert run_with_bar(["one", "two"], work, opened(tmp_path / "run")) == ["one", "two"]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
