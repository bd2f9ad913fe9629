"""Run a function on untrusted data in a child process with limits on its processor time and memory.

The child is a new interpreter, not a fork, because a process in which JAX has started threads cannot be forked safely.
It imports only the module of the function that it calls. It returns JSON, so this process never executes what untrusted
data might make the child write.
"""

import json
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError

_CHILD_CODE = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from rora_theory.lab.data import limited_process
limited_process._run_child()
"""


class LimitError(Exception):
    """A child process reached one of its limits, which the message names.

    Attributes:
      results: Values that the function had yielded before.
    """

    def __init__(self, reason: str, results: list[Any]) -> None:
        """Store the reason as the message."""
        super().__init__(reason)
        self.results = results


def run(function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float, memory: int) -> list[Any]:
    """Run a generator function in a child process.

    Args:
      function: Generator function of an importable module that yields JSON values.
      *arguments: Arguments of the function, which are pickled.
      seconds: Maximum processor time.
      memory: Maximum memory in addition to the arguments, in bytes; applies on Linux only.

    Returns:
      The values that the function yields.

    Raises:
      LimitError: The child exceeded its time or memory, or was ended by a signal.
      InputError: The function raised it.
      RuntimeError: The function raised anything else.
    """
    # The child needs the parent's import path before it can unpickle the function.
    task = pickle.dumps(sys.path) + pickle.dumps((function, arguments, seconds, memory))
    child = subprocess.run([sys.executable, "-c", _CHILD_CODE], input=task, capture_output=True, check=False)
    # Parse one message a line. The last line may be incomplete if a signal ended the child.
    complete_lines = [line for line in child.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
    messages = [json.loads(line) for line in complete_lines]
    results = [message["value"] for message in messages if "value" in message]
    # Raise what ended the child, if it did not finish.
    last = messages[-1] if messages else {}
    if "error" in last:
        raise InputError(last["error"])
    if "memory" in last:
        raise LimitError(f"takes more than {memory:,} bytes of memory", results)
    # The kernel ends the child with this signal at the limit of processor time.
    if child.returncode == -signal.SIGXCPU:
        raise LimitError(f"takes more than {seconds:.0f} s of processor time", results)
    if child.returncode < 0:
        raise LimitError(f"ends with signal {-child.returncode}", results)
    if child.returncode:
        raise RuntimeError(f"{function.__qualname__} in a child process: {child.stderr.decode(errors='replace')}")
    return results


def _run_child() -> None:
    """Run the task on standard input; write a line of JSON for each value, and one for an error."""
    function, arguments, seconds, memory = pickle.load(sys.stdin.buffer)
    _limit_memory(memory, Path("/proc/self/statm"))
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(seconds)), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump could fill the disk
    try:
        for value in function(*arguments):
            _write_message(value=value)
    except InputError as error:
        _write_message(error=str(error))
    except MemoryError:
        _write_message(memory=True)


def _limit_memory(memory: int, statm: Path) -> None:
    """Limit the address space to ``memory`` bytes beyond what the interpreter and the arguments take already.

    Only Linux tells how much that is, in the file ``statm``. Without it (macOS) memory is not limited.
    """
    if statm.exists():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _write_message(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
