"""The replay of probes on measured runs: regret and coverage where the best rates are known."""

import json
import math

import pandas as pd
import pytest

from benchmarks import tune
from rora_theory.horizon.readings import Reading, ReadRun
from rora_theory.horizon.runs import HorizonRun
from rora_theory.runs import seals

TOKENS = [10 + index % 7 for index in range(32)]


def known_runs(exponent: float) -> list[HorizonRun]:
    """Runs whose loss is a parabola in the log rate, with a best rate that falls as a power of the steps."""
    runs = []
    for rank in (8, 128):
        for rate in (2e-4, 4e-4, 8e-4, 16e-4, 32e-4):
            readings = []
            for steps in (16, 64, 256):
                best = 1.6e-3 * (steps / 16) ** exponent
                loss = 1.0 + 0.02 * math.log(rate / best) ** 2
                readings.append(Reading(steps, [loss * count for count in TOKENS], [], None))
            runs.append(HorizonRun(rank, 64.0, rate, 0, ReadRun([1.0], readings)))
    return runs


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    """Probes of runs that follow the assumed law."""
    return tune.replay(known_runs(-0.5), TOKENS)


def test_a_probe_of_the_assumed_law_has_almost_no_regret(cases) -> None:
    assert {*zip(cases["probe_steps"], cases["steps"], strict=True)} == {(16, 64), (16, 256), (64, 256)}
    inside = cases[~cases["is_edge"].astype(bool)]
    assert len(inside) > 0
    assert inside["regret"].max() < 1e-3
    assert inside["covers_best"].all()
    assert tune.replay(known_runs(0.5), TOKENS)["regret"].max() > 0.01, "another law of the steps"


def test_the_schedule_decides_the_exponent() -> None:
    """Under a cosine schedule the advised rate falls with the steps to the power of -0.45, not -0.5."""
    constant, cosine = (tune.replay(known_runs(-0.4), TOKENS, schedule) for schedule in ("constant", "cosine"))
    growth = constant["steps"] / constant["probe_steps"]
    assert (cosine["learning_rate"] / constant["learning_rate"]).to_numpy() == pytest.approx(growth.to_numpy() ** 0.05)
    assert (cosine["low"] < constant["low"]).all()
    assert (cosine["high"] > constant["high"]).all()


def test_probes_at_the_end_of_a_grid_are_counted_and_left_out(cases) -> None:
    summary = tune.summarise_targets(cases.assign(is_edge=[True, *[False] * (len(cases) - 1)]))
    assert int(summary["edges"].sum()) == 1
    assert int(summary["probes"].sum()) == len(cases) - 1


def test_a_default_rate_outside_the_measured_ones_is_a_lower_bound() -> None:
    costs = tune.default_rate_regret(known_runs(-0.5), TOKENS)
    below = costs[costs["learning_rate"] < 2e-4]
    assert below["is_lower_bound"].all()
    assert (below["regret"] > 0).all()


def test_rates_that_a_probe_named_are_judged_where_they_were_planned(tmp_path) -> None:
    """At the planned steps and gamma r, at any rank: here G = 64 after 256 steps, whose best rate is 4e-4."""
    for name, steps, alpha, rate in (("best", 256, 64.0, 4e-4), ("far", 256, 64.0, 16e-4), ("other", 256, 16.0, 4e-4)):
        settings = {"rule": "lora", "alpha": alpha, "rank": 128, "steps": steps}
        probe = {"probe": {"steps": 16}, "cost": {"share": 0.1}, "learning_rate": rate, "low": 2e-4, "high": 8e-4}
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(seals.seal({"config": settings})))
        (tmp_path / name / "tuning.json").write_text(json.dumps(probe))
    folders = [tmp_path / name for name in ("best", "far", "other")]
    table = tune.probe_run_regret(folders, known_runs(-0.5), TOKENS).set_index(["probe", "rank"])
    assert set(table.index) == {(name, rank) for name in ("best", "far") for rank in (8, 128)}
    assert table.loc[("best", 8), "regret"] == pytest.approx(0.0, abs=1e-12)
    assert table.loc[("far", 128), "regret"] == pytest.approx(0.02 * math.log(4) ** 2, rel=1e-6)
