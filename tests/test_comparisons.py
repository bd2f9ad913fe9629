"""The published comparisons of use_rslora and of batch sizes follow from the published runs."""

import importlib
import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.advice.constants import CONSTANTS
from rora_theory.stats.regret import regrets_at

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"
TABLES = {
    "use_rslora": ("use_rslora", ["best", "outcomes", "exponents", "regret", "policies", "coverage"]),
    "batch_exponents": ("batch_size", ["best", "exponents", "regret"]),
}
"""Folder and tables of each script."""


@pytest.mark.parametrize("script", TABLES)
def test_tables_follow_from_the_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(script)
    name, tables = TABLES[script]
    folder = tmp_path / name
    shutil.copytree(PUBLISHED / name, folder)
    for table in tables:
        (folder / f"{table}.csv").unlink()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--out", str(folder)])
    module.main()
    for table in tables:
        expected = pd.read_csv(PUBLISHED / name / f"{table}.csv")
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{table}.csv"), expected, rtol=1e-5, obj=table)


@pytest.fixture(scope="module")
def use_rslora() -> dict[str, pd.DataFrame]:
    """Published tables of the comparison by name."""
    return {name: pd.read_csv(PUBLISHED / "use_rslora" / f"{name}.csv") for name in TABLES["use_rslora"][1]}


def test_a_ratio_is_the_second_best_rate_over_the_first(use_rslora: dict[str, pd.DataFrame]) -> None:
    # From the table of best rates, which come from three points, so that a swap of the two curves shows.
    best = use_rslora["best"]
    best["setting"] = [f"rank {rank}, G {gain:.3g}" for rank, gain in zip(best["rank"], best["gain"], strict=True)]
    rates = best.set_index(["seed", "setting"])["best_rate"]
    outcomes = use_rslora["outcomes"].query("estimator == 'three points'").dropna(subset=["ratio"])
    assert len(outcomes) >= 2
    for row in outcomes.to_dict("records"):
        expected = rates[row["seed"], row["to"]] / rates[row["seed"], row["from"]]
        assert row["ratio"] == pytest.approx(expected, rel=1e-6)


def test_an_exponent_is_the_mean_log_ratio_of_the_seeds_over_the_log_change(
    use_rslora: dict[str, pd.DataFrame],
) -> None:
    key = ["estimator", "from", "to"]
    outcomes, exponents = (use_rslora[name].set_index(key) for name in ("outcomes", "exponents"))
    # With use_rslora G grows as the square root of the rank at one alpha.
    changes = {
        ("rank 8, G 32", "rank 128, G 32"): 16.0,
        ("rank 32, G 32", "rank 32, G 181"): math.sqrt(32),
    }
    for estimator, (pair, change) in itertools.product(("whole curve", "three points"), changes.items()):
        pair = estimator, *pair
        ratios = np.atleast_1d(outcomes.sort_index().loc[[pair], "ratio"].dropna())
        assert exponents["exponent"][pair] == pytest.approx(np.mean(np.log(ratios)) / np.log(change), rel=1e-6)
        assert exponents["seeds"][pair] == len(ratios)


def test_the_mean_regret_of_a_policy_is_over_its_seeds(use_rslora: dict[str, pd.DataFrame]) -> None:
    costs, means = use_rslora["regret"], use_rslora["policies"]
    assert len(means) > 10
    for row in means.to_dict("records"):
        same = costs[(costs["from"] == row["from"]) & (costs["to"] == row["to"]) & (costs["policy"] == row["policy"])]
        assert row["regret"] == pytest.approx(same["regret"].mean(), rel=1e-6)
        assert row["largest"] == pytest.approx(same["regret"].max(), rel=1e-6)
        # Over the interval of the tuned rate.
        assert [row["low"], row["high"]] == pytest.approx([same["low"].mean(), same["high"].mean()], rel=1e-6)
        assert row["seeds"] == same["seed"].nunique()


def test_keeping_the_rate_uses_the_rate_that_was_best_before(use_rslora: dict[str, pd.DataFrame]) -> None:
    best = use_rslora["best"]
    best["setting"] = [f"rank {rank}, G {gain:.3g}" for rank, gain in zip(best["rank"], best["gain"], strict=True)]
    rates = best.set_index(["seed", "setting"])["best_rate"]
    kept = use_rslora["regret"].query("policy == 'keep the rate'")
    for row in kept.to_dict("records"):
        assert row["learning_rate"] == pytest.approx(rates[row["seed"], row["from"]], rel=1e-6)
    # With use_rslora at one rank the advice lowers the rate, by more than a square root of G and less than G.
    for row in use_rslora["regret"].query("policy == 'advice' and change == 'use_rslora'").to_dict("records"):
        growth = float(row["to"].split("G ")[1]) / float(row["from"].split("G ")[1])
        factor = rates[row["seed"], row["from"]] / row["learning_rate"]
        assert growth**0.5 < factor < growth


def test_the_exponents_in_the_batch_are_those_of_the_best_rates() -> None:
    """From the tables of the runs, so that a swap of two batches or of the estimators shows."""
    exponents = pd.read_csv(PUBLISHED / "batch_size" / "exponents.csv").set_index(
        ["from_batch", "to_batch", "estimator"]
    )
    rates = {}
    for size in (4, 16, 64):
        table = pd.read_csv(PUBLISHED / "batch_size" / f"batch_{size}" / "rates.csv").query("loss_on == 'all'")
        rates |= {(size, row.estimate): row.best_rate for row in table.itertuples()}
    for (small, large), estimator in itertools.product(((4, 16), (4, 64), (16, 64)), ("whole curve", "three points")):
        expected = math.log(rates[large, estimator] / rates[small, estimator]) / math.log(large / small)
        # The two scripts draw different resamples of the records.
        assert exponents.loc[(small, large, estimator), "exponent"] == pytest.approx(expected, abs=0.02)


def test_a_replayed_probe_is_judged_on_the_losses_that_gave_the_published_regrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    replay = importlib.import_module("probe_replay")
    cases = pd.read_csv(replay.HELD_BACK / "held_back.csv").to_dict("records")
    for case in cases:
        curve = replay.read_curve(case, replay.HELD_BACK / "cases" / f"{case['case']}.json")
        (cost,), _ = regrets_at(curve, np.array([case["tune, rate"]]))
        assert cost == pytest.approx(case["tune"], rel=1e-6)
    # Ten times the steps and sixteen times the probe's rank.
    case = cases[0] | {"rank": 128, "steps": 10_000, "probe_steps": 1_000, "probe_vertex": 1e-3}
    expected = 1e-3 * 10 ** CONSTANTS["steps_exponent"].value * 16 ** CONSTANTS["rank_exponent"].value
    assert replay.rates_of(case)["probe alone"] == pytest.approx(expected, rel=1e-9)
