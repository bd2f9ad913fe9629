"""A run's losses, rates and speed as they come, in TensorBoard's event files or in Weights & Biases.

The run's own files have them all, to the bit; a tracker is for watching, and is off unless it is asked for.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from rora_theory.errors import InputError
from rora_theory.finetune.loop import Event, Stepped, Validated

TrackerName = Literal["tensorboard", "wandb"]

FOLDER = "tensorboard"
"""Of the event files, in a run's folder."""
PROJECT = "rora-theory"
"""Of Weights & Biases, where the variable ``WANDB_PROJECT`` names no other."""

_WRITERS = {"tensorboardX": ("tensorboardX",), "torch.utils.tensorboard": ("torch", "tensorboard")}


class Tracker(Protocol):
    """Where events go."""

    def add(self, event: Event) -> None:
        """Log what an event has to tell."""


class _Off:
    def add(self, event: Event) -> None:
        """Nothing."""


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, event: Event) -> None:
        for name, value in values(event).items():
            self._writer.add_scalar(name, value, event.step)


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def add(self, event: Event) -> None:
        if found := values(event):
            self._run.log(found, step=event.step)


def values(event: Event) -> dict[str, float]:
    """What is logged of an event, by the names that a dashboard shows.

    Examples:
      >>> values(Validated(80, 1.25, best=True))
      {'validation/loss': 1.25}
    """
    if isinstance(event, Validated):
        return {"validation/loss": event.loss}
    if not isinstance(event, Stepped):
        return {}
    return {
        "train/loss": event.loss,
        "train/grad_norm": event.grad_norm,
        "train/learning_rate": event.learning_rate,
        "train/tokens_per_second": event.speed,
    }


def check_tracker(name: TrackerName | None) -> None:
    """Raise `InputError` where a tracker's package is not installed."""
    if name == "tensorboard" and _writer() is None:
        raise _missing(name, "tensorboardX (or torch and tensorboard)")
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise _missing(name, "wandb")


@contextmanager
def track(
    name: TrackerName | None, folder: Path, *, run: str, config: Mapping[str, Any], step: int = 0
) -> Iterator[Tracker]:
    """A tracker while the block runs.

    Args:
      name: which; None logs nothing.
      folder: of the run; TensorBoard's files go to ``tensorboard/`` in it, those of Weights & Biases to ``wandb/``.
      run: its name; a run that goes on under it is one run.
      config: what Weights & Biases shows beside the curves.
      step: steps taken already: what an earlier part of the run logged after them is done again, and shown once.

    Raises:
      InputError: as `check_tracker`.
    """
    check_tracker(name)
    if name == "tensorboard":
        kind = importlib.import_module(_writer() or "").SummaryWriter
        # A name of its own: files are told apart by the second, and a run may go on within one.
        purge = step + 1 if step else None
        writer = kind(str(folder / FOLDER), purge_step=purge, filename_suffix=f".from-{step + 1}")
        try:
            yield _TensorBoard(writer)
        finally:
            writer.close()
    elif name == "wandb":
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        own = wandb.init(
            project=project, name=run, id=run, dir=str(folder), config=dict(config), resume="allow", reinit=True
        )
        try:
            yield _Wandb(own)
        finally:
            own.finish()
    else:
        yield _Off()


def _writer() -> str | None:
    """The module that writes TensorBoard's files; None where none is installed."""
    for module, needed in _WRITERS.items():
        if all(importlib.util.find_spec(package) is not None for package in needed):
            return module
    return None


def _missing(name: str, package: str) -> InputError:
    return InputError(
        f"log_to is {name!r}, and {package} is not installed; accepted is: pip install 'rora-theory[logging]'"
    )
