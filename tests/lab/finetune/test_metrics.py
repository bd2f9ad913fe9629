"""The file of a run's events: which events precede a checkpoint, and which are left out."""

import os
from pathlib import Path

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.finetune import Metrics, Paused, StepCompleted, Trainer, ValidationCompleted
from rora_theory.runs.journal import Journal


class At(Trainer):
    """Trainer at a given step, which validates every second and saves every third step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def validates(self, step: int) -> bool:
        return step % 2 == 0

    def saves(self, step: int) -> bool:
        return step % 3 == 0 or self.validates(step)


def metrics_of(path: Path, steps: int) -> Metrics:
    metrics = Metrics(path, At(0))
    for step in range(1, steps + 1):
        metrics.add(StepCompleted(step, 0.1, 2.0 / step, 1.0, 0.1, 5, 8, 0.1))
        if step % 2 == 0:
            metrics.add(ValidationCompleted(step, 1.0 / step, best=True))
        metrics.add(Paused(step))  # is no event of the run's
    return metrics


def test_the_metrics_before_a_checkpoint_must_exist(tmp_path):
    path = tmp_path / "metrics.jsonl"
    events = metrics_of(path, 8).events
    again = Metrics(path, At(6))
    assert again.events == [event for event in events if event["step"] <= 6]
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 9
    for damaged, message in {
        "".join(lines[:-1]): "has 8 of 9 lines before the checkpoint at step 6",  # the last validation
        "".join(lines[:4]): "has 4 of 9 lines",
        text[:-30]: "has 8 of 9 lines",
        "": "has 0 of 9 lines",
        text.replace('"loss": 2.0', '"loss": 2.0.'): "line 1 is damaged",
    }.items():
        path.write_text(damaged)
        with pytest.raises(InputError, match=f"metrics.jsonl: {message}"):
            Metrics(path, At(6))
    path.unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl: has 0 of 9 lines"):
        Metrics(path, At(6))
    assert Metrics(path, At(0)).events == [], "a run that starts from step 0 needs no earlier metrics"


@pytest.mark.parametrize(
    "entry", [{}, {"event": "step"}, {"event": "step", "step": "1"}, {"event": "step", "step": [1]}]
)
def test_events_of_the_wrong_type_are_refused(tmp_path, entry):
    Journal(tmp_path / "metrics.jsonl").append(entry)
    with pytest.raises(InputError, match=r"metrics\.jsonl: is damaged"):
        Metrics(tmp_path / "metrics.jsonl", At(1))


def test_events_are_on_the_disk_before_a_checkpoint_that_follows_them(tmp_path, monkeypatch):
    """Steps 2, 3, 4 and 6 have the validation losses of 2, 4 and 6; later checkpoints write the other events."""
    path, real, synced = tmp_path / "metrics.jsonl", os.fsync, []

    def fsync(descriptor):
        synced.append(path.read_text().count("\n"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    metrics_of(path, 6)
    assert synced == [2, 3, 4, 5, 6, 8, 9]
