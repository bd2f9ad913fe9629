"""A matrix's cells are each done once, by whichever process, and nothing that dies stays undone."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rora_theory import files
from rora_theory.errors import InputError
from sims.common.disk import owner
from sims.common.matrix import Matrix, Place, count, key_of, work_through

CELLS = [{"rank": rank, "seed": seed} for rank in (4, 8, 16, 32) for seed in range(4)]

WORKER = """
import os, sys, time
from pathlib import Path
from sims.common import cli
from sims.common.matrix import Place, work_through

folder, log, slow, most, wait = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
cells = [Place(folder, {"rank": r, "seed": s}) for r in (4, 8, 16, 32) for s in range(4)]

def run(index, _path):
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {index}\\n")
    time.sleep(slow)
    return {"done_by": os.getpid()}

def seen(index, status):
    if status.state != "done":
        print(index, status.state, status.attempts, flush=True)

def main():
    for worked in work_through(cells, run, most=most, wait=wait, seen=seen):
        pass

cli.run(main)
"""


def worker(folder: Path, log: Path, *, slow: float, most: int = 3, wait: float = 0.02) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(folder), str(log), str(slow), str(most), str(wait)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(log: Path) -> list[tuple[int, int]]:
    """(process, cell) of every beginning."""
    text = log.read_text() if log.exists() else ""
    return [tuple(map(int, line.split())) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(log: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(lines(log)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "killed in the middle"


def cell(tmp_path: Path, **config) -> Place:
    return Place(tmp_path / "cells", {"rank": 4} | config)


def test_a_cell_is_its_whole_configuration():
    assert key_of({"a": 1, "b": (1, 2)}) == key_of({"b": [1, 2], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": 1, "b": None}), key_of({"a": 1.5})}) == 4


def test_a_done_cell_is_left_alone(tmp_path):
    one = cell(tmp_path)
    assert one.status().state == "new"
    assert not one.path.exists(), "looking makes nothing"
    assert one.work(lambda path: {"loss": 1.5}, most=1).state == "done"
    assert one.result() == {"loss": 1.5}
    assert json.loads((one.path / "cell.json").read_text()) == {"rank": 4}
    assert one.work(lambda path: pytest.fail("done twice"), most=9) is None
    assert (one.status().state, one.status().attempts) == ("done", 1)


def test_a_failing_cell_is_kept_and_the_others_go_on(tmp_path):
    cells = [Place(tmp_path, config) for config in CELLS[:3]]

    def run(index, _path):
        if index == 1:
            raise ValueError("no such thing")
        return {"index": index}

    worked = list(work_through(cells, run, most=2))
    assert [(one.index, one.status.state) for one in worked] == [(0, "done"), (1, "failed"), (2, "done")]
    assert cells[1].status().error == "ValueError: no such thing"
    assert "in run" in (cells[1].path / "attempts.jsonl").read_text(), "the traceback is kept"
    seen = []
    again = list(work_through(cells, run, most=2, seen=lambda index, status: seen.append((index, status.state))))
    assert [one.index for one in again] == [1], "tried once more, the others not"
    assert seen == [(0, "done"), (1, "failed"), (2, "done")]
    assert list(work_through(cells, run, most=2)) == [], "two attempts are the most"
    assert count(one.status() for one in cells) == {"done": 2, "failed": 1}


def test_a_beginning_that_was_interrupted_is_no_attempt(tmp_path):
    def failing(_path):
        raise ValueError("no")

    cell = Place(tmp_path, CELLS[0])
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            cell.work(_interrupted, most=2)
        assert (cell.status().state, cell.status().attempts) == ("new", 0)
    assert cell.work(failing, most=2).attempts == 1
    with pytest.raises(KeyboardInterrupt):
        cell.work(_interrupted, most=2)
    assert (cell.status().state, cell.status().attempts) == ("failed", 1)
    assert cell.work(lambda path: {"x": 1}, most=2).state == "done"


def test_two_processes_do_every_cell_once_between_them(tmp_path):
    log = tmp_path / "log"
    workers = [worker(tmp_path / "cells", log, slow=0.05) for _ in range(2)]
    for one in workers:
        one.communicate()
        assert one.returncode == 0
    assert sorted(index for _, index in lines(log)) == list(range(len(CELLS))), "each once"
    assert {process for process, _ in lines(log)} == {one.pid for one in workers}, "both had work"
    assert {Place(tmp_path / "cells", c).status().state for c in CELLS} == {"done"}


def test_a_cell_in_a_living_process_is_running_and_in_a_killed_one_dead(tmp_path):
    log = tmp_path / "log"
    first = Place(tmp_path / "cells", CELLS[0])
    for attempt in (1, 2):
        process = worker(tmp_path / "cells", log, slow=60)
        wait_for(log, attempt)
        assert (first.status().state, first.status().attempts) == ("running", attempt)
        assert first.work(lambda path: pytest.fail("taken from a living process"), most=9) is None
        kill(process)
        assert (first.status().state, first.status().attempts) == ("dead", attempt)
    assert first.work(lambda path: pytest.fail("two attempts are the most"), most=2) is None
    assert first.work(lambda path: {}, most=3).attempts == 3


def test_a_waiting_process_takes_over_what_a_killed_one_had(tmp_path):
    log = tmp_path / "log"
    dying = worker(tmp_path / "cells", log, slow=60)
    wait_for(log, 1)
    helper = worker(tmp_path / "cells", log, slow=0)
    wait_for(log, len(CELLS))  # all but the first are done; the helper waits for that one
    time.sleep(0.1)
    assert helper.poll() is None, "it waits for the other's cell"
    kill(dying)
    said, _ = helper.communicate(timeout=60)
    assert said.splitlines() == ["0 dead 1"], "the dead cell is named"
    assert [index for process, index in lines(log) if process == helper.pid][-1] == 0
    assert Place(tmp_path / "cells", CELLS[0]).result() == {"done_by": helper.pid}


def test_half_a_line_of_a_killed_writer_is_no_attempt(tmp_path):
    one = cell(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        one.work(_interrupted, most=3)
    file = one.path / "attempts.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])  # as a kill leaves it, without the word "stopped"
    assert (one.status().state, one.status().attempts) == ("dead", 1), "dead is not failed"
    file.write_text(file.read_text() + '{"event": "beg')
    assert one.status().attempts == 1
    assert one.work(lambda path: {}, most=3).attempts == 2
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["begin", "begin"]


def _interrupted(_path: Path):
    raise KeyboardInterrupt


def test_a_folder_belongs_to_one_identity_and_may_grow(tmp_path):
    Matrix(tmp_path / "m", "sweep", {"model": "a", "evaluation": None})
    Matrix(tmp_path / "m", "sweep", {"model": "a", "evaluation": {"limit": 3}})
    Matrix(tmp_path / "m", "sweep", {"model": "a", "evaluation": None})
    config = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert config["config"] == {"model": "a", "evaluation": {"limit": 3}}
    assert len(config["runs"]) == 3
    for name, identity, said in (
        ("sweep", {"model": "b", "evaluation": None}, "model there 'a', here 'b'"),
        ("sweep", {"model": "a", "evaluation": {"limit": 4}}, "evaluation there {'limit': 3}, here {'limit': 4}"),
        ("other", {"model": "a"}, "holds a matrix of sweep"),
    ):
        with pytest.raises(InputError, match=said):
            Matrix(tmp_path / "m", name, identity)
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "file").write_text("")
    with pytest.raises(InputError, match="holds files but no manifest"):
        Matrix(tmp_path / "n", "sweep", {})
    with pytest.raises(InputError, match="is a file"):
        Matrix(tmp_path / "n" / "file", "sweep", {})
    assert not (tmp_path / "n" / ".lock").exists(), "nothing is laid into another's folder"
    (tmp_path / "m" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: is damaged"):
        Matrix(tmp_path / "m", "sweep", {"model": "a"})


def damaged(path: Path) -> pytest.RaisesExc:
    return pytest.raises(InputError, match=re.escape(str(path)) + ": (is damaged|was changed)")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"loss": 1.5}', "[" * 100_000])
def test_a_result_that_was_not_measured_is_named(tmp_path, content):
    one = cell(tmp_path)
    one.work(lambda path: {"loss": 1.5}, most=1)
    (one.path / "result.json").write_text(content)
    for look in (one.result, one.status, one.check, lambda: one.work(lambda path: {}, most=9)):
        with damaged(one.path / "result.json"):
            look()


def test_figures_changed_by_hand_do_not_pass(tmp_path):
    """A result's, another cell's result, and a file of the cell's."""

    def run(path: Path) -> dict[str, float]:
        (path / "losses.csv").write_text("loss\n1.5\n")
        return {"loss": 1.5}

    matrix = Matrix(tmp_path, "sweep", {})
    one, other = (matrix.place(config) for config in CELLS[:2])
    for each in (one, other):
        each.work(run, most=1)
        each.check()
    result = one.path / "result.json"
    whole = result.read_text()
    result.write_text(whole.replace("1.5", "1.4"))
    with damaged(result):
        Matrix(tmp_path, "sweep", {})
    result.write_text((other.path / "result.json").read_text())
    with damaged(result):
        one.result()
    result.write_text(whole)
    assert one.result() == {"loss": 1.5}
    (one.path / "losses.csv").write_text("loss\n1.4\n")
    with damaged(one.path / "losses.csv"):
        Matrix(tmp_path, "sweep", {})
    (one.path / "losses.csv").write_text("loss\n1.5\n")
    (one.path / "cell.json").write_text(json.dumps(CELLS[2]))
    with damaged(one.path / "cell.json"):
        Matrix(tmp_path, "sweep", {})
    (one.path / "cell.json").write_text("[" * 100_000)
    with damaged(one.path / "cell.json"):
        list(matrix.begun())


