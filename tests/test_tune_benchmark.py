"""The replay of probes on measured runs: regret and coverage where the best rates are known."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import tune
from rora_theory.advice import measured
from rora_theory.lab.sweep.runs import Reading, ReadRun, SweepRun
from rora_theory.measure.tuning.plan import carry_steps
from rora_theory.runs import seals

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TOKENS = [10 + index % 7 for index in range(32)]


def known_runs(exponent: float) -> list[SweepRun]:
    """Return runs with a parabolic log loss in the log rate, whose best rate falls as a power of the steps."""
    runs = []
    for rank in (8, 128):
        for rate in (2e-4, 4e-4, 8e-4, 16e-4, 32e-4):
            readings = []
            for steps in (16, 64, 256):
                best = 1.6e-3 * (steps / 16) ** exponent
                loss = 1.0 + 0.02 * math.log(rate / best) ** 2
                readings.append(Reading(steps, [loss * count for count in TOKENS], [], None))
            runs.append(SweepRun(rank, 64.0, rate, 0, ReadRun([1.0], readings)))
    return runs


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    """Return replayed probes of runs that follow the assumed law."""
    return tune.replay(known_runs(-0.5), TOKENS)


def test_a_probe_of_the_assumed_law_has_almost_no_regret(cases) -> None:
    assert {*zip(cases["probe_steps"], cases["steps"], strict=True)} == {(16, 64), (16, 256), (64, 256)}
    inside = cases[~cases["is_edge"].astype(bool)]
    assert len(inside) > 0
    assert inside["regret"].max() < 1e-3
    assert inside["covers_best"].all()
    assert tune.replay(known_runs(0.5), TOKENS)["regret"].max() > 0.01, "another law of the steps"


def test_the_schedule_decides_the_exponent(monkeypatch) -> None:
    """With exponents of -0.7 to -0.2 under a cosine schedule, the steps have the power of -0.45, not -0.5."""
    monkeypatch.setitem(measured.MEASURED_STEPS_EXPONENTS, "cosine", (-0.7, -0.2))
    constant, cosine = (tune.replay(known_runs(-0.4), TOKENS, schedule) for schedule in ("constant", "cosine"))
    growth = constant["steps"] / constant["probe_steps"]
    assert (cosine["learning_rate"] / constant["learning_rate"]).to_numpy() == pytest.approx(growth.to_numpy() ** 0.05)
    assert (cosine["low"] < constant["low"]).all()
    assert (cosine["high"] > constant["high"]).all()


def test_probes_at_the_end_of_a_grid_are_counted_and_left_out(cases) -> None:
    summary = tune.summarise_targets(cases.assign(is_edge=[True, *[False] * (len(cases) - 1)]))
    assert int(summary["edges"].sum()) == 1
    assert int(summary["probes"].sum()) == len(cases) - 1
    # They have a column of their own, and a lower bound does not count as close enough.
    first = summary.iloc[0]
    assert first["largest_at_edges"] == pytest.approx(cases.iloc[0]["regret"])
    unknown = tune.summarise_targets(cases.assign(is_edge=False, is_lower_bound=True))
    assert (unknown["within_0.01"] == 0).all()


def test_a_default_rate_outside_the_measured_ones_is_a_lower_bound() -> None:
    costs = tune.default_rate_regret(known_runs(-0.5), TOKENS)
    below = costs[costs["learning_rate"] < 2e-4]
    assert below["is_lower_bound"].all()
    assert (below["regret"] > 0).all()


def test_probes_are_judged_by_the_rate_of_the_current_exponents(tmp_path, monkeypatch) -> None:
    """Regret is at the planned gamma r and at least the planned steps, at any rank: here G = 64 and best rate 4e-4.

    A probe of 16 steps whose best rate is 1.6e-3 leads to it at a constant rate. The rate that its file records came
    from other exponents.
    """
    monkeypatch.setitem(measured.MEASURED_STEPS_EXPONENTS, "cosine", (-0.7, -0.2))
    for name, schedule, alpha, best_rate, steps in (
        ("best", "constant", 64.0, 1.6e-3, 256),
        ("far", "constant", 64.0, 6.4e-3, 256),
        ("cosine", "cosine", 64.0, 1.6e-3, 256),
        ("other", "constant", 16.0, 1.6e-3, 256),
        ("shorter", "constant", 64.0, 1.6e-3, 128),
        ("longer", "constant", 64.0, 1.6e-3, 512),
    ):
        settings = {"rule": "lora", "alpha": alpha, "rank": 128, "steps": steps, "schedule": schedule}
        settings |= {"probe_rank": 8, "seed": 3}
        fitted = {"learning_rate": best_rate, "low": best_rate / 2, "high": best_rate * 2, "steps": 16}
        recorded = {"learning_rate": 7e-4, "low": 6e-4, "high": 8e-4}
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(seals.seal({"config": settings})))
        (tmp_path / name / "tuning.json").write_text(json.dumps(recorded | {"probe": fitted, "cost": {"spent": 25.6}}))
    folders = [tmp_path / name for name in ("best", "far", "cosine", "other", "shorter", "longer")]
    table = tune.probe_run_regret(folders, known_runs(-0.5), TOKENS).set_index(["probe", "rank"])
    assert set(table.index) == {(name, rank) for name in ("best", "far", "cosine", "shorter") for rank in (8, 128)}
    # A probe for fewer steps is carried to the measured ones, for which it recorded no rate.
    assert table["recorded_rate"].dropna().unique() == pytest.approx([7e-4])
    assert table["recorded_rate"].notna().sum() == 6
    assert table.loc["shorter", "recorded_rate"].isna().all()
    assert table.loc[("shorter", 8), "learning_rate"] == pytest.approx(4e-4)
    assert table["share"].unique() == pytest.approx([0.1])
    assert table.loc[("best", 8), "learning_rate"] == pytest.approx(4e-4)
    assert table.loc[("best", 8), "regret"] == pytest.approx(0.0, abs=1e-12)
    assert table.loc[("far", 128), "regret"] == pytest.approx(0.02 * math.log(4) ** 2, rel=1e-6)
    assert table.loc[("cosine", 8), "learning_rate"] == pytest.approx(4e-4 * 16**0.05)
    # The range covers the exponents, and at rank 128 those in the rank too.
    assert table.loc[("best", 8), "low"] == pytest.approx(0.8e-3 * 16**-0.6)
    assert table.loc[("best", 128), "low"] < table.loc[("best", 8), "low"]
    assert table.loc[("best", 128), "high"] > table.loc[("best", 8), "high"]


def test_the_published_probes_show_the_rate_of_the_current_exponents() -> None:
    """The range contains the best rate of every planned run; the rate is the recorded fit, carried to the run."""
    tables = [published / "probes.csv" for published in (PUBLISHED / "tune_cosine", PUBLISHED / "tune_gemma")]
    probes = pd.concat([pd.read_csv(table).assign(folder=table.parent) for table in tables])
    assert len(probes) >= 6
    for row in probes.itertuples():
        fitted = json.loads((row.folder / row.probe / "tuning.json").read_text())["probe"]
        carried = carry_steps(fitted["learning_rate"], row.probe_steps, row.steps, "cosine")
        assert row.learning_rate == pytest.approx(carried.best, rel=1e-6)
        assert row.low < row.best_rate < row.high
