"""Description of the machine that a benchmark runs on, and of the load that other processes put on it meanwhile."""

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from rora_theory.runs.software import environment

PACKAGES = ("rora-theory", "jax", "jaxlib", "optax", "torch", "transformers", "peft")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Instruction sets that determine the speed of matrix products."""
MAX_QUIET_SHARE = 0.03
"""Share of the processors' time above which a benchmark reports that other processes disturbed it."""


def describe_machine(cores: int | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return the processor, its instruction sets, the cores, the packages, the source revision and the date.

    Args:
      cores: Number of cores that the benchmark uses; None means all that this process may use.
      packages: Names of the packages to report. Packages that are not installed are left out.
    """
    # The processor and its flags; the file exists on Linux only.
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    flags = set((re.search(r"flags\s*: (.*)", info) or [""])[0].split())
    installed = {package.metadata["Name"] for package in distributions()}  # `methods.py` needs no peer
    return {
        "processor": model.group(1) if model else platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": cores or len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages if name in installed},
        "git_revision": environment()["git_revision"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def format_machine(machine: dict[str, Any]) -> str:
    """Return the result of `describe_machine` as one line of text."""
    sets = ", ".join(machine["instruction_sets"]) or "no instruction set that counts here"
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return f"{machine['processor']} ({sets}), {machine['cores']} cores, Python {machine['python']}; {packages}"


def silence_transformers() -> None:
    """Keep transformers' warnings and progress bars out of the output of this process and of those that it starts."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # transformers reads the variables when it is imported.
    if (transformers := sys.modules.get("transformers")) is not None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


class OtherLoad:
    """Processor time that other processes use from the construction of this object on.

    Processes that this one started and has waited for count as its own.
    """

    def __init__(self) -> None:
        self._busy, self._own, self._clock = _busy_seconds(), _own_seconds(), time.monotonic()

    def share(self) -> float | None:
        """Return the share of all processors' time, from 0 to 1; None if the system does not report it."""
        if (busy := _busy_seconds()) is None or self._busy is None:
            return None
        taken = busy - self._busy - (_own_seconds() - self._own)
        return max(0.0, taken / ((time.monotonic() - self._clock) * (os.cpu_count() or 1)))

    def describe(self) -> str:
        """Return a sentence with the share, which states whether the benchmark was disturbed."""
        if (share := self.share()) is None:
            return "what other processes took meanwhile is not known"
        text = f"other processes took {share:.0%} of the processors' time meanwhile"
        return f"{text}: disturbed, run it again" if share > MAX_QUIET_SHARE else text


def _busy_seconds() -> float | None:
    """Return the working time of all processors since the system started, without idle time and waits for disks."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
