"""Several processes: JAX's own runtime, started from options, from the environment, or by its cluster detection."""

import os
from dataclasses import dataclass

import jax

from rora_theory.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that stand for the three options."""


@dataclass(frozen=True)
class ProcessConfig:
    """Who takes part, where neither the environment nor SLURM says it."""

    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes outside SLURM"""
    num_processes: int | None = None
    """how many processes take part"""
    process_id: int | None = None
    """number of this process"""

    def join(self) -> bool:
        """`initialize` with these."""
        return initialize(self.coordinator, self.num_processes, self.process_id)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> bool:
    """Join the other processes of a run. Call before any other use of JAX; every process runs the same command.

    Plain: the three options, or `VARIABLES`. Under SLURM (``srun``, more than one task) nothing is needed: JAX
    reads who takes part, and gives each task the GPU of its local number. Otherwise the process is on its own.

    Args:
      coordinator: ``HOST:PORT`` of process 0.
      num_processes: how many take part.
      process_id: 0 to ``num_processes - 1``.
      timeout: seconds to wait for the others.

    Returns:
      whether there are several processes.

    Raises:
      InputError: some but not all of the options, a value out of range, or processes that do not meet.
    """
    options = dict(zip(VARIABLES, (coordinator, num_processes, process_id), strict=True))
    given = {name: os.environ.get(name) if value is None else value for name, value in options.items()}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(VARIABLES):
        if not _in_slurm():
            return False
        return _join(None, None, None, timeout)
    if missing:
        names = {"JAX_COORDINATOR_ADDRESS": "coordinator", "JAX_NUM_PROCESSES": "num_processes"}
        lacking = ", ".join(f"{names.get(name, 'process_id')} ({name})" for name in missing)
        raise InputError(f"several processes: {lacking} missing; accepted are all of {', '.join(VARIABLES)} or none")
    address = str(given[VARIABLES[0]])
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"coordinator is {address!r}; accepted is HOST:PORT of process 0")
    count = _integer("num_processes", given[VARIABLES[1]], 1, None)
    number = _integer("process_id", given[VARIABLES[2]], 0, count - 1)
    return False if count == 1 else _join(address, count, number, timeout)


def is_first() -> bool:
    """Whether this is the process that writes files and prints: number 0, or the only one."""
    return jax.process_index() == 0


def _in_slurm() -> bool:
    """Whether `srun` started this process as one of several tasks."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return "SLURM_PROCID" in os.environ and "SLURM_JOB_ID" in os.environ and tasks.isdecimal() and int(tasks) > 1


def _integer(name: str, value: object, least: int, most: int | None) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        accepted = f"an integer of {least} or more" if most is None else f"an integer from {least} to {most}"
        raise InputError(f"{name} is {value!r}; accepted is {accepted}")
    return int(text)


def _join(address: str | None, count: int | None, number: int | None, timeout: int) -> bool:
    try:
        jax.distributed.initialize(address, count, number, initialization_timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"several processes: not joined ({reason}); accepted is one command a process, all started"
        ) from error
    return jax.process_count() > 1
