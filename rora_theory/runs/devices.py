"""Select the devices of a run; on CPU, as many host devices as cores, so that blocks run in parallel."""

import contextlib
import os

import jax

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer

MAX_DEVICES = 4096
"""Maximum number of devices. JAX creates as many host devices as requested, each with its own threads."""


def pick(count: int | None) -> list[jax.Device]:
    """Return the first devices. Call this before any other JAX work.

    Args:
      count: Number of devices; None is every accelerator, or one host device for each core.

    Raises:
      InputError: The count is below 1 or exceeds the number of devices.
    """
    if count is not None:
        check_integer("devices", count, maximum=MAX_DEVICES)
    # Cores that this process may use, which a scheduler or container may limit.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # the backend is already initialised: use its devices
        jax.config.update("jax_num_cpu_devices", max(count or cores, 1))
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise InputError(
            f"devices must be at most {len(devices)}, the number of {devices[0].platform} devices, got {count}"
        )
    return devices[: count or len(devices)]


def describe_devices(devices: list[jax.Device]) -> str:
    """Return a description of the devices for manifests, such as ``2 x cpu (cpu)``."""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
