"""Shared by all tests: strict JAX semantics, two host devices, run-time shape checks, and where the data lies."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("rora_theory", "checker.checker")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Seeded (derandomized): a test passes or fails the same way everywhere.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ci")


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).exists():
        pytest.skip(f"{variable} does not name an existing path")
    return Path(value)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Run-time type checks off: what a user meets who passes a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def commonsense_dir() -> Path:
    """Folder of the eight tasks' data in the LLM-Adapters schema."""
    return _folder("RORA_COMMONSENSE_DIR")


@pytest.fixture(scope="session")
def layer_data() -> Path:
    """An .npz of real layers' gradients and inputs."""
    path = _folder("RORA_LAYER_DATA")
    return next(iter(sorted(path.glob("*.npz")))) if path.is_dir() else path
