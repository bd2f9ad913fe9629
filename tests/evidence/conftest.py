"""Folder of the originals of the public sweeps, and sweeps of known parabolas."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rora_theory.evidence.sweeps import RunRecord, Sweep, sweeps_of

RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@pytest.fixture
def originals() -> Path:
    """Return the folder of the files that the sources published, most of which the package may not contain."""
    folder = os.environ.get("RORA_EXTERNAL_DIR")
    if not folder:
        pytest.skip("RORA_EXTERNAL_DIR is not set: no folder with the published losses")
    return Path(folder)


@pytest.fixture
def sweep_of() -> Callable[..., Sweep]:
    """Return a function that makes the sweep of a model, whose log losses are parabolas in the log rate."""

    def make(best: dict[tuple[int, float], float], *, model: str = "m", rates: tuple[float, ...] = RATES) -> Sweep:
        runs = [
            RunRecord(model, rank, gain, "lora", rate, math.exp(0.02 * math.log(rate / optimum) ** 2), 10, 4)
            for (rank, gain), optimum in best.items()
            for rate in rates
        ]
        (sweep,) = sweeps_of(runs, "made")
        return sweep

    return make