@pytest.mark.parametrize("line", ["{", "[]", '{"event": "error", "attempt": 1}', "7", '{"attempt": 1}'])
def test_damaged_attempts_are_named(tmp_path, line):
    one = cell(tmp_path)
    one.path.mkdir(parents=True)
    (one.path / "attempts.jsonl").write_text(line + "\n")
    with damaged(one.path / "attempts.jsonl"):
        one.status()


def test_a_changed_table_or_manifest_is_refused(tmp_path):
    matrix = Matrix(tmp_path, "sweep", {"model": "a"})
    matrix.write_table(lambda: "loss\n1.5\n")
    matrix.write_table(lambda: "loss\n1.5\n2.5\n")
    matrix.finish("complete")
    (tmp_path / "results.csv").write_text("loss\n1.5\n0.5\n")
    with damaged(tmp_path / "results.csv"):
        Matrix(tmp_path, "sweep", {"model": "a"})
    (tmp_path / "results.csv").unlink()
    Matrix(tmp_path, "sweep", {"model": "a"})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"model": "a"', '"model": "b"'))
    with damaged(manifest):
        Matrix(tmp_path, "sweep", {"model": "b"})


def test_three_sigterms_are_no_attempts(tmp_path):
    """As a cluster sends them, to a real process in the middle of a cell."""
    log = tmp_path / "log"
    first = Place(tmp_path / "cells", CELLS[0])
    for number in (1, 2, 3):
        process = worker(tmp_path / "cells", log, slow=60)
        wait_for(log, number)
        process.terminate()
        process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert (first.status().state, first.status().attempts) == ("new", 0)


