"""The GPU benchmark keeps its results when tasks die, hang or fail; the remaining time; its wheels."""

import importlib
import json
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gather_wheels, gpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

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
def run_worker(tmp_path, monkeypatch):
    """Return a function that returns the records of named tasks within some seconds."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "HERE", tmp_path)

    def run(names, seconds):
        log = gpu.Log(tmp_path / "log.jsonl")
        gpu.run_worker(log, gpu.WorkerTask("s", "ours", "worker.py", {}, names), time.monotonic() + seconds)
        records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert records == log.records, "every record is on the disk"
        return {record["name"].removeprefix("ours "): record for record in records}

    return run


def statuses(records):
    return {name: record["status"] for name, record in records.items()}


def test_a_part_that_kills_its_process_loses_only_its_own_results(run_worker):
    records = run_worker(["a", "dies", "b", "c"], 60)
    assert statuses(records) == {"a": "done", "dies": "crashed", "b": "done", "c": "done"}
    assert records["dies"]["exit_status"] == 9


def test_a_worker_that_cannot_start_is_started_once(run_worker):
    records = run_worker(["no set-up", "b"], 60)
    assert statuses(records) == {"no set-up": "crashed", "b": "crashed"}
    assert "cannot import it" in records["b"]["output"]


@pytest.mark.slow
def test_a_hanging_part_is_stopped_in_time(run_worker):
    begin = time.monotonic()
    records = run_worker(["a", "hangs", "b"], 2)
    assert time.monotonic() - begin < 40, "the worker would sleep for 60 seconds"
    assert statuses(records) == {"a": "done", "hangs": "out of time", "b": "out of time"}


def test_a_command_that_runs_out_of_time_has_not_failed(tmp_path, capsys):
    """A command that is killed from outside, or ends with an error, has failed."""
    log = gpu.Log(tmp_path / "gpu.jsonl")
    gpu.run_sweep(log, gpu.REHEARSAL, time.monotonic() + 0.1)
    assert log.find("sweep", "variance_sweep")["status"] == "out of time"
    later = time.monotonic() + 60
    assert [gpu.outcome(status, later) for status in (0, 1, -9)] == ["done", "failed", "failed"]
    capsys.readouterr()


def test_sections_have_separate_times_and_failures(tmp_path, monkeypatch, capsys):
    seconds = {}

    def section(name):
        def run(log, _, until):
            seconds[name] = until - time.monotonic()
            if name == "tests":
                raise RuntimeError("planted")
            log.write(name, "ours x", status="done", tokens_per_second=30.0)
            log.write(name, "peer x", status="done", tokens_per_second=10.0)
            log.write(name, "peer x compiled", status="done", tokens_per_second=20.0)

        return run

    monkeypatch.setattr(gpu, "RUNS", {name: section(name) for name in gpu.RUNS})
    monkeypatch.setattr(gpu, "describe_machine", dict)
    config = gpu.GpuOptions(out=tmp_path / "gpu.jsonl", rehearse=True)
    assert not gpu.main(config), "a section failed"
    # Each section leaves the later ones their share of the nine minutes.
    assert sum(gpu.RESERVED.values()) + gpu.CLOSING < gpu.TOTAL_SECONDS == 540
    assert seconds["sweep"] == pytest.approx(540 - gpu.CLOSING, abs=2)
    reserved = sum(gpu.RESERVED.values()) - gpu.RESERVED["rate"]
    assert seconds["rate"] == pytest.approx(540 - gpu.CLOSING - reserved, abs=2)
    records = [json.loads(line) for line in config.out.read_text().splitlines()]
    assert [r["error"] for r in records if r["status"] == "failed"] == ["RuntimeError: planted"]
    assert records[-1]["lines"][0] == "rate: x: 1.50 times the peer's tokens_per_second", "at the peer's best"
    assert len(records[-1]["lines"]) == 5
    assert gpu.main(gpu.GpuOptions(out=tmp_path / "two.jsonl", sections=("sweep",), minutes=1e-4)) is False
    assert '"out of time"' in (tmp_path / "two.jsonl").read_text()
    capsys.readouterr()


@pytest.mark.slow
def test_a_cell_is_timed_with_its_memory_and_share_of_the_rate(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # the worker is a script, which imports the other by its name
    monkeypatch.setitem(sys.modules, "gpu", gpu)
    worker = importlib.import_module("gpu_ours")
    monkeypatch.delitem(sys.modules, "gpu_ours")
    (cell, *_) = gpu.REHEARSAL.cells((2, 16))
    names = ["lora r=8 4x2048", "dora r=8 4x2048", "lora r=128 4x2048", "dora r=128 4x2048"]
    assert [row.name for row in gpu.SEVEN_B.cells((4, 2048))] == names
    spec = gpu.our_task("training", gpu.REHEARSAL, [cell.name], rate=1e12).spec | {"cells": {cell.name: vars(cell)}}
    record = worker.training(spec)(cell.name)
    assert record["tokens_per_second"] == pytest.approx(32 / record["seconds"])
    assert len(record["timings"]) == gpu.REHEARSAL.steps
    assert record["utilisation"] == pytest.approx(record["model_flops_per_second"] / 1e12)
    assert record["remat"] == "False"
    assert record["compiler_bytes"] > 0
    model = worker.model_config(spec)
    forward_and_input_gradients = 4 * 32 * worker.llama.count_parameters(model)
    assert record["model_flops_per_second"] * record["seconds"] == pytest.approx(forward_and_input_gradients, rel=0.5)
    assert "lora r=2 2x16: done, " in gpu.describe(
        {"section": "training", "name": cell.name, "status": "done"} | record
    )


def test_wheels_include_their_dependencies_and_replace_nothing(tmp_path, monkeypatch):
    pure = {"tyro": ["rich>=13", "numpy", 'colorama; sys_platform == "win32"', 'torch; extra == "ml"'], "rich": []}

    def download(requirement, folder):
        if (name := gather_wheels.package_name(requirement)) not in pure:
            return None
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            lines = "".join(f"Requires-Dist: {required}\n" for required in pure[name])
            file.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\n{lines}")
        return path

    monkeypatch.setattr(gather_wheels, "download", download)
    monkeypatch.setattr(gather_wheels, "required_packages", lambda: ["tyro>=0.9", "JAX_lib>=1"])
    gathered, compiled = gather_wheels.gather(tmp_path / "wheels")
    assert [path.name.split("-")[0] for path in gathered] == ["tyro", "rich"]
    assert compiled == ["jax-lib", "numpy"]
    started = []
    monkeypatch.setattr(gather_wheels.subprocess, "run", lambda command, **_: started.append(command))
    monkeypatch.setattr(gather_wheels, "missing_packages", lambda names: [name for name in names if name == "rich"])
    assert gather_wheels.install(tmp_path / "wheels") == ["rich"]
    wheels = [word for word in started[0] if word.endswith(".whl")]
    assert wheels == [str(tmp_path / "wheels/rich-1.0-py3-none-any.whl")]
