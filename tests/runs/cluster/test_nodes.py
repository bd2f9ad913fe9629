"""Clusters of several nodes on one machine: nodes and drivers that die, cells that fail, and identical output files."""

import gc
import importlib.util
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint, squares

import sims
from rora_theory.lab.llama import locate
from rora_theory.runs import frames, software
from rora_theory.runs.cells import CellOutcome
from rora_theory.runs.cluster import ClusterConfig, driver, leave, orphans, worker
from rora_theory.runs.cluster.connection import LOOPBACK, QUIET
from rora_theory.runs.reading import key_of
from sims import horizon, sweep, variance_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO name='/dev/null'"),  # Ray 2.49 leaves it open
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster (Ray) is not installed"),
]

ROOT = Path(__file__).parents[3]
STORE = 80 << 20
"""Bytes of a node's object store."""
RECORDS = "--train-records 12 --held-out 4 --cutoff 400 --batch-size 4 --warmup 0"
RANKS = f"{RECORDS} --methods lora --ranks 2 4 --seeds 0 --steps 1 --widths 1 --dropout 0"
HORIZON = f"{RECORDS} --ranks 2 --strengths 4 --lrs 1e-3 --read-at 1 --full-lrs 1e-3"
VARIANCE = "--ranks 1 16 --p-in 64 --p-out 8 --overlaps 0.5 --relative-error 0.05 --devices 1"
MEASURED = re.compile(rb'"(?:\w*seconds|compilations|digest|cells/\w+/metrics\.jsonl)": ("\w+"|[^,}]+)')
"""What a cell measures of its own work, and digests of that."""
NUMBER = re.compile(rb"-?0x[01]\.[0-9a-f]+p[+-]\d+|-?\d+\.?\d*(?:e[+-]?\d+)?")
"""A number, in hexadecimal or decimal notation."""
OF_RAY = re.compile(r"\[\d{4}-\d\d-\d\d [^]]*\] \w+\.(?:cc|h):\d+: ")
"""A line of Ray's own core, which may complain where its driver or a worker ends."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[Any]:
    """Start a cluster with a head, which runs no cells, and two nodes that run one cell each."""
    with pytest.MonkeyPatch.context() as patch:
        environment = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "XDG_CACHE_HOME": tmp_path_factory.mktemp("cache"),
            "JAX_NUM_CPU_DEVICES": 8,  # as in this process, whose compiled programs the workers then find
        }
        for name, value in (QUIET | LOOPBACK | environment).items():
            patch.setenv(name, str(value))
        from ray._private import services
        from ray.cluster_utils import Cluster

        # Ray drops processes of a node that fails to start or ends slowly without waiting for them; their warnings
        # would fail a later test.
        started: list[subprocess.Popen] = []

        class RecordedPopen(services.ConsolePopen):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                started.append(self)

        patch.setattr(services, "ConsolePopen", RecordedPopen)
        health_checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a dead node: 2 s, not 15
        head = {
            "num_cpus": 0,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_system_config": health_checks,
        }
        try:
            cluster = Cluster(initialize_head=True, head_node_args=head)
            cluster.add_node = partial(cluster.add_node, object_store_memory=STORE)
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            yield cluster
            leave()
            cluster.shutdown()
        finally:
            for process in started:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def large(nodes) -> Iterator[Any]:
    """Start a node that claims two GPUs and 100 GiB, which Ray does not verify."""
    node = nodes.add_node(num_cpus=2, num_gpus=2, memory=100 << 30)
    yield node
    nodes.remove_node(node)


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """Return the files that one process without Ray writes."""
    squares.main(str(tmp_path / "whole"), str(tmp_path))
    for mark in tmp_path.glob("*.begun"):
        mark.unlink()
    return files(tmp_path / "whole")


def files(out: Path) -> dict[str, bytes]:
    """Return all files of a run by name, without the times in its manifest and lock."""
    names = [path for path in out.rglob("*") if path.is_file() and path.name not in ("manifest.json", ".lock")]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


def run_cells(config: ClusterConfig, folder: Path, count: int = 6, work: Any = squares.work) -> list[CellOutcome]:
    """Compute squares with the runner that the options select, and check that each is started once."""
    runner = config.runner()
    assert runner is not None
    begun: list[int] = []
    todo = [(cell, folder / "out" / "cells" / str(cell.side)) for cell in squares.cells(folder, count)]
    outcomes = list(runner(work, todo, begun.append))
    assert sorted(outcome.position for outcome in outcomes) == sorted(begun) == list(range(count))
    return outcomes


def attempt_counts(marks: Path) -> list[int]:
    """Return how often each of the six squares was started."""
    return [len(squares.attempts(marks, side)) for side in range(1, 7)]


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition for at most ten minutes, as a busy machine may take minutes to start Ray."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_at_work(marks: Path, side: int | str = "*") -> set[int]:
    """Return the processes that started a square, or any of them."""
    return {int(path.name.split("-")[1]) for path in marks.glob(f"{side}-*.begun")}


def is_running(process: int) -> bool:
    """Return whether a process with this id exists."""
    return Path(f"/proc/{process}").exists()


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run a function in another thread."""
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("shared", [True, False])
def test_files_equal_those_of_one_process(nodes, whole, tmp_path, capfd, monkeypatch, shared) -> None:
    """Workers with and without access to the run folder give the same files.

    The manifest names the Python of the latter, which differs from the driver's.
    """
    environment = software.environment()
    if not shared:
        monkeypatch.setattr(driver, "read_lock", lambda _: "another")
        monkeypatch.setattr(driver.software, "environment", lambda: environment | {"python": "3.0.0"})
    out = tmp_path / "out"
    squares.main(str(out), str(tmp_path), "--address", nodes.address)
    assert files(out) == whole
    assert attempt_counts(tmp_path) == [1] * 6
    places = [place for side in range(1, 7) for place in squares.attempts(tmp_path, side)]
    assert {place.startswith(str(out)) for place in places} == {shared}
    assert not os.path.exists(places[0].split()[0]) or shared, "the temporary folder of a worker is removed"
    printed = capfd.readouterr()
    assert (f"uses python {environment['python']} (was 3.0.0)" in printed.err) == (printed.err != "") == (not shared)
    finished = [line for line in printed.out.splitlines() if line.startswith("[")][-6:]
    assert sorted(line.split(":")[0] for line in finished) == [f"[{i}/6] side {i}" for i in range(1, 7)]
    (session,) = json.loads((out / "manifest.json").read_text())["sessions"]
    cells = session["cells"]
    others = {} if shared else dict.fromkeys(cells, environment)
    assert (session["python"] == "3.0.0", session.get("other_software", {})) == (not shared, others)
    assert sorted(key for node in cells.values() for key in node) == sorted(map(key_of, squares.cells(tmp_path)))
    assert set(cells) <= {node.node_id[:12] for node in nodes.worker_nodes}
    assert "per node: " in printed.out
    assert all(f"{len(keys)} on {node}" in " ".join(printed.out.split()) for node, keys in cells.items())


