"""Commands print as on a wide terminal, and share a tiny model, records and a run folder of sims.regime."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from support import checkpoint, regime_runs

from rora_theory.runs.cluster import ClusterConfig
from sims.common.cells import in_process

jax.devices()  # all eight, before a command under test chooses how many there are


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Print in 240 columns, so that sentences and tables are not broken; `test_output` has 80."""
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Return a tiny checkpoint."""
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Write train.json, other.json, one/train.json and two/train.json, and four questions of each of two tasks."""
    folder = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    checkpoint.records(folder / "train.json", 40)
    checkpoint.records(folder / "other.json", 20)
    for task, labels in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        checkpoint.questions(folder, task, labels)
    return folder


@pytest.fixture
def regime_run(tmp_path) -> Path:
    """Return a run folder of sims.regime."""
    return regime_runs.write(tmp_path / "regime")


@pytest.fixture
def pickled_work(monkeypatch):
    """Run cells from a copy of their work out of Ray's pickle, as a worker does, if Ray is installed."""
    try:
        from ray import cloudpickle
    except ImportError:
        return

    def runner(work: Callable[..., Any], todo: Sequence[Any], begun: Callable[[int], None]) -> Iterator[Any]:
        yield from in_process(cloudpickle.loads(cloudpickle.dumps(work)), todo, begun)

    monkeypatch.setattr(ClusterConfig, "runner", lambda *_: runner)
