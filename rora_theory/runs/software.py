"""What software a result was made with: Python, packages, revision of the source tree."""

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("rora-theory", "jax", "jaxlib", "numpy", "scipy", "optax")


def versions() -> dict[str, str]:
    """Of those of `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def circumstances() -> dict[str, Any]:
    """``python``, ``packages`` (`versions`) and ``git_revision``: the source tree's, with ``+changes`` where the tree
    differs from it; None outside a checkout."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    options: dict[str, Any] = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True}
    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = subprocess.run(describe, **options, check=True, timeout=10).stdout.strip()
    return {"python": platform.python_version(), "packages": versions(), "git_revision": revision}


def version_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of ``now``'s circumstances was another before, in words; empty where nothing was."""
    old, new = (
        dict(one.get("packages") or {}) | {name: one.get(name) for name in ("python", "git_revision")}
        for one in (before, now)
    )
    return ", ".join(f"{name} {new[name]} (was {old.get(name)})" for name in new if old.get(name) != new[name])
