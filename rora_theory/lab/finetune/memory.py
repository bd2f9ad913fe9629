"""Memory of a compiled training step by XLA's own analysis, and the memory of the device that runs it."""

import os
from typing import Any, NamedTuple

import jax

GB = 1e9


class StepMemory(NamedTuple):
    """XLA's memory analysis of a compiled step on one device, in bytes.

    Attributes:
      arguments: Base weights, trainable parameters, optimizer state and batch.
      temporaries: All other values at the peak: activations, gradients and intermediate results.
    """

    arguments: int
    temporaries: int

    @classmethod
    def from_compiled(cls, compiled: jax.stages.Compiled) -> "StepMemory":
        """Read the analysis of a compiled function."""
        analysis: Any = compiled.memory_analysis()
        return cls(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)

    @property
    def total(self) -> int:
        """Peak memory of one device."""
        return self.arguments + self.temporaries

    def describe(self, device: jax.Device) -> str:
        """Return a sentence that compares the step's memory with the device's."""
        available = device_memory(device)
        limit = "" if available is None else f"; {device.device_kind} has {available / GB:.1f} GB"
        return (
            f"memory of a step on one device, by XLA's analysis: {self.total / GB:.2f} GB "
            f"(arguments {self.arguments / GB:.2f}, temporaries {self.temporaries / GB:.2f}){limit}"
        )


def device_memory(device: jax.Device) -> int | None:
    """Return the bytes that JAX may use on a device, or the machine's memory for a CPU; None if neither is known."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if device.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
