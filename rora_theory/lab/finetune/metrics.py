"""Metrics of a run, appended to a file: one line per step and per validation."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab.finetune.loop import Event, Paused, StepCompleted, Trainer
from rora_theory.runs import frames
from rora_theory.runs.files import naming_damage
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal

FILE = "metrics.jsonl"
"""Name of the metrics file in a run's folder."""
COLUMNS = ("event", "step", "epoch", "loss", "grad_norm", "learning_rate", "targets", "positions", "seconds", "best")
"""Columns of the table of events."""


class Metrics:
    """File of a run's events, appended one by one.

    Events after the step at which the run resumes are removed when the file is opened.

    Raises:
      InputError: If the file is damaged, or lacks events before the checkpoint.
    """

    def __init__(self, path: Path, trainer: Trainer) -> None:
        # A run from the first step on does not continue an older journal.
        if not trainer.step:
            path.unlink(missing_ok=True)
        self._trainer, self._journal = trainer, Journal(path)
        with naming_damage(path):
            past_events = [event for event in self._journal.entries if event["step"] <= trainer.step]
            names = [(event["event"], event["step"]) for event in past_events]
        # The file must have every event up to the checkpoint, in order.
        expected = [
            (name, step)
            for step in range(1, trainer.step + 1)
            for name in ("step", *(["validation"] if trainer.validates(step) else []))
        ]
        if names != expected:
            raise InputError(
                f"{path}: has {len(past_events)} of {len(expected)} lines before the checkpoint at step "
                f"{trainer.step}. Restore the file, or remove the folder checkpoints/ next to it to start over."
            )
        # Drop the events after the checkpoint: the resumed run computes these steps again.
        if len(past_events) < len(self._journal.entries):
            self._journal.rewrite(past_events)

    def add(self, event: Event) -> None:
        """Append an event unless it is a pause.

        If a checkpoint follows the event, the event is on disk before it.
        """
        if isinstance(event, Paused):
            return
        name = "step" if isinstance(event, StepCompleted) else "validation"
        self._journal.append({"event": name, **asdict(event)}, sync=self._trainer.saves(event.step))

    def write(self, folder: RunFolder) -> None:
        """Write the table of all events to the run's folder."""
        folder.write_frame(frames.from_rows(self.events, COLUMNS))

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events of the run, those before an interruption included."""
        return self._journal.entries
