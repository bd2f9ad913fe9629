"""The replay of probes on measured runs: regret and coverage where the best rates are known."""

import math
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import tune
from rora_theory.lab.sweep.runs import Reading, ReadRun, SweepRun

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TOKENS = [10 + index % 7 for index in range(32)]


def known_runs(exponent: float) -> list[SweepRun]:
    """Return runs with a parabolic log loss in the log rate, whose best rate falls as a power of the steps."""
    runs = []
    for rank in (8, 128):
        for rate in (1e-4, 2e-4, 4e-4, 8e-4, 16e-4, 32e-4):
            readings = []
            for steps in (16, 64, 256):
                best = 1.6e-3 * (steps / 16) ** exponent
                loss = 1.0 + 0.05 * math.log(rate / best) ** 2
                readings.append(Reading(steps, [loss * count for count in TOKENS], [], None))
            runs.append(SweepRun(rank, 64.0, rate, 0, ReadRun([1.0], readings)))
    return runs


def replayed(exponent: float) -> pd.DataFrame:
    return pd.DataFrame(tune.replay(known_runs(exponent), TOKENS, model="m", parameters=1.0, schedule="constant"))


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    """Return replayed probes of runs that follow the assumed law of the steps."""
    return replayed(-0.54)


def test_a_probe_of_the_assumed_law_improves_on_the_prior(cases) -> None:
    assert {*zip(cases["probe_steps"], cases["steps"], strict=True)} == {(16, 64), (16, 256), (64, 256)}
    assert cases["probe"].mean() < 0.5 * cases["prior"].mean()
    assert cases["covers_best"].all()
    assert replayed(0.0)["probe"].mean() > 2 * cases["probe"].mean(), "another law of the steps"


def test_the_regret_is_that_of_the_measured_curve(cases) -> None:
    """The curve is a parabola in log rate, so the regret follows from the rate; fixed rates are transferred by G."""
    row = cases[(cases["steps"] == 64) & (cases["rank"] == 8)].iloc[0]
    best = row["best_rate"]
    at = {rate: 0.05 * math.log(rate / (1.6e-3 * 4**-0.54)) ** 2 for rate in (row["prior_rate"], 5e-4, best)}
    assert row["prior"] == pytest.approx(at[row["prior_rate"]] - at[best], abs=3e-3)
    assert row["fixed 0.0005"] == pytest.approx(at[5e-4] - at[best], abs=3e-3)


def test_the_summary_weighs_planned_runs_alike(cases) -> None:
    summary = tune.summarise(cases).set_index("policy")
    means = cases.groupby(["gain", "rank", "steps"])["probe"].mean()
    assert summary.loc["probe", "mean"] == pytest.approx(means.mean())
    assert summary.loc["probe", "largest"] == cases["probe"].max()
    assert summary.loc["prior", "coverage"] == cases["prior_covers_best"].mean()


def test_a_default_rate_outside_the_measured_ones_is_a_lower_bound() -> None:
    costs = tune.default_rate_regret(known_runs(-0.5), TOKENS)
    below = costs[costs["learning_rate"] < 1e-4]
    assert below["is_lower_bound"].all()
    assert (below["regret"] > 0).all()


@pytest.mark.slow
def test_the_published_tables_are_those_of_the_published_runs() -> None:
    runs, tokens, schedule = tune.read_folder(PUBLISHED / "horizon_cosine")
    rows = tune.replay(runs, tokens, model="SmolLM2-135M", parameters=0.135, schedule=schedule)
    published = pd.read_csv(PUBLISHED / "tune" / "cases.csv").query("schedule == 'cosine'")
    assert len(rows) == len(published)
    for name in ("prior", "probe", "rate"):
        assert [row[name] for row in rows] == pytest.approx(published[name].tolist(), rel=1e-6)
