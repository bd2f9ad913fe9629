"""Cells on workers: options refused before work, the worker's function by itself, and one real Ray session."""

import importlib.util
import ipaddress
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import squares

from rora_theory.errors import InputError
from rora_theory.runs import cluster
from rora_theory.runs import lock as folder_lock
from rora_theory.runs.cells import in_process
from rora_theory.runs.cluster import ClusterConfig, compute_cell, fetch_work, leave, read_lock

with_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster (Ray) is not installed")


def test_a_single_process_does_not_need_ray(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert ClusterConfig().runner() is in_process
    for options in ({"workers": 2}, {"address": "127.0.0.1:1"}):
        with pytest.raises(InputError, match=r"--workers and --address .* pip install 'rora-theory\[cluster\]'"):
            ClusterConfig(**options).runner()
    leave()  # nothing to leave


@with_ray
def test_no_cluster_at_the_address(tmp_path, capsys) -> None:
    """The command prints one line before the run folder is made."""
    with pytest.raises(SystemExit) as stop:
        squares.main(str(tmp_path / "out"), str(tmp_path), "--address", "127.0.0.1:1")
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --address 127.0.0.1:1: nothing answers there (Connection refused). Pass HOST:PORT")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the worker's function, called here


@pytest.fixture
def owned(tmp_path) -> Iterator[Path]:
    """Return the folder of a cell in a run folder that this process owns."""
    (run := tmp_path / "run").mkdir()
    descriptor = folder_lock.acquire(run)
    yield run / "cells" / "1"
    os.close(descriptor)


def test_a_worker_that_sees_the_run_folder_works_in_it(owned, tmp_path) -> None:
    (owned / "checkpoints").mkdir(parents=True)
    (owned / "checkpoints" / "earlier").write_text("half")
    result = compute_cell(squares.work, squares.Square(2, str(tmp_path)), owned, read_lock(owned))
    assert (result.value, result.files) == ({"area": 4 / 3}, {})
    assert (owned / "losses.csv").read_text() == f"loss\n{2 / 3}\n"
    assert (owned / "checkpoints" / "earlier").exists(), "from which it resumes"
    assert result.seconds >= 0
    assert result.software["python"]


@pytest.mark.parametrize("lock", [None, "another owner's"])
def test_a_worker_on_another_machine_sends_the_files(owned, tmp_path, lock) -> None:
    """A folder of the same path there is not written to, and checkpoints are not sent."""
    result = compute_cell(squares.work, squares.Square(2, str(tmp_path)), owned, lock)
    assert result.files == {"losses.csv": f"loss\n{2 / 3}\n".encode()}
    assert result.value == {"area": 4 / 3}
    assert not owned.exists()


@pytest.mark.usefixtures("unchecked")
def test_cells_of_one_run_share_the_work_and_the_next_run_gets_its_own(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "_last_work", [])
    loaded = []

    def get(reference: str) -> str:
        loaded.append(reference)
        return f"work of {reference}"

    results = [fetch_work(reference, get) for reference in ("one", "one", "two", "two", "one")]
    assert results == ["work of one", "work of one", "work of two", "work of two", "work of one"]
    assert loaded == ["one", "two", "one"]


def test_files_of_another_machine_stay_in_the_cell_s_folder(tmp_path, caplog) -> None:
    """Files of an earlier attempt are removed, and a node with other software is named once."""
    folder, warned = tmp_path / "cell", set()
    folder.mkdir()
    (folder / "old").write_text("")
    other = cluster._environment() | {"python": "2.7"}
    result = cluster.CellResult(3, {"a/b.csv": b"x"}, 1.5, other)
    for _ in range(2):
        outcome = cluster._receive(4, result, "n1", folder, warned)
    assert (outcome.position, outcome.result, outcome.seconds, outcome.node) == (4, 3, 1.5, "n1")
    assert outcome.software == other
    assert [path.name for path in folder.rglob("*")] == ["a", "b.csv"]
    assert caplog.text.count("node n1 runs python 2.7") == 1
    with pytest.raises(InputError, match=r"names '\.\./out'"):
        cluster._receive(4, result._replace(files={"../out": b""}), "n1", folder, warned)
    assert cluster._receive(4, result._replace(software=cluster._environment()), "n1", folder, warned).software is None


@pytest.mark.parametrize(
    ("options", "node", "missing"),
    [
        ({"cell_cpus": 9.0}, {"CPU": 8}, "CPU 9"),
        ({"cell_gpus": 1.0}, {"CPU": 8}, "GPU 1"),
        ({"cell_memory": 2.0}, {"CPU": 8, "memory": 2**30}, "memory 2"),
        ({}, {"CPU": 8, "GPU": 1}, None),
    ],
)
def test_a_cell_that_needs_more_than_this_machine_has_is_refused(monkeypatch, options, node, missing) -> None:
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node}])
    monkeypatch.setattr(cluster, "_connect", lambda _: ray)
    config = ClusterConfig(workers=2, **options)
    if missing is None:
        assert config.runner().needs == {"num_cpus": 1.0, "num_gpus": 1.0}
    else:
        with pytest.raises(InputError, match=rf"{missing}.*--cell-"):
            config.runner()


