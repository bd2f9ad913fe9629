"""Training in several processes: options of JAX's distributed runtime."""

from dataclasses import dataclass

import jax

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer


@dataclass(frozen=True)
class ProcessConfig:
    """Options for training in several processes, each of which runs the same command."""

    distributed: bool = False
    """Connect to the other processes of the run; JAX detects them under SLURM, Open MPI and Kubernetes"""
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX does not detect it"""
    num_processes: int | None = None
    """Number of processes, where JAX does not detect it"""
    process_id: int | None = None
    """Number of this process, from 0, where JAX does not detect it"""

    def __post_init__(self) -> None:
        if self.num_processes is not None:
            check_integer("num_processes", self.num_processes)
        if self.process_id is not None:
            check_integer("process_id", self.process_id, minimum=0)

    def join(self, *, timeout: int = 300) -> bool:
        """Connect to the other processes, before any other use of JAX.

        Returns:
          Whether there are several processes.

        Raises:
          InputError: If the processes do not connect.
        """
        options = (self.coordinator, self.num_processes, self.process_id)
        if not self.distributed and options == (None, None, None):
            return False
        try:
            jax.distributed.initialize(*options, initialization_timeout=timeout)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"several processes: cannot connect ({reason}). Start the same command in every process, with "
                "coordinator (HOST:PORT), num_processes and process_id where JAX does not detect them."
            ) from error
        return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is process 0, which alone writes files and prints."""
    return jax.process_index() == 0
