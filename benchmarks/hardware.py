"""The machine that a benchmark ran on, in general terms, and what other processes took of it meanwhile."""

import os
import platform
import re
import resource
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from rora_theory.runs.software import environment

PACKAGES = ("rora-theory", "jax", "jaxlib", "optax", "torch", "transformers", "peft")
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Instruction sets that decide how fast products are."""
DISTURBED = 0.03
"""Share of the processors' time from which a benchmark says that others were at work."""


def machine(cores: int | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The processor's name, its instruction sets, the cores that are used (None: all that this process may), packages,
    the revision of this package's source tree and the day.

    Packages that are not installed are left out.
    """
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    flags = set((re.search(r"flags\s*: (.*)", info) or [""])[0].split())
    installed = {found.metadata["Name"] for found in distributions()}  # `methods.py` needs no peer
    return {
        "processor": model.group(1) if model else platform.machine(),
        "instruction_sets": [name for name in SETS if name in flags],
        "cores": cores or len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages if name in installed},
        "git_revision": environment()["git_revision"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def in_words(found: dict[str, Any]) -> str:
    """A machine of `machine` in a line."""
    sets = ", ".join(found["instruction_sets"]) or "no instruction set that counts here"
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    return f"{found['processor']} ({sets}), {found['cores']} cores, Python {found['python']}; {packages}"


class Others:
    """What processes other than this one and those it started and waited for took of the machine since it was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._clock = _busy(), _own(), time.monotonic()

    def share(self) -> float | None:
        """Share of the time of all processors, 0 to 1; None where the system doesn't tell."""
        if (busy := _busy()) is None or self._busy is None:
            return None
        taken = busy - self._busy - (_own() - self._own)
        return max(0.0, taken / ((time.monotonic() - self._clock) * (os.cpu_count() or 1)))

    def in_words(self) -> str:
        """Whether the figures are of a quiet machine."""
        if (share := self.share()) is None:
            return "what other processes took meanwhile is not known"
        found = f"other processes took {share:.0%} of the processors' time meanwhile"
        return f"{found}: disturbed, run it again" if share > DISTURBED else found


def _busy() -> float | None:
    """Seconds that all processors have worked since the system started: neither idle nor waiting for a disk."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)
