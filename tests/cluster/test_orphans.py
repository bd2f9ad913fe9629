"""Processes that outlive a killed driver are stopped; all others are left alone."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from rora_theory.cluster import orphans

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says who started a process")

Start = Callable[[dict[str, str]], "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that waits, with further variables."""
    running = []

    def run(mark: dict[str, str]) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(["sleep", "60"], env=os.environ | mark)
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


def test_only_processes_of_a_dead_driver_are_stopped(start) -> None:
    code = "from rora_theory.cluster import orphans; print(orphans.marked()[orphans.MARK])"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    reused = dead.split()
    reused[0] = str(os.getpid())  # the driver's id, given to another process since
    left = [start({orphans.MARK: dead}), start({orphans.MARK: " ".join(reused)})]
    elsewhere = [*dead.split()[:2], "pid:[1]"]
    others = [start({}), start(orphans.marked()), start({orphans.MARK: " ".join(elsewhere)})]
    assert sorted(orphans.stop()) == sorted(process.pid for process in left)
    assert [process.wait(timeout=30) for process in left] == [-9, -9]
    assert [process.poll() for process in others] == [None] * 3
    assert orphans.stop() == []
