"""Cells on workers: options refused before work, the worker's functions called here, and one real Ray session."""

import importlib.util
import ipaddress
import itertools
import json
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import squares

from rora_theory.errors import InputError
from rora_theory.runs import cluster
from rora_theory.runs.cells import in_process
from rora_theory.runs.cluster import ClusterConfig, RayRunner, leave
from sims.common import cli

with_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster (Ray) is not installed")


def test_a_single_process_does_not_need_ray(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert ClusterConfig().runner() is in_process
    for options in ({"workers": 2}, {"address": "127.0.0.1:1"}):
        with pytest.raises(InputError, match=r"ray .* pip install 'rora-theory\[cluster\]'"):
            ClusterConfig(**options).runner()
    leave()  # nothing to leave


def test_the_resources_of_a_cell_decide_how_many_run_on_a_cluster() -> None:
    for workers, address in ((0, None), (2, "auto")):
        with pytest.raises(InputError, match=f"workers .*{workers}"):
            ClusterConfig(workers=workers, address=address)


@with_ray
def test_no_cluster_at_the_address(tmp_path, capsys) -> None:
    """The command prints one line before the run folder is made."""
    with pytest.raises(SystemExit) as stop:
        squares.main(str(tmp_path / "out"), str(tmp_path), "--address", "127.0.0.1:1")
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: address 127.0.0.1:1: ")
    assert "Connection refused" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- Ray's part, played in this process


class TaskError(Exception):
    """What Ray raises for a cell that raised an exception."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Played:
    """Ray in one process: a task runs when it is submitted, in the one worker that there is."""

    exceptions = SimpleNamespace(RayTaskError=TaskError, RayError=ConnectionError)

    def __init__(self) -> None:
        self.address = "127.0.0.1"
        self.util = SimpleNamespace(get_node_ip_address=lambda: self.address)
        self.resources = {"CPU": 8.0}
        self.started: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        self.is_running = False
        self.options: list[dict[str, Any]] = []
        self.loaded: list[int] = []
        """Factors of the work functions that were loaded."""

    def init(self, *words: str, **options: Any) -> None:
        self.started.append((words, options))
        self.is_running = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def is_initialized(self) -> bool:
        return self.is_running

    def shutdown(self) -> None:
        self.is_running = False

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def put(self, value: Any) -> Callable[[], object]:
        def load() -> Any:
            self.loaded.extend(getattr(value, "keywords", {}).values())
            return value

        return load

    def get(self, reference: Callable[[], object]) -> object:
        return reference()

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        references = list(references)
        return [references.pop(len(references) // 2)], references  # neither the first nor the last task ends first

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_node_id=lambda: "0123456789abcdef")

    def remote(self, **options: Any) -> Callable[[Callable[..., object]], SimpleNamespace]:
        self.options.append(options)
        return lambda task: SimpleNamespace(remote=partial(self._compute, task))

    def _compute(self, task: Callable[..., object], *arguments: Any) -> Callable[[], object]:
        try:
            result = task(*arguments)
        except ConnectionError as error:
            return partial(_throw, error)
        except Exception as error:
            return partial(_throw, TaskError(error))
        return lambda: result


def _throw(error: Exception) -> None:
    raise error


@pytest.fixture
def played(monkeypatch) -> Iterator[Played]:
    monkeypatch.setitem(sys.modules, "ray", ray := Played())
    cluster._loaded_work.clear()
    before = signal.getsignal(signal.SIGTERM)
    yield ray
    leave()
    assert signal.getsignal(signal.SIGTERM) is before


def test_cells_of_two_runs_are_computed_by_the_work_of_their_own(played, tmp_path, monkeypatch) -> None:
    """One worker computes both runs; the outcomes have their cells' positions, and an exception is a result."""

    def work(cell: int, folder: Path, *, factor: int) -> int:
        if cell == 3:
            raise ValueError("three")
        if cell == 4:
            raise ConnectionError("the node is gone")
        folder.mkdir(parents=True)
        (folder / "cell.txt").write_text(str(cell))
        return factor * cell

    clock = itertools.count(step=3.5)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    runner = RayRunner({"num_cpus": 2.0})
    (tmp_path / "run").mkdir()
    for factor in (10, 100):
        folders = [tmp_path / "run" / "cells" / f"{factor}-{cell}" for cell in (1, 2, 3, 4)]
        begun: list[int] = []
        todo = list(zip((1, 2, 3, 4), folders, strict=True))
        outcomes = {outcome.position: outcome for outcome in runner(partial(work, factor=factor), todo, begun.append)}
        assert begun == [0, 1, 2, 3]
        assert [outcomes[position].result for position in (0, 1)] == [factor, 2 * factor]
        assert [folder.joinpath("cell.txt").read_text() for folder in folders[:2]] == ["1", "2"]
        assert repr(outcomes[2].result) == "ValueError('three')"
        assert isinstance(outcomes[2].result.__cause__, TaskError)
        assert repr(outcomes[3].result) == "ConnectionError('the node is gone')"
        assert (outcomes[0].node, outcomes[0].seconds) == ("0123456789ab", 3.5)
    assert played.loaded == [10, 100], "the work of a run is loaded once"
    assert played.options == [{"max_retries": cluster.RETRIES, "num_cpus": 2.0}] * 2
    assert list(runner(work, [], begun.append)) == []


@pytest.mark.usefixtures("played")
def test_a_node_without_the_run_folder_ends_the_run(tmp_path) -> None:
    """Its files would not be those of the run."""
    cell_folder = tmp_path / "away" / "cells" / "1"
    with pytest.raises(InputError, match=r"away: .*does not see this run folder"):
        list(RayRunner({})(lambda cell, folder: folder.mkdir(parents=True), [(1, cell_folder)], lambda _: None))
    assert not cell_folder.exists()


def test_the_end_of_a_command_stops_the_workers(played, tmp_path) -> None:
    (tmp_path / "run").mkdir()

    def work() -> None:
        runner = ClusterConfig(workers=2).runner()
        todo = [(cell, tmp_path / "run" / "cells" / str(cell)) for cell in (1, 2)]
        for _ in runner(lambda cell, folder: cell, todo, lambda _: None):
            assert played.is_running
            raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        cli.run_command(work)
    assert not played.is_running


RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", "RAY_task_oom_retries": "3",
}  # fmt: skip
"""Environment of every session: no statistics, hidden GPUs for cells without one, and a number of attempts."""


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """Replace the environment by one without variables of Ray."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    monkeypatch.setattr(os, "environ", environment)
    return environment


def test_a_session_on_this_machine_has_the_cores_of_its_workers(played, environment) -> None:
    """Its folder is private, it has no dashboard, listens on the loopback address, and ends with `leave`."""
    before = dict(environment)
    runner = ClusterConfig(workers=3, cell_cpus=1.5).runner()
    assert runner.needs == {"num_cpus": 1.5, "num_gpus": 0.0, "memory": 0}
    ((words, options),) = played.started
    folder = Path(options["_temp_dir"]).parent
    assert words == ("local",)
    assert (options["num_cpus"], options["include_dashboard"], options["log_to_driver"]) == (5, False, False)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    local = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": str(os.cpu_count())}
    assert len(environment.pop("RAY_AUTH_TOKEN")) == 64, "the token is not written into the home folder"
    assert environment == before | RAY_VARIABLES | local, "as many threads as here, so that results have the same bits"
    ClusterConfig(workers=3, cell_cpus=1.5).runner()
    assert len(played.started) == 1, "a second experiment of the process uses the session"
    leave()
    assert not played.is_running
    assert not folder.exists()


def test_a_session_that_listens_on_the_network_is_ended(played) -> None:
    played.address = "10.0.0.7"
    with pytest.raises(InputError, match=r"workers 2: .*network"):
        ClusterConfig(workers=2).runner()
    assert not played.is_running


@pytest.mark.parametrize(
    ("options", "lacking"), [({"cell_gpus": 2.0}, "GPU 2"), ({"cell_memory": 2.0}, "memory 2.0 GiB")]
)
def test_a_cell_that_needs_more_than_this_machine_has_is_refused(played, options, lacking) -> None:
    """A cluster may get another node."""
    played.resources = {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**30}
    assert ClusterConfig(workers=2).runner().needs == {"num_cpus": 1.0, "num_gpus": 1.0, "memory": 0}
    with pytest.raises(InputError, match=rf"{lacking}.*cell_"):
        ClusterConfig(workers=2, **options).runner()
    assert ClusterConfig(address="auto", **options).runner()


def test_a_cluster_is_joined_at_its_address(played, environment) -> None:
    """The address is tried before Ray is asked, which would try for many minutes."""
    before = dict(environment)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    for name in (address, "auto"):
        runner = ClusterConfig(address=name, cell_cpus=9.0, cell_memory=2.0).runner()
        assert runner.needs == {"num_cpus": 9.0, "num_gpus": 0.0, "memory": 2 * 2**30}
        assert played.started[-1][0] == (name,)
        leave()
    assert environment == before | RAY_VARIABLES, "the nodes have their own threads and addresses"
    listening.close()
    for unused in (address, "head:99999"):
        with pytest.raises(InputError, match=f"address {unused}: "):
            ClusterConfig(address=unused).runner()
    assert len(played.started) == 2
    for wrong in ("head", "ray://head:10001", ":6379", "head:port"):
        with pytest.raises(InputError, match=f"address .*{wrong}"):
            ClusterConfig(address=wrong)


def test_an_exception_between_two_cells_stops_the_workers(played, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    todo = [(cell, tmp_path / "run" / "cells" / str(cell)) for cell in (1, 2)]
    outcomes = ClusterConfig(workers=2).runner()(lambda cell, folder: cell, todo, lambda _: None)
    next(outcomes)
    with pytest.raises(KeyboardInterrupt):
        outcomes.throw(KeyboardInterrupt)
    assert not played.is_running


def test_a_session_starts_in_any_thread(played) -> None:
    """Signal handlers belong to the main thread alone."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ClusterConfig(workers=2).runner).result().needs["num_gpus"] == 0.0
    assert played.is_running


