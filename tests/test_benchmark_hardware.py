"""A benchmark records its machine: the processor by name, and whether other processes ran during it."""

import sys
from datetime import date
from types import SimpleNamespace

import pytest

from benchmarks import hardware
from rora_theory.runs import software


def test_the_share_of_other_processes_is_the_busy_time_minus_that_of_this_one(monkeypatch) -> None:
    """In 10 seconds on 2 processors 7 are busy, of which 5 are this process's."""
    busy, ours, clock = iter((100.0, 107.0, 107.0)), iter((3.0, 8.0, 8.0)), iter((50.0, 60.0, 60.0))
    monkeypatch.setattr(hardware, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(hardware, "_own_seconds", lambda: next(ours))
    monkeypatch.setattr(hardware.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    processes = hardware.OtherLoad()
    assert processes.share() == pytest.approx(0.1)
    text = "other processes took 10% of the processors' time meanwhile: disturbed, run it again"
    assert processes.describe() == text


def test_a_quiet_machine_and_one_without_counters(monkeypatch) -> None:
    monkeypatch.setattr(hardware.OtherLoad, "share", lambda _: 0.02)
    assert hardware.OtherLoad().describe() == "other processes took 2% of the processors' time meanwhile"
    monkeypatch.setattr(hardware.OtherLoad, "share", lambda _: None)
    assert hardware.OtherLoad().describe() == "what other processes took meanwhile is not known"


def test_transformers_is_silent_here_and_in_the_processes_that_a_benchmark_starts(monkeypatch) -> None:
    calls = []
    logging = SimpleNamespace(
        set_verbosity_error=lambda: calls.append("warnings"), disable_progress_bar=lambda: calls.append("bars")
    )
    environment: dict[str, str] = {}
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(utils=SimpleNamespace(logging=logging)))
    monkeypatch.setattr(hardware.os, "environ", environment)
    hardware.silence_transformers()
    assert calls == ["warnings", "bars"]
    assert environment == {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def test_the_machine_has_no_package_that_is_not_installed() -> None:
    machine = hardware.describe_machine(3, packages=("numpy", "no-such-package"))
    assert (machine["cores"], list(machine["packages"])) == (3, ["numpy"])
    assert set(machine["instruction_sets"]) <= set(hardware.INSTRUCTION_SETS)
    assert hardware.format_machine(machine).startswith(machine["processor"])
    assert date.fromisoformat(machine["date"]) > date(2026, 1, 1)
    assert machine["git_revision"] == software.environment()["git_revision"]
