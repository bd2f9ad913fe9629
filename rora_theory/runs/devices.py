"""Which devices a run uses; on CPU, as many host devices as cores, so that blocks run side by side."""

import contextlib
import os

import jax

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer

MOST = 4096
"""Most devices: JAX makes as many host devices as it is told, each with threads of its own."""


def pick(count: int | None) -> list[jax.Device]:
    """The first ``count`` devices; None is every accelerator, or one host device a core. Call before any JAX work.

    Raises:
      InputError: more devices than there are accelerators, or a count below 1.
    """
    if count is not None:
        check_integer("--devices", count, most=MOST)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # the backend is up (another run in this process): take its devices
        jax.config.update("jax_num_cpu_devices", max(count or cores, 1))
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise InputError(f"--devices is {count}; accepted are 1 to {len(devices)} {devices[0].platform} devices")
    return devices[: count or len(devices)]


def describe(devices: list[jax.Device]) -> str:
    """A device list in words, for manifests."""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
