"""The GPU benchmark loses nothing: parts that die, hang or fail, the time that is left, and the wheels it brings."""

import importlib
import json
import sys
import time
import zipfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of benchmarks/ as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("gpu", "gpu_ours", "gather_wheels"):
        sys.modules.pop(name, None)


@pytest.fixture
def gpu(load):
    return load("gpu")


WORKER = """
import json, os, sys, time
def answer(name): print('@record ' + json.dumps({"name": name, "status": "done"}), flush=True)
names = json.loads(sys.argv[1])["names"]
if "no set-up" in names: sys.exit("cannot import it")
print("@ready", flush=True)
for name in names:
    if name == "dies": os._exit(9)
    if name == "hangs": time.sleep(60)
    answer(name)
"""


@pytest.fixture
def done(gpu, tmp_path, monkeypatch):
    """What a task's names come to within some seconds."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "HERE", tmp_path)

    def run(names, seconds):
        log = gpu.Log(tmp_path / "log.jsonl")
        gpu.run_worker(log, gpu.Task("s", "ours", "worker.py", {}, names), time.monotonic() + seconds)
        written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert written == log.records, "all is on the disk"
        return {record["name"].removeprefix("ours "): record for record in written}

    return run


def test_a_part_that_kills_its_process_loses_itself_alone(done):
    found = done(["a", "dies", "b", "c"], 60)
    assert {name: one["status"] for name, one in found.items()} == {
        "a": "done", "dies": "crashed", "b": "done", "c": "done",
    }  # fmt: skip
    assert found["dies"]["exit_status"] == 9


def test_a_worker_that_cannot_start_is_started_once(done):
    found = done(["no set-up", "b"], 60)
    assert {one["status"] for one in found.values()} == {"crashed"}
    assert "cannot import it" in found["b"]["output"]


@pytest.mark.slow
def test_what_hangs_is_ended_in_time(done):
    begin = time.monotonic()
    found = done(["a", "hangs", "b"], 2)
    assert time.monotonic() - begin < 20
    assert {name: one["status"] for name, one in found.items()} == {
        "a": "done", "hangs": "out of time", "b": "out of time",
    }  # fmt: skip


def test_a_command_that_is_not_done_in_time_has_not_failed(gpu, tmp_path, capsys):
    """One that another kills, or that ends with an error, has."""
    log = gpu.Log(tmp_path / "gpu.jsonl")
    gpu.run_sweep(log, gpu.REHEARSAL, time.monotonic() + 0.1)
    assert log.find("sweep", "variance_sweep")["status"] == "out of time"
    later = time.monotonic() + 60
    assert [gpu.how(status, later) for status in (0, 1, -9)] == ["done", "failed", "failed"]
    capsys.readouterr()


def test_every_section_has_its_time_and_its_own_failure(gpu, tmp_path, monkeypatch, capsys):
    given = {}

    def section(name):
        def run(log, _, until):
            given[name] = until - time.monotonic()
            if name == "tests":
                raise RuntimeError("planted")
            log.write(name, "ours x", status="done", tokens_per_second=30.0)
            log.write(name, "peer x", status="done", tokens_per_second=10.0)
            log.write(name, "peer x compiled", status="done", tokens_per_second=20.0)

        return run

    monkeypatch.setattr(gpu, "RUNS", {name: section(name) for name in gpu.RUNS})
    monkeypatch.setattr(gpu, "machine", dict)
    config = gpu.Config(out=tmp_path / "gpu.jsonl", rehearse=True)
    assert not gpu.main(config), "a section failed"
    # Of nine minutes each section leaves the later ones theirs.
    assert sum(gpu.RESERVED.values()) + gpu.CLOSING < gpu.WHOLE == 540
    assert given["sweep"] == pytest.approx(540 - gpu.CLOSING, abs=2)
    assert given["rate"] == pytest.approx(540 - gpu.CLOSING - sum(gpu.RESERVED.values()) + gpu.RESERVED["rate"], abs=2)
    records = [json.loads(line) for line in config.out.read_text().splitlines()]
    assert [r["error"] for r in records if r["status"] == "failed"] == ["RuntimeError: planted"]
    assert records[-1]["lines"][0] == "rate: x: 1.50 times the peer's tokens_per_second", "at the peer's best"
    assert len(records[-1]["lines"]) == 5
    assert gpu.main(gpu.Config(out=tmp_path / "two.jsonl", sections=("sweep",), minutes=1e-4)) is False
    assert '"out of time"' in (tmp_path / "two.jsonl").read_text()
    capsys.readouterr()


@pytest.mark.slow
def test_a_cell_is_timed_and_set_beside_its_plan(load):
    ours, gpu = load("gpu_ours"), load("gpu")
    (cell, *_) = gpu.REHEARSAL.cells((2, 16))
    names = ["lora r=8 4x2048", "dora r=8 4x2048", "lora r=128 4x2048", "dora r=128 4x2048"]
    assert [one.name for one in gpu.SEVEN_B.cells((4, 2048))] == names
    spec = gpu.ours("training", gpu.REHEARSAL, [cell.name], rate=1e12).spec | {"cells": {cell.name: vars(cell)}}
    found = ours.training(spec)(cell.name)
    assert found["tokens_per_second"] == pytest.approx(32 / found["seconds"])
    assert len(found["timings"]) == gpu.REHEARSAL.steps
    assert found["utilisation"] == pytest.approx(found["model_flops_per_second"] / 1e12)
    assert found["remat"] == "False"
    assert found["planned_bytes"] > 0
    assert "lora r=2 2x16: done, " in gpu.describe({"section": "training", "name": cell.name, "status": "done"} | found)


def test_wheels_bring_what_they_need_and_replace_nothing(load, tmp_path, monkeypatch):
    wheels = load("gather_wheels")
    pure = {"tyro": ["rich>=13", "numpy", 'colorama; sys_platform == "win32"', 'torch; extra == "ml"'], "rich": []}

    def download(requirement, folder):
        if (name := wheels.name_of(requirement)) not in pure:
            return None
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            lines = "".join(f"Requires-Dist: {one}\n" for one in pure[name])
            file.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\n{lines}")
        return path

    monkeypatch.setattr(wheels, "download", download)
    monkeypatch.setattr(wheels, "wanted", lambda: ["tyro>=0.9", "JAX_lib>=1"])
    found, compiled = wheels.gather(tmp_path / "wheels")
    assert [path.name.split("-")[0] for path in found] == ["tyro", "rich"]
    assert compiled == ["jax-lib", "numpy"]
    started = []
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: started.append(command))
    monkeypatch.setattr(wheels, "missing", lambda names: [name for name in names if name == "rich"])
    assert wheels.install(tmp_path / "wheels") == ["rich"]
    assert [word for word in started[0] if word.endswith(".whl")] == [
        str(tmp_path / "wheels/rich-1.0-py3-none-any.whl")
    ]
