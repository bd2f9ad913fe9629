"""What a benchmark says of its machine: the processor by name, and whether others were at work meanwhile."""

import importlib
from datetime import date
from pathlib import Path

import pytest

from rora_theory.runs import software


@pytest.fixture
def hardware(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("hardware")


def test_what_others_took_is_what_was_busy_less_our_own(hardware, monkeypatch) -> None:
    """Of 10 seconds on 2 processors: 7 busy, of which 5 are ours."""
    busy, own, clock = iter((100.0, 107.0, 107.0)), iter((3.0, 8.0, 8.0)), iter((50.0, 60.0, 60.0))
    monkeypatch.setattr(hardware, "_busy", lambda: next(busy))
    monkeypatch.setattr(hardware, "_own", lambda: next(own))
    monkeypatch.setattr(hardware.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    others = hardware.Others()
    assert others.share() == pytest.approx(0.1)
    assert others.in_words() == "other processes took 10% of the processors' time meanwhile: disturbed, run it again"


def test_a_quiet_machine_and_one_that_does_not_tell(hardware, monkeypatch) -> None:
    monkeypatch.setattr(hardware.Others, "share", lambda _: 0.02)
    assert hardware.Others().in_words() == "other processes took 2% of the processors' time meanwhile"
    monkeypatch.setattr(hardware.Others, "share", lambda _: None)
    assert hardware.Others().in_words() == "what other processes took meanwhile is not known"


def test_the_machine_has_no_package_that_is_not_there(hardware) -> None:
    found = hardware.machine(3, packages=("numpy", "no-such-package"))
    assert (found["cores"], list(found["packages"])) == (3, ["numpy"])
    assert set(found["instruction_sets"]) <= set(hardware.SETS)
    assert hardware.in_words(found).startswith(found["processor"])
    assert date.fromisoformat(found["date"]) > date(2026, 1, 1)
    assert found["git_revision"] == software.environment()["git_revision"]