def test_a_node_killed_in_the_middle_loses_nothing(nodes, whole, tmp_path) -> None:
    """Three cells wait, one on each node, when all processes of one node are killed."""
    node, release = nodes.add_node(num_cpus=1), squares.hold(tmp_path, 1, 2, 3)

    def kill() -> None:
        until(lambda: all(squares.attempts(tmp_path, side) for side in (1, 2, 3)))
        nodes.remove_node(node, allow_graceful=False)
        until(lambda: not all(map(is_running, processes_at_work(tmp_path))))
        release()

    with meanwhile(kill):
        squares.main(str(tmp_path / "out"), str(tmp_path), "--address", nodes.address)
    assert files(tmp_path / "out") == whole
    assert sorted(attempt_counts(tmp_path)) == [1, 1, 1, 1, 1, 2]


def test_a_restarted_driver_resumes_the_run(nodes, whole, tmp_path) -> None:
    """The driver is ended twice while one cell is unfinished; the worker of this cell ends too."""
    out, release = tmp_path / "out", squares.hold(tmp_path, 3)
    words = [str(out), str(tmp_path), "--address", nodes.address]

    def is_at_work(attempt: int) -> bool:
        return len(squares.attempts(tmp_path, 3)) == attempt and len(lines(out)) == 5

    def end(attempt: int, number: signal.Signals) -> tuple[int, list[str]]:
        """Start a driver and end it while its cell runs; return its status and its own messages."""
        command = [sys.executable, "-m", "support.squares", *words]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: process.poll() is not None or is_at_work(attempt))
        process.send_signal(number)
        errors = process.communicate(timeout=600)[1]
        until(lambda: not any(map(is_running, processes_at_work(tmp_path, 3))))
        return process.returncode, [line for line in errors.splitlines() if not OF_RAY.match(line)]

    assert end(1, signal.SIGKILL) == (-9, [])
    assert end(2, signal.SIGTERM) == (143, [sims.STOPPED])
    release()
    squares.main(*words)
    assert files(out) == whole
    assert attempt_counts(tmp_path) == [1, 1, 3, 1, 1, 1]