# ---- one real session


@pytest.mark.slow
@with_ray
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function Popen.__del__")
def test_workers_write_the_files_of_one_process_and_resume(tmp_path, capfd, monkeypatch) -> None:
    """One cell raises an exception and the process of another ends; the same command computes only these again."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(root), str(root / "tests"))))
    squares.main(str(tmp_path / "one" / "run"), str(tmp_path / "one"))
    marks, out = tmp_path / "two", tmp_path / "two" / "run"
    (marks / "2.fail").touch()
    (marks / "5.die").touch()
    seen = []
    end = cluster.leave

    def look_and_leave() -> None:
        if cluster._sessions:
            session = Path(cluster._sessions[0].name)
            addresses = [ipaddress.ip_address(node["NodeManagerAddress"]) for node in sys.modules["ray"].nodes()]
            seen.append((stat.S_IMODE(session.stat().st_mode), all(address.is_loopback for address in addresses)))
            end()
            assert not session.exists()

    monkeypatch.setattr(cluster, "leave", look_and_leave)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        squares.main(str(out), str(marks), "--workers", "2")
    printed = capfd.readouterr()
    assert stop.value.code == 1
    assert seen == [(0o700, True)], "only this user can enter the session's folder, and no other machine connects"
    assert "side 2 failed (ValueError: no square of side 2)" in printed.err
    assert "2 of 6 cells failed" in printed.err
    errors = [path.read_text() for path in out.glob("cells/*/error.txt")]
    assert any("in work" in text and "no square of side 2" in text for text in errors), "the worker's own traceback"
    assert len(squares.attempts(marks, 5)) == 1 + cluster.RETRIES
    for name in ("2.fail", "5.die"):
        (marks / name).unlink()
    before = {side: len(squares.attempts(marks, side)) for side in range(1, 7)}
    squares.main(str(out), str(marks), "--workers", "2")
    after = {side: len(squares.attempts(marks, side)) for side in range(1, 7)}
    assert after == before | {2: before[2] + 1, 5: before[5] + 1}
    assert "cells per node: 2 on " in capfd.readouterr().out
    assert _contents(out) == _contents(tmp_path / "one" / "run")
    assert not cluster._sessions


def _contents(out: Path) -> dict[str, object]:
    """Return the results of a run and the files of its cells, whose keys depend on the folder of the marks."""
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    values = {line["cell"]["side"]: line["value"] for line in lines}
    losses = {line["cell"]["side"]: (out / "cells" / line["key"] / "losses.csv").read_text() for line in lines}
    return {"values": values, "losses": losses, "table": (out / "results.csv").read_text()}