def test_a_full_disk_ends_the_work_and_is_no_attempt(tmp_path, monkeypatch):
    cells = [Place(tmp_path, config) for config in CELLS[:2]]

    def run(_index: int, _path: Path) -> dict[str, float]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=f"{cells[0].path}: cannot be written .No space left on device"):
        list(work_through(cells, run, most=1))
    assert [(one.status().state, one.status().attempts) for one in cells] == [("new", 0), ("new", 0)]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(InputError, match=r"cell\.json: cannot be written .No space left on device"):
            list(work_through(cells, lambda index, path: {}, most=1))
    assert [worked.status.state for worked in work_through(cells, lambda index, path: {}, most=1)] == ["done", "done"]


def waits(act, lock: Path) -> None:
    """Another holder of a lock makes ``act`` wait until it lets go."""
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=act)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "it did not take the lock"
    thread.join(60)
    assert not thread.is_alive()


def test_the_matrix_is_changed_under_its_lock_alone(tmp_path):
    matrix = Matrix(tmp_path, "sweep", {"model": "a"})
    waits(lambda: matrix.update({"status": "complete"}), tmp_path / ".lock")
    waits(lambda: matrix.write_table(lambda: "x\n"), tmp_path / ".lock")
    waits(lambda: Matrix(tmp_path, "sweep", {"model": "a"}), tmp_path / ".lock")
    assert len(json.loads((tmp_path / "manifest.json").read_text())["runs"]) == 2


def test_a_cell_in_other_hands_is_left_and_its_owner_named(tmp_path):
    one = cell(tmp_path)

    def run(path: Path) -> dict[str, int]:
        assert owner(path, "lock").startswith(f"process {os.getpid()} on ")
        assert cell(tmp_path).work(lambda path: pytest.fail("done by two at once"), most=9) is None
        return {}

    assert one.work(run, most=1).state == "done"


SHARER = """
import sys
from pathlib import Path
from sims.common.matrix import Matrix, work_through

matrix = Matrix(Path(sys.argv[1]), "sweep", {"model": "a"})
cells = [matrix.place({"rank": r, "seed": s}) for r in (4, 8, 16, 32) for s in range(4)]
for worked in work_through(cells, lambda index, path: {"index": index}, most=3, wait=0.01):
    matrix.write_table(lambda: "".join(f"{cell.result()['index']}\\n" for cell in cells if cell.result()))
matrix.finish("complete")
"""


def test_two_processes_leave_one_whole_table(tmp_path):
    """Opened at once, worked on at once: both runs are on record and the table has every cell's line."""
    both = [subprocess.Popen([sys.executable, "-c", SHARER, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "results.csv").read_text().split() == [str(index) for index in range(len(CELLS))]
    runs = json.loads((tmp_path / "manifest.json").read_text())["runs"]
    assert sorted(run["process"] for run in runs) == sorted(process.pid for process in both)
    assert {run["status"] for run in runs} == {"complete"}
    assert {run["packages"]["rora-theory"] for run in runs}, "the version that did it"
    Matrix(tmp_path, "sweep", {"model": "a"})


def test_runs_of_several_processes_are_told_apart(tmp_path):
    first, second = (Matrix(tmp_path, "sweep", {"model": "a"}) for _ in range(2))
    first.update({"status": "complete"}, cells=3)
    second.update({"status": "failed"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [run["status"] for run in manifest["runs"]] == ["complete", "failed"]
    assert manifest["cells"] == 3
    assert manifest["runs"][0]["process"] == os.getpid()
