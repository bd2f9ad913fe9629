"""Live logging of a run's losses, learning rates and speed to TensorBoard or Weights & Biases.

The run's own files hold the same values exactly. Trackers are for monitoring, and are off by default.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rora_theory.errors import InputError, first_line
from rora_theory.lab.finetune.loop import Event, StepCompleted, ValidationCompleted

TrackerName = Literal["tensorboard", "wandb"]

FOLDER = "tensorboard"
"""Name of TensorBoard's folder in a run's folder."""
PROJECT = "rora-theory"
"""Default project of Weights & Biases; the environment variable ``WANDB_PROJECT`` overrides it."""

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def values(event: Event) -> dict[str, float]:
    """Return the logged values of an event by their names in a dashboard.

    Examples:
      >>> values(ValidationCompleted(80, 1.25, best=True))
      {'validation/loss': 1.25}
    """
    if isinstance(event, ValidationCompleted):
        return {"validation/loss": event.loss}
    if not isinstance(event, StepCompleted):
        return {}
    return {
        "train/loss": event.loss,
        "train/grad_norm": event.grad_norm,
        "train/learning_rate": event.learning_rate,
        "train/tokens_per_second": event.speed,
    }


def check_tracker(name: TrackerName | None) -> None:
    """Raise `InputError` if a tracker's package is not installed."""
    if name is not None and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise InputError(
            f"log_to {name!r} requires {_PACKAGES[name]}, which is not installed. "
            "Run: pip install 'rora-theory[logging]'"
        )


@contextmanager
def track(
    name: TrackerName | None, folder: Path, *, run: str, config: Mapping[str, Any], step: int = 0
) -> Iterator[Callable[[Event], None]]:
    """Open a tracker for the duration of a ``with`` block, which gets the function that logs an event.

    Args:
      name: Tracker to use; None logs nothing.
      folder: Folder of the run. TensorBoard writes to ``tensorboard/`` in it, Weights & Biases to ``wandb/``.
      run: Name of the run; a resumed run with the same name continues its curves.
      config: Settings that Weights & Biases shows with the curves.
      step: Number of steps already taken. If values beyond it were logged before an interruption, TensorBoard replaces
        them, and Weights & Biases keeps the first ones.

    Raises:
      InputError: If the tracker's package is not installed, or Weights & Biases cannot start.
    """
    check_tracker(name)
    if name == "tensorboard":
        from tensorboardX import SummaryWriter

        # TensorBoard names files by the second, within which a run may resume: the suffix keeps the names distinct.
        purge = step + 1 if step else None
        with SummaryWriter(str(folder / FOLDER), purge_step=purge, filename_suffix=f".from-{step + 1}") as writer:

            def add_scalars(event: Event) -> None:
                for value_name, value in values(event).items():
                    writer.add_scalar(value_name, value, event.step)

            yield add_scalars
    elif name == "wandb":
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        # The name is also the id, which is how Weights & Biases recognises the run that is resumed.
        try:
            wandb_run = wandb.init(
                project=project, name=run, id=run, dir=str(folder), config=dict(config), resume="allow", reinit=True
            )
        except wandb.Error as error:
            reason = first_line(error).rstrip(".")
            raise InputError(
                f"log_to 'wandb' cannot start ({reason}). Run wandb login, or set WANDB_MODE=offline."
            ) from error

        def log_values(event: Event) -> None:
            if scalars := values(event):
                wandb_run.log(scalars, step=event.step)

        try:
            yield log_values
        finally:
            wandb_run.finish()
    else:
        yield lambda _: None
