"""Commands print here as on a wide terminal: a sentence is one line, a table one table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import pytest

from rora_theory.cluster import ClusterConfig
from sims.common.cells import in_process

jax.devices()  # all eight, before a command under test chooses how many there are


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """240 columns; `test_output` has 80."""
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture
def carried(monkeypatch):
    """Cells are done by what a cluster's worker has of their work: a copy out of Ray's pickle, where Ray is here."""
    try:
        from ray import cloudpickle
    except ImportError:
        return

    def runner(work: Callable[..., Any], todo: Sequence[Any], begun: Callable[[int], None]) -> Iterator[Any]:
        yield from in_process(cloudpickle.loads(cloudpickle.dumps(work)), todo, begun)

    monkeypatch.setattr(ClusterConfig, "runner", lambda *_: runner)
