"""Checkpoints of a run: the latest and the best, each complete or absent whenever the process is killed.

Orbax writes a checkpoint to a temporary folder and renames it. The rename is the only commit: the checkpoint itself
records the best step so far, and older checkpoints are removed only afterwards. A checkpoint holds everything that the
remaining steps depend on: adapter, optimizer state, dropout key and step, which determines the position in the data.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp

from rora_theory import extras
from rora_theory.errors import InputError, first_line, is_out_of_memory
from rora_theory.lab.finetune.step import State
from rora_theory.runs.files import naming_damage

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    ocp = extras.missing(error)


@dataclass(frozen=True)
class Progress:
    """Progress of a run, stored with its arrays.

    Attributes:
      step: Number of completed steps, and index of the next batch.
      best_step: Step of the lowest validation loss so far; None before the first validation.
      best_loss: Lowest validation loss so far; None before the first validation.
    """

    step: int
    best_step: int | None = None
    best_loss: float | None = None


class Checkpoints:
    """Checkpoints of a folder, by step.

    Checkpoints are written in the background. Call `wait` or `close` before the process exits.

    Args:
      folder: Folder of the checkpoints, created if it does not exist. Unfinished checkpoints in it are removed.

    Raises:
      InputError: If the folder cannot be created or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self._policy = _PreserveSteps()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True, create=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot create or read checkpoints ({_reason(error)})") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / str(step)

    def save(self, state: State, progress: Progress) -> None:
        """Start to write a checkpoint, and then remove all others except the best.

        The caller may donate ``state`` as soon as the method returns.

        Raises:
          InputError: If this or the previous checkpoint cannot be written, for instance because the disk is full.
            Earlier checkpoints are untouched.
        """
        self.wait()
        self._policy.steps = (progress.step, progress.best_step)
        # On a CPU the writer would read the arrays in place, while the next step already overwrites them.
        copy = _copy(state)
        items = ocp.args.Composite(state=ocp.args.StandardSave(copy), progress=ocp.args.JsonSave(asdict(progress)))
        with self._naming_write_error():
            self._manager.save(progress.step, args=items, force=True)

    def wait(self) -> None:
        """Wait until all checkpoints are written.

        Raises:
          InputError: If a checkpoint cannot be written.
        """
        with self._naming_write_error():
            self._manager.wait_until_finished()

    def restore(self, step: int, like: State) -> tuple[State, Progress]:
        """Load a checkpoint.

        Raises:
          InputError: If the checkpoint cannot be read, or belongs to another model or adapter.
        """
        # Shapes, types and shardings of the present state, to which the restored arrays are placed.
        abstract = jax.tree.map(_abstract, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # several libraries read the files, and each raises errors of its own
            # The file is whole: nobody may be told to remove it.
            if is_out_of_memory(error):
                raise
            raise self._damage_error(step, f"cannot be read ({_reason(error)})") from error
        with naming_damage(self.path(step)):
            progress = Progress(**restored.progress)
        return restored.state, progress

    def _damage_error(self, step: int, damage: str) -> InputError:
        return InputError(
            f"{self.path(step)}: checkpoint {damage}. Restore it from a copy, or remove it to resume from the "
            "checkpoint before it, if there is one."
        )

    def close(self) -> None:
        """Finish writing and stop the background threads.

        Raises:
          InputError: If a checkpoint cannot be written.
        """
        with self._naming_write_error():
            self._manager.close()

    @contextmanager
    def _naming_write_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder}: cannot write a checkpoint ({_reason(error)}). "
                "Free disk space or choose another folder."
            ) from error


def silence_checkpoint_logs() -> None:
    """Silence the checkpoint library's logs in this process, so that the caller reports errors.

    If a checkpoint cannot be written, each of Orbax's threads logs a long message, and unfinished tasks later warn
    that their event loop is closed.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda event: None if str(event.exc_value) == "Event loop is closed" else hook(event)


@jax.jit
def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


class _PreserveSteps:
    """Preservation policy of Orbax that keeps the checkpoints in ``steps``."""

    def __init__(self) -> None:
        self.steps: tuple[int | None, ...] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:  # noqa: ARG002
        """Return which checkpoints to keep, as Orbax requires."""
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _reason(error: Exception) -> str:
    """Return the operating system's error message if there is one, otherwise the first line of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    system = re.search(r": ([^:\[]+) \[os_error_code", str(error))
    return system.group(1) if system else first_line(error)[:200]
