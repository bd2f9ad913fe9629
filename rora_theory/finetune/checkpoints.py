"""A run's checkpoints: the latest and the best, each whole or not there, whenever the process dies.

Orbax writes a checkpoint beside and renames it. That rename is the only commit: the checkpoint itself names
the best one so far, and an older one is removed only after it. A checkpoint holds all that the rest of the
run depends on: adapter, optimizer state, step, dropout key, and with the step the position in the data.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp

from rora_theory import extras
from rora_theory.errors import InputError, first_line
from rora_theory.finetune.step import State
from rora_theory.io.files import naming_damage
from rora_theory.runs import seals

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    ocp = extras.missing(error)


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its arrays.

    Attributes:
      step: steps taken; the next batch is the one of this index.
      best_step: step of the lowest validation loss so far; None before the first.
      best_loss: that loss.
      settings, data: digests of what the run is of; None in a checkpoint of a version before these.
    """

    step: int
    best_step: int | None = None
    best_loss: float | None = None
    settings: str | None = None
    data: str | None = None


class Checkpoints:
    """The checkpoints in one folder, by step. Writing goes on in the background; close or wait before
    leaving.

    Args:
      folder: made if it is not there. What a killed process left unfinished in it is removed.

    Raises:
      InputError: the folder can't be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self._keep = _Named()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep, cleanup_tmp_directories=True, create=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot hold checkpoints ({_reason(error)})") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / str(step)

    def save(self, state: State, progress: Progress) -> None:
        """Write a checkpoint; then remove all but it and the best it names.

        ``state`` may be donated as soon as this returns.

        Raises:
          InputError: this or the previous checkpoint can't be written, as on a full disk; earlier ones are
            untouched.
        """
        self.wait()
        self._keep.steps = (progress.step, progress.best_step)
        # On a CPU the writer would read the arrays in place, while the next step already overwrites them.
        copy = _copy(state)
        sealed = seals.seal(asdict(progress) | {"state": checksum(state)})
        items = ocp.args.Composite(state=ocp.args.StandardSave(copy), progress=ocp.args.JsonSave(sealed))
        try:
            self._manager.save(progress.step, args=items, force=True)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Return when all is written. Raises as `save`."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self, step: int, like: State) -> tuple[State, Progress]:
        """A checkpoint's contents, on the devices and in the layout of ``like``.

        Raises:
          InputError: the checkpoint is damaged, be it by one bit, or belongs to another model or adapter.
        """
        abstract = jax.tree.map(_abstract, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:  # a damaged file breaks any of the libraries that read it, each in its own way
            raise self._damaged(step, f"cannot be read ({_reason(error)})") from error
        with naming_damage(self.path(step)):
            progress = dict(found.progress)
            if not seals.is_sealed(progress) or progress.pop("state") != checksum(found.state):
                raise self._damaged(step, "is not as it was written")
            del progress[seals.DIGEST]
            result = Progress(**progress)
            if result.step != step:
                raise self._damaged(step, "is not as it was written")
        return found.state, result

    def _damaged(self, step: int, how: str) -> InputError:
        return InputError(
            f"{self.path(step)}: {how}; accepted is a whole checkpoint of this run; with it removed, the run goes on "
            "from the one before, if there is one"
        )

    def close(self) -> None:
        """Finish writing and stop the background threads. Raises as `save`."""
        try:
            self._manager.close()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> InputError:
        return InputError(
            f"{self.folder}: a checkpoint cannot be written ({_reason(error)}); accepted is a disk with room"
        )


def quiet_writers() -> None:
    """Leave it to the caller to say what went wrong, in this whole process.

    When a checkpoint cannot be written, each of Orbax's threads logs it at length, and what they leave undone complains
    of its closed event loop later.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    report = sys.unraisablehook
    sys.unraisablehook = lambda seen: None if str(seen.exc_value) == "Event loop is closed" else report(seen)


@jax.jit
def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


def checksum(state: State) -> list[int]:
    """A number for each array, which a change of any one byte changes; the same on any devices and in any layout."""
    return [int(number) for number in jax.device_get(_sums(state))]


@jax.jit
def _sums(state: State) -> list[jax.Array]:
    return [_sum(leaf) for leaf in jax.tree.leaves(state)]


def _sum(leaf: jax.Array) -> jax.Array:
    """The array's bits as integers, the i-th (from 0) times 2i + 1, summed modulo 2^32.

    An odd factor has an inverse modulo 2^32: one changed integer always changes the sum.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(bits.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(bits, kind).astype(jnp.uint32).ravel()
    factors = jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
    return jnp.sum(words * factors, dtype=jnp.uint32)


class _Named:
    """Orbax's preservation policy: keep the steps named."""

    def __init__(self) -> None:
        self.steps: tuple[int | None, ...] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:  # noqa: ARG002
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _reason(error: Exception) -> str:
    """The operating system's words where there are any, else the first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    system = re.search(r": ([^:\[]+) \[os_error_code", str(error))
    return system.group(1) if system else first_line(error)[:200]
