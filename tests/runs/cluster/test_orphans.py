"""Processes that outlive a killed driver are stopped, and no others."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rora_theory.errors import InputError
from rora_theory.runs.cluster import orphans

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells where a process logs to")

Start = Callable[[Path], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Start]:
    """Start a process that waits and logs to a file."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    running = []

    def run(log: Path) -> "subprocess.Popen[bytes]":
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stderr:
            running.append(subprocess.Popen(["sleep", "3600"], stderr=stderr))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def test_only_processes_of_a_driver_that_has_ended_are_stopped(start, tmp_path) -> None:
    root = orphans.make_session_root()
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie still has its id

    def log(folder: Path, driver: int) -> Path:
        return folder / f"session_2026-01-01_00-00-00_000000_{driver}" / "logs" / "raylet.err"

    left = start(log(root, ended.pid))
    others = [start(log(root, os.getpid())), start(log(tmp_path / "ray", ended.pid)), start(tmp_path / "log")]
    reader = subprocess.Popen(["tail", "-f", log(root, ended.pid)])
    try:
        assert orphans.stop() == [left.pid]
        assert left.wait(timeout=60) == -9
        assert [process.poll() for process in (*others, reader)] == [None] * 4
        assert orphans.stop() == []
    finally:
        reader.kill()
        reader.wait()
        ended.wait()


def test_the_folder_of_sessions_is_the_user_s_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    root = orphans.session_root()
    root.mkdir(mode=0o777)
    assert orphans.make_session_root() == root
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    root.rmdir()
    root.symlink_to(tmp_path)
    with pytest.raises(InputError, match="belongs to another user"):
        orphans.make_session_root()
