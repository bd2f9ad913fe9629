"""Commands print here as on a wide terminal: a sentence is one line, a table one table."""

import jax
import pytest

jax.devices()  # all eight, before a command under test chooses how many there are


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """240 columns; `test_output` has 80."""
    monkeypatch.setenv("COLUMNS", "240")
