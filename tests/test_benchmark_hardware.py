"""A benchmark's record of its machine: the processor by name, and whether other processes were at work meanwhile."""

from datetime import date

import pytest

from benchmarks import hardware
from rora_theory.runs import software


def test_the_share_of_others_is_the_busy_time_less_our_own(monkeypatch) -> None:
    """In 10 seconds on 2 processors: 7 busy, of which 5 are ours."""
    busy, ours, clock = iter((100.0, 107.0, 107.0)), iter((3.0, 8.0, 8.0)), iter((50.0, 60.0, 60.0))
    monkeypatch.setattr(hardware, "_busy", lambda: next(busy))
    monkeypatch.setattr(hardware, "_own", lambda: next(ours))
    monkeypatch.setattr(hardware.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    processes = hardware.Others()
    assert processes.share() == pytest.approx(0.1)
    text = "other processes took 10% of the processors' time meanwhile: disturbed, run it again"
    assert processes.in_words() == text


def test_a_quiet_machine_and_one_without_counters(monkeypatch) -> None:
    monkeypatch.setattr(hardware.Others, "share", lambda _: 0.02)
    assert hardware.Others().in_words() == "other processes took 2% of the processors' time meanwhile"
    monkeypatch.setattr(hardware.Others, "share", lambda _: None)
    assert hardware.Others().in_words() == "what other processes took meanwhile is not known"


def test_the_machine_has_no_package_that_is_not_installed() -> None:
    machine = hardware.machine(3, packages=("numpy", "no-such-package"))
    assert (machine["cores"], list(machine["packages"])) == (3, ["numpy"])
    assert set(machine["instruction_sets"]) <= set(hardware.SETS)
    assert hardware.in_words(machine).startswith(machine["processor"])
    assert date.fromisoformat(machine["date"]) > date(2026, 1, 1)
    assert machine["git_revision"] == software.environment()["git_revision"]
