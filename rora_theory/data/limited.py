"""Work on data from anyone, done in a child process that has limits on its processor time and memory.

The child is a new interpreter, not a fork: a process in which JAX has started threads cannot be forked safely. It
imports only the module of the function that it calls. What it returns is JSON, so that nothing that the child might be
made to write is executed here.
"""

import json
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rora_theory.errors import InputError

_CHILD = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from rora_theory.data import limited
limited._serve()
"""


class LimitError(Exception):
    """A child process that met one of its limits; the message says which.

    Attributes:
      done: Values that the function had yielded by then.
    """

    def __init__(self, reason: str, done: list[Any]) -> None:
        super().__init__(reason)
        self.done = done


def run(function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float, memory: int) -> list[Any]:
    """Run a generator function in a child process.

    Args:
      function: Generator function of a module that can be imported; yields values of JSON.
      *arguments: Its arguments, which are pickled.
      seconds: Maximum processor time.
      memory: Maximum memory beside the arguments, in bytes.

    Returns:
      The values that the function yields.

    Raises:
      LimitError: The child used more time or memory, or was ended by a signal.
      InputError: The function raised it.
      RuntimeError: The function raised anything else.
    """
    task = pickle.dumps(sys.path) + pickle.dumps((function, arguments, seconds, memory))
    child = subprocess.run([sys.executable, "-c", _CHILD], input=task, capture_output=True, check=False)
    # The last line may be cut where a signal ended the child.
    lines = [json.loads(line) for line in child.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
    done = [line["value"] for line in lines if "value" in line]
    end = lines[-1] if lines else {}
    if "error" in end:
        raise InputError(end["error"])
    if "memory" in end:
        raise LimitError(f"takes more than {memory:,} bytes of memory", done)
    if child.returncode == -signal.SIGXCPU:
        raise LimitError(f"takes more than {seconds:.0f} s of processor time", done)
    if child.returncode < 0:
        raise LimitError(f"ends with signal {-child.returncode}", done)
    if child.returncode:
        raise RuntimeError(f"{function.__qualname__} in a child process: {child.stderr.decode(errors='replace')}")
    return done


def _serve() -> None:
    """Run the task on standard input; write a line of JSON for each value, and one for an error."""
    function, arguments, seconds, memory = pickle.load(sys.stdin.buffer)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(seconds)), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for value in function(*arguments):
            _say(value=value)
    except InputError as error:
        _say(error=str(error))
    except MemoryError:
        _say(memory=True)


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
