"""What happened in a run, kept as it comes: a sealed line a step and a validation loss."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.finetune.loop import Event, Paused, Stepped, Trainer
from rora_theory.io import frames
from rora_theory.io.files import naming_damage
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal

FILE = "metrics.jsonl"
"""Its name in a run's folder."""
COLUMNS = ("event", "step", "epoch", "loss", "grad_norm", "learning_rate", "targets", "positions", "seconds", "best")
"""Of a table of the events."""


class Metrics:
    """A file of events, appended as they come; none beyond the step where the run goes on.

    Args:
      path: of the file.
      trainer: whose events.
      identity: of the run.

    Raises:
      InputError: the file is not as the run wrote it, or lacks what came before the checkpoint.
    """

    def __init__(self, path: Path, trainer: Trainer, identity: str) -> None:
        if not trainer.step:
            path.unlink(missing_ok=True)
        self._trainer, self._journal = trainer, Journal(path, identity)
        with naming_damage(path):
            kept = [event for event in self._journal.entries if event["step"] <= trainer.step]
            names = [(event["event"], event["step"]) for event in kept]
        expected = [
            (name, step)
            for step in range(1, trainer.step + 1)
            for name in ("step", *(["validation"] if trainer.validates(step) else []))
        ]
        if names != expected:
            raise InputError(
                f"{path}: has {len(kept)} lines of the {len(expected)} before the checkpoint at step {trainer.step}; "
                "accepted is the file as the run wrote it; with checkpoints/ beside it removed, the run begins anew"
            )
        if len(kept) < len(self._journal.entries):
            self._journal.rewrite(kept)

    def add(self, event: Event) -> None:
        """Write one event, but a pause; it is on the disk before a checkpoint that follows it."""
        if isinstance(event, Paused):
            return
        name = "step" if isinstance(event, Stepped) else "validation"
        self._journal.append({"event": name, **asdict(event)}, sync=self._trainer.saves(event.step))

    def write(self, folder: RunFolder) -> None:
        """Write the table of all events to the run's folder, which takes the file's digest."""
        folder.write_frame(frames.of(self.events, COLUMNS))
        folder.record(FILE)

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, of this and earlier parts of the run."""
        return self._journal.entries
