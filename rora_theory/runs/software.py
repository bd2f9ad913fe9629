"""Record the software that computes a result: Python, packages, revision of the source tree."""

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("rora-theory", "jax", "jaxlib", "numpy", "scipy", "optax")


def versions() -> dict[str, str]:
    """Return the versions of those `PACKAGES` that are installed."""
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def environment() -> dict[str, Any]:
    """Return the software environment of this process.

    Returns:
      ``python``, the version; ``packages``, see `versions`; and ``git_revision``, the commit of the source tree, with
      ``+changes`` if the tree differs from it, or None outside a checkout.
    """
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    options: dict[str, Any] = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True}
    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = subprocess.run(describe, **options, check=True, timeout=10).stdout.strip()
    return {"python": platform.python_version(), "packages": versions(), "git_revision": revision}


def version_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a text that lists each package whose version changed, with both versions; empty if none changed."""
    old_versions, new_versions = (
        dict(recorded.get("packages") or {}) | {name: recorded.get(name) for name in ("python", "git_revision")}
        for recorded in (before, now)
    )
    return ", ".join(
        f"{name} {new} (was {old_versions.get(name)})"
        for name, new in new_versions.items()
        if old_versions.get(name) != new
    )