def lines(out: Path) -> list[str]:
    """Return the journal's lines, one for each finished cell."""
    file = out / "cells.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_failed_cell_is_named_and_the_others_are_computed(nodes, whole, tmp_path, capfd, monkeypatch) -> None:
    """One cell raises an error and is not repeated. The other kills its worker, and Ray repeats it, here once."""
    monkeypatch.setattr(driver, "RETRIES", 1)
    out, marks = tmp_path / "out", [tmp_path / "2.fail", tmp_path / "5.die"]
    for mark in marks:
        mark.touch()
    with pytest.raises(SystemExit) as stop:
        squares.main(str(out), str(tmp_path), "--address", nodes.address)
    assert stop.value.code == 1
    notes = [line for line in capfd.readouterr().err.splitlines() if not OF_RAY.match(line)]
    assert len(notes) == 3
    assert any(note.startswith("note: side 2 failed (ValueError: no square of side 2); its") for note in notes)
    assert any(note.startswith("note: side 5 failed (RuntimeError: WorkerCrashedError: ") for note in notes)
    assert notes[-1].startswith("error: 2 of 6 cells failed, the first side ")
    (error,) = [path for path in out.glob("cells/*/error.txt") if "no square" in path.read_text()]
    assert "in work" in error.read_text(), "the worker's traceback"
    assert attempt_counts(tmp_path) == [1, 1, 1, 1, 2, 1]
    assert len(lines(out)) == 4
    for mark in marks:
        mark.unlink()
    squares.main(str(out), str(tmp_path), "--address", nodes.address)
    assert files(out) == whole


def test_a_model_that_workers_lack_is_sent_once(nodes, tmp_path, monkeypatch) -> None:
    """The path is another folder in every process, and the work's arrays arrive unchanged."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, content in (("config.json", b"{}"), ("model.safetensors", os.urandom(1 << 20)), ("tokenizer.json", b"")):
        (folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    located = locate("/proc/self/cwd/tiny")
    sha256 = located.sha256
    arrays = (jnp.arange(3, dtype=jnp.bfloat16), jnp.asarray(2.0))

    def work(_: squares.Square, __: Path) -> Any:
        path = located.find_here().path
        half, weak = arrays
        return str(path), (path / "model.safetensors").read_bytes(), str(half.dtype), weak.weak_type, half.tolist()

    put_paths: list[Path] = []
    put_model = driver.put_model
    monkeypatch.setattr(driver, "put_model", lambda source: put_paths.append(source) or put_model(source))
    cached_folder = Path(os.environ["XDG_CACHE_HOME"]) / "rora-theory" / "models" / sha256 / "tiny"
    expected = (str(cached_folder), (folder / "model.safetensors").read_bytes(), "bfloat16", True, [0, 1, 2])
    # Once for a cache without it, and once for a cache whose copy is damaged; nothing half or damaged is left.
    for count in (1, 2):
        outcomes = run_cells(ClusterConfig(address=nodes.address), tmp_path, work=work)
        assert [outcome.result for outcome in outcomes] == [expected] * 6
        assert put_paths == [located.path] * count
        assert [path.name for path in cached_folder.parents[1].iterdir()] == [sha256]
        (cached_folder / "model.safetensors").write_bytes(b"damaged")


def unmeasured(out: Path) -> dict[str, bytes]:
    """Return all files of a run except its manifest and lock, without measured times."""
    contents = {name: MEASURED.sub(b"", data) for name, data in files(out).items()}
    rows = frames.read_csv(out / "results.csv")
    without_times = rows.drop(columns=[column for column in rows if "seconds" in column])
    return contents | {"results.csv": frames.to_csv(without_times).encode()}


def assert_equal_runs(single_process: Path, with_workers: Path) -> None:
    """Compare all files; numbers may differ by the rounding of sums in another order, as on another number of cores.

    A hexadecimal number may be the rounding error of a sum itself, which has no relative accuracy.
    """
    expected, actual = unmeasured(single_process), unmeasured(with_workers)
    assert expected.keys() == actual.keys()
    for name, data in expected.items():
        assert NUMBER.sub(b"#", data) == NUMBER.sub(b"#", actual[name]), name
        pairs = zip(NUMBER.findall(data), NUMBER.findall(actual[name]), strict=True)
        different = [(left.decode(), right.decode()) for left, right in pairs if left != right]
        for left, right in different:
            if "x" in left:
                assert float.fromhex(left) == pytest.approx(float.fromhex(right), rel=1e-5, abs=1e-6), name
            else:
                assert float(left) == pytest.approx(float(right), rel=1e-5, abs=0), name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    """Return options that name two files of records and a tiny model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    data, model = checkpoint.two_files(folder), checkpoint.model(folder / "model")
    return ["--data", *(str(data / name / "train.json") for name in ("one", "two")), "--model", str(model)]


def both(main: Callable[[list[str]], None], options: list[str], tmp_path: Path, *worker_options: str) -> list[Path]:
    """Return the run folders of one process and of workers."""
    single_process, with_workers = (tmp_path / "run" / name for name in ("one", "two"))
    main([*options, "--out", str(single_process)])
    main([*options, "--out", str(with_workers), *worker_options])
    return [single_process, with_workers]


