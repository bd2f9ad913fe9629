"""Logging besides a run's own files: event files are read back, and the calls of Weights & Biases are recorded."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from support.event_files import logged

from rora_theory import InputError
from rora_theory.lab.finetune import trackers
from rora_theory.lab.finetune.loop import Paused, StepCompleted, ValidationCompleted

EVENTS = [StepCompleted(1, 0.5, 2.5, 0.75, 1e-3, 128, 256, 0.5), ValidationCompleted(1, 2.25, best=True), Paused(1)]
LOGGED = {
    "train/loss": 2.5, "train/grad_norm": 0.75, "train/learning_rate": 1e-3, "train/tokens_per_second": 256.0,
    "validation/loss": 2.25,
}  # fmt: skip


def test_event_files_are_read_back(tmp_path) -> None:
    """A run that resumes after step 1 also removes what its killed part logged after that step."""
    pytest.importorskip("tensorboardX", reason="the extra logging")
    with trackers.track("tensorboard", tmp_path, run="id", config={}) as log:
        for event in (*EVENTS, ValidationCompleted(2, 9.0, best=False), ValidationCompleted(3, 9.0, best=False)):
            log(event)
    first = logged(tmp_path / "tensorboard")
    assert {name: first[name, 1] for name, _ in first} == pytest.approx(LOGGED, rel=1e-6)
    assert ("validation/loss", 3) in first
    with trackers.track("tensorboard", tmp_path, run="id", config={}, step=1) as log:
        log(ValidationCompleted(2, 1.5, best=True))
    again = {key: value for key, value in logged(tmp_path / "tensorboard").items() if key[0] == "validation/loss"}
    assert again == {("validation/loss", 1): 2.25, ("validation/loss", 2): 1.5}


def test_weights_and_biases_receives_the_same_values(tmp_path, monkeypatch) -> None:
    calls: list[tuple] = []

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(log=lambda *a, **k: calls.append(("log", *a, k)), finish=lambda: calls.append(("end",)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=importlib.util.find_spec("json")))

    def fail() -> None:
        with trackers.track("wandb", tmp_path, run="id", config={"rank": 4}) as log:
            for event in EVENTS:
                log(event)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (_, options), *logs, end = calls
    assert (options["id"], options["resume"], options["config"]) == ("id", "allow", {"rank": 4})
    assert options["dir"] == str(tmp_path)
    assert {name: value for _, values, _ in logs for name, value in values.items()} == LOGGED
    assert [more for *_, more in logs] == [{"step": 1}] * 2
    assert end == ("end",), "also if the run fails"


def test_weights_and_biases_that_cannot_start_is_bad_input(tmp_path, monkeypatch) -> None:
    """Without an API key or the server, it raises errors of its own."""

    class Error(Exception):
        pass

    def init(**_):
        raise Error("No API key configured.\nMore.")

    fake = SimpleNamespace(init=init, Error=Error, __spec__=importlib.util.find_spec("json"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with (
        pytest.raises(InputError, match=r"log_to 'wandb' .*No API key configured"),
        trackers.track("wandb", tmp_path, run="id", config={}),
    ):
        pass


def test_off_writes_nothing(tmp_path) -> None:
    with trackers.track(None, tmp_path, run="id", config={}) as log:
        log(EVENTS[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(name, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"log_to '{name}' .* not installed\. Run: pip install"):
        trackers.check_tracker(name)
    trackers.check_tracker(None)
