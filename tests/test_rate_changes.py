"""Changes of the best rate that the pages quote: planted ones, and the published ones beside the sweeps' own tables."""

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.advice.best_rate import Run
from rora_theory.stats.rate_curves import Curve

PUBLISHED = Path(__file__).parents[1] / "results" / "published"


@pytest.fixture
def script(monkeypatch):
    """Find the scripts as ``python benchmarks/NAME.py`` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("rate_changes")


def parabola(best: float) -> Curve:
    """Return a curve of which the log loss is a parabola in the log rate."""
    rates = 2.0 ** np.arange(-16, -3)
    losses = np.exp(0.01 * np.log2(rates / best)[None, :] ** 2)
    return Curve("adamw", "both", "lora", 1.0, 8, 4.0, rates, losses, seeds=(0,))


@pytest.mark.parametrize(
    ("change", "over", "exponent"), [({"gain": 64.0}, "G", -1.0), ({"steps": 1024}, "steps", -0.25)]
)
def test_a_planted_change_has_its_ratio_and_exponent(script, change, over, exponent) -> None:
    old = Run(8, 32.0, 64, "constant")
    new = Run(**{"rank": 8, "gain": 32.0, "steps": 64, "schedule": "constant"} | change)
    rows = script.change_rows("m", {old: parabola(2.0**-8), new: parabola(2.0**-9)}, old, new)
    assert {row["estimator"] for row in rows} == {"whole curve", "three points"}
    for row in rows:
        assert (row["over"], row["ratio"], row["divisor"]) == (over, pytest.approx(0.5), pytest.approx(2))
        assert row["exponent"] == pytest.approx(exponent)
    assert script.change_rows("m", {old: parabola(2.0**-8), new: parabola(2.0**-16)}, old, new) == [], "an edge"
    assert script.change_rows("m", {old: parabola(2.0**-8)}, old, new) == []


def test_the_published_changes_are_those_of_the_sweeps() -> None:
    changes = pd.read_csv(PUBLISHED / "rate_changes" / "changes.csv").set_index(["over", "estimator"])
    steps = pd.read_csv(PUBLISHED / "horizon_cosine" / "steps.csv").query("rank == 8")
    measured = changes.loc[("steps", "three points")].merge(
        steps, left_on=["from_steps", "to_steps"], right_on=["first", "second"]
    )
    assert len(measured) == 3
    np.testing.assert_allclose(measured["exponent_x"], measured["exponent_y"], rtol=1e-6)
    np.testing.assert_allclose(measured["half_width_x"], measured["half_width_y"], rtol=1e-6)
    pooled = pd.read_csv(PUBLISHED / "horizon" / "pooled.csv").query("over == 'gain' and step == 64")
    pooled = pooled.set_index(["at", "first", "second"])["exponent"]
    by_gain = changes.loc[("G", "whole curve")].query("model == 'SmolLM2-135M'")
    for row in by_gain.itertuples():
        assert row.exponent == pytest.approx(pooled[str(row.rank), row.from_gain, row.to_gain], rel=1e-6)