def test_the_workers_have_stopped_when_the_run_folder_is_closed(played, monkeypatch) -> None:
    """They write into it."""
    running: list[bool] = []
    monkeypatch.setattr(cli.folder, "end_all", lambda *_, **__: running.append(played.is_running))

    def work(error: BaseException) -> None:
        ClusterConfig(workers=2).runner()
        raise error

    for error in (KeyboardInterrupt(), InputError("wrong")):
        with pytest.raises(SystemExit):
            cli.run_command(partial(work, error))
    assert running == [False, False, False], "an interruption closes the folder, and so does every end"


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
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            (node,) = sys.modules["ray"].nodes()
            (session,) = [folder for folder in Path(node["RayletSocketName"]).parents if "rora-ray-" in folder.name]
            is_loopback = ipaddress.ip_address(node["NodeManagerAddress"]).is_loopback
            seen.append((stat.S_IMODE(session.stat().st_mode), is_loopback))
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


def _contents(out: Path) -> dict[str, object]:
    """Return the results of a run and the files of its cells, whose keys depend on the folder of the marks."""
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    values = {line["cell"]["side"]: line["value"] for line in lines}
    losses = {line["cell"]["side"]: (out / "cells" / line["key"] / "losses.csv").read_text() for line in lines}
    return {"values": values, "losses": losses, "table": (out / "results.csv").read_text()}
