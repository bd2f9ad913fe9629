"""Training in several processes: start JAX's distributed runtime from options, environment variables or SLURM."""

import os
from dataclasses import dataclass

import jax

from rora_theory.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that replace the three options."""


@dataclass(frozen=True)
class ProcessConfig:
    """Options for training in several processes, if neither the environment nor SLURM provides them."""

    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes outside SLURM"""
    num_processes: int | None = None
    """Number of processes"""
    process_id: int | None = None
    """Number of this process, from 0"""

    def join(self) -> bool:
        """Call `initialize` with these options."""
        return initialize(self.coordinator, self.num_processes, self.process_id)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> bool:
    """Connect to the other processes of a run.

    Call it before any other use of JAX; every process runs the same command. The three options come from the arguments
    or from `VARIABLES`. Under SLURM (``srun`` with more than one task) none is needed: JAX detects the processes and
    assigns each task the GPU of its local number. Without options and SLURM, the process runs alone.

    Args:
      coordinator: ``HOST:PORT`` of process 0.
      num_processes: Number of processes.
      process_id: Number of this process, 0 to ``num_processes - 1``.
      timeout: Maximum number of seconds to wait for the other processes.

    Returns:
      Whether there are several processes.

    Raises:
      InputError: If only some of the options are set, a value is out of range, or the processes do not connect.
    """
    # Arguments take precedence over environment variables.
    arguments = dict(zip(VARIABLES, (coordinator, num_processes, process_id), strict=True))
    options = {name: os.environ.get(name) if value is None else value for name, value in arguments.items()}
    missing = [name for name, value in options.items() if value is None]
    # No option at all: SLURM describes the processes, or there is only one.
    if len(missing) == len(VARIABLES):
        if not _in_slurm():
            return False
        return _join(None, None, None, timeout)
    # Some options only would leave JAX waiting for processes that never come.
    if missing:
        names = {"JAX_COORDINATOR_ADDRESS": "coordinator", "JAX_NUM_PROCESSES": "num_processes"}
        unset = ", ".join(f"{names.get(name, 'process_id')} ({name})" for name in missing)
        raise InputError(f"several processes: {unset} not set. Set all of {', '.join(VARIABLES)}, or none.")
    address = str(options[VARIABLES[0]])
    # An IPv6 address contains colons too, so the port follows the last one.
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"coordinator must be HOST:PORT of process 0, got {address!r}")
    count = _parse_integer("num_processes", options[VARIABLES[1]], 1, None)
    number = _parse_integer("process_id", options[VARIABLES[2]], 0, count - 1)
    return False if count == 1 else _join(address, count, number, timeout)


def is_first() -> bool:
    """Return whether this is process 0, which alone writes files and prints."""
    return jax.process_index() == 0


def _in_slurm() -> bool:
    """Return whether `srun` started this process as one of several tasks."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return "SLURM_PROCID" in os.environ and "SLURM_JOB_ID" in os.environ and tasks.isdecimal() and int(tasks) > 1


def _parse_integer(name: str, value: object, minimum: int, maximum: int | None) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) < minimum or (maximum is not None and int(text) > maximum):
        bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise InputError(f"{name} must be an integer {bounds}, got {value!r}")
    return int(text)


def _join(address: str | None, count: int | None, number: int | None, timeout: int) -> bool:
    try:
        jax.distributed.initialize(address, count, number, initialization_timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"several processes: cannot connect ({reason}). Start the same command in every process."
        ) from error
    return jax.process_count() > 1
