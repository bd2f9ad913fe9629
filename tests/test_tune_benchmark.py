"""The regret of rates without a tuned run on measured curves, where the best rates are known."""

import importlib
import math
from pathlib import Path

import pandas as pd
import pytest

from rora_theory.advice.best_rate import Run
from rora_theory.evidence.rate_prior import rate_prior
from rora_theory.evidence.sweeps import RunRecord, sweeps_of
from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import Reading, ReadRun, SweepRun
from rora_theory.stats.rate_curves import Curve

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TOKENS = [10 + index % 7 for index in range(32)]
BEST = {64: 8e-4, 256: 4e-4}


def known_runs() -> list[SweepRun]:
    """Return runs with a loss that is a parabola in the log rate, at ranks of the comparison and at another one."""
    runs = []
    for rank in (8, 32, 128):
        for rate in (1e-4, 2e-4, 4e-4, 8e-4, 16e-4, 32e-4):
            readings = []
            for steps, best in BEST.items():
                loss = 1.0 + 0.05 * math.log(rate / best) ** 2
                readings.append(Reading(steps, [loss * count for count in TOKENS], [], None))
            runs.append(SweepRun(rank, 64.0, rate, 0, ReadRun([1.0], readings)))
    return runs


def known_curves(runs: list[SweepRun]) -> dict[Run, Curve]:
    return {
        Run(curve.rank, curve.gain, steps, "constant", 4): curve
        for steps in BEST
        for curve in curves_at(runs, TOKENS, steps, draws=2)
    }


@pytest.fixture
def tune(monkeypatch):
    """Find the scripts as ``python benchmarks/NAME.py`` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("tune")


@pytest.fixture
def targets(tune) -> dict[Run, Curve]:
    return tune.planned_targets(known_curves(known_runs()))


@pytest.fixture
def cases(tune, targets) -> pd.DataFrame:
    return pd.DataFrame(tune.case_rows(targets, model="m", parameters=1.0))


def test_settings_of_a_public_sweep_with_a_best_rate_inside_are_planned_with_its_steps_and_batch(tune) -> None:
    best = {8: 2e-4, 16: 4e-4, 32: 8e-4}  # the last at an end of the rates
    runs = [
        RunRecord("m", rank, 32.0, "lora", rate, 1.0 + math.log(rate / best[rank]) ** 2, 780, 66, 0)
        for rank in best
        for rate in (1e-4, 2e-4, 4e-4, 8e-4)
    ]
    (sweep,) = sweeps_of(runs, "source")
    targets = tune.read_public_targets(sweep, "linear")
    assert set(targets) == {Run(8, 32.0, 780, "linear", 66), Run(16, 32.0, 780, "linear", 66)}
    rows = tune.case_rows(targets, model="m", parameters=4.0)
    assert [row["best_rate"] for row in rows] == [2e-4, 4e-4]
    assert all(row["prior"] > 0 for row in rows)


def test_planned_runs_have_a_best_rate_between_measured_ones(tune, targets) -> None:
    assert {(run.rank, run.steps) for run in targets} == {(8, 64), (8, 256), (128, 64), (128, 256)}
    assert {run.steps: curve.rates[curve.lowest] for run, curve in targets.items()} == pytest.approx(BEST)
    rising = [run for run in known_runs() if run.rate <= 4e-4]
    assert tune.planned_targets(known_curves(rising)) == {}


def test_the_regret_is_that_of_the_measured_curve(cases) -> None:
    """The curve is a parabola in log rate, so the regret follows from the rate; fixed rates are transferred by G."""
    row = cases[(cases["steps"] == 64) & (cases["rank"] == 8)].iloc[0]
    prior = rate_prior(Run(8, 64.0, 64, "constant", 4), parameters=1.0).rates
    assert (row["prior_rate"], row["low"], row["high"]) == pytest.approx((prior.best, prior.low, prior.high))
    for name, rate in (("prior", prior.best), ("fixed 0.0005", 5e-4)):
        assert row[name] == pytest.approx(0.05 * math.log(rate / 8e-4) ** 2, abs=3e-3)
    assert bool(row["prior_covers_best"]) is (prior.low <= 8e-4 <= prior.high)


def test_the_summary_weighs_planned_runs_alike(tune, cases) -> None:
    summary = tune.summarise(cases).set_index("policy")
    assert summary.loc["prior", "mean"] == pytest.approx(cases["prior"].mean())
    assert summary.loc["fixed 0.0002", "largest"] == cases["fixed 0.0002"].max()
    assert summary.loc["prior", "coverage"] == cases["prior_covers_best"].mean()
    assert (summary["planned_runs"] == len(cases)).all()


def test_a_default_rate_outside_the_measured_ones_is_a_lower_bound(tune, targets) -> None:
    costs = tune.default_rate_regret(targets)
    below = costs[costs["learning_rate"] < 1e-4]
    assert below["is_lower_bound"].all()
    assert (below["regret"] > 0).all()


@pytest.mark.slow
def test_the_published_tables_are_those_of_the_published_runs(tune) -> None:
    rows = tune.case_rows(tune.read_targets("horizon_cosine", "cosine"), model="SmolLM2-135M", parameters=0.135)
    published = pd.read_csv(PUBLISHED / "tune" / "cases.csv").query("schedule == 'cosine'")
    assert len(rows) == len(published)
    for name in ("prior", "prior_rate", "fixed 0.0007"):
        assert [row[name] for row in rows] == pytest.approx(published[name].tolist(), rel=1e-6)