def cells_done(out: Path) -> dict[str, dict[str, float]]:
    """Return the seconds of each cell that the last session ran, by node."""
    return json.loads((out / "manifest.json").read_text())["sessions"][-1]["cells"]


@pytest.mark.parametrize(
    ("main", "words", "file_count"), [(variance_sweep.main, VARIANCE, 7), (horizon.main, HORIZON, 12)]
)
def test_an_experiment_writes_the_files_of_one_process(
    nodes, checkpoints, tmp_path, capfd, main, words, file_count
) -> None:
    options = checkpoints if main is horizon.main else []
    single_process, with_workers = both(main, [*options, *words.split()], tmp_path, "--address", nodes.address)
    assert len(unmeasured(single_process)) == file_count
    assert_equal_runs(single_process, with_workers)
    assert capfd.readouterr().err == ""
    assert min(value for node in cells_done(with_workers).values() for value in node.values()) > 0


@pytest.mark.usefixtures("large")
def test_a_cell_with_two_gpus_gets_both_of_a_node(nodes, tmp_path) -> None:
    """A cell takes one GPU by default."""
    for gpus, count, seen in ((2.0, 1, {"0,1"}), (None, 2, {"0", "1"})):
        marks = tmp_path / str(gpus)
        marks.mkdir()
        run_cells(ClusterConfig(address=nodes.address, cell_gpus=gpus), marks, count)
        assert {place.split()[1] for side in (1, 2) for place in squares.attempts(marks, side)} <= seen


def test_errors_of_workers_can_be_serialised() -> None:
    """An error that cannot be pickled, and one of the node's own disk, arrive as text."""

    class OddError(Exception):
        def __init__(self, first: int, second: int) -> None:
            super().__init__(f"{first} and {second}")

    for error, message in (
        (OddError(1, 2), "OddError: 1 and 2"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28]"),
    ):
        failed = worker._failed(error)
        assert type(failed.error) is RuntimeError
        assert message in str(failed.error)
    assert type(worker._failed(KeyError("x")).error) is KeyError
    np.testing.assert_array_equal(driver._to_device(driver._to_host(jnp.arange(3))), [0, 1, 2])


@pytest.mark.usefixtures("nodes")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function Popen.__del__")  # processes of Ray 2.49's
def test_two_local_workers_write_the_files_of_one_process(checkpoints, tmp_path, capfd) -> None:
    """Ray is started for the workers beside the existing cluster, from which this process disconnects."""
    leave()
    log = orphans.make_session_root() / f"session_of_a_test_{2**30}" / "logs" / "raylet.err"  # no process has this id
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        orphan = subprocess.Popen(["sleep", "3600"], stderr=stderr)
    options = [*checkpoints, *RANKS.split()]
    single_process, with_workers = both(sweep.main, options, tmp_path, "--workers", "2")
    assert len(unmeasured(single_process)) == 11
    assert_equal_runs(single_process, with_workers)
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "per node: 2 on " in printed.out
    (node,) = cells_done(with_workers).values()
    assert len(node) == 2
    assert min(node.values()) > 0
    assert orphan.wait(timeout=60) == -signal.SIGKILL, "processes of an earlier driver are stopped"
    shutil.rmtree(log.parents[1])
    gc.collect()


def processes_of(driver: int) -> set[int]:
    """Return the processes that Ray started for a driver."""
    process_ids = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if orphans.driver_of(path) == driver:
                process_ids.add(int(path.name))
    return process_ids


def listening(processes: Iterable[int]) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses at which these processes accept TCP connections."""
    links = (os.readlink(path) for process in processes for path in Path(f"/proc/{process}/fd").iterdir())
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in links}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in sockets:
                words = bytes.fromhex(local.partition(":")[0])  # each word of four bytes in the order of this machine
                number = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ipaddress.ip_address(number)
                addresses.add(getattr(address, "ipv4_mapped", None) or address)
    return addresses


def test_local_workers_listen_on_loopback_and_end_with_their_driver(tmp_path) -> None:
    squares.hold(tmp_path, 1, 2)
    environment = {name: value for name, value in os.environ.items() if name not in LOOPBACK}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    words = [str(tmp_path / "out"), str(tmp_path), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "support.squares", *words], env=environment)
    try:
        until(lambda: process.poll() is not None or all(squares.attempts(tmp_path, side) for side in (1, 2)))
        assert process.poll() is None, "the driver ended before its cells began"
        started = processes_of(process.pid)
        assert processes_at_work(tmp_path) <= started
        addresses = listening({process.pid, *started})
        assert addresses
        assert all(address.is_loopback for address in addresses)
    finally:
        process.kill()
        process.wait()
        orphans.stop()
    until(lambda: not processes_of(process.pid))
