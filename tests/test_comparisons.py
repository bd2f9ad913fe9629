"""The published comparisons of use_rslora and of batch sizes follow from the published runs."""

import importlib
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"
TABLES = {
    "use_rslora": ("use_rslora", ["best", "outcomes", "exponents", "regret", "policies"]),
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
    # From the table of best rates, so that a swap of the two curves shows.
    best = use_rslora["best"]
    best["setting"] = [f"rank {rank}, G {gain:.3g}" for rank, gain in zip(best["rank"], best["gain"], strict=True)]
    rates = best.set_index(["seed", "setting"])["best_rate"]
    outcomes = use_rslora["outcomes"].dropna(subset=["ratio"])
    assert len(outcomes) >= 2
    for row in outcomes.to_dict("records"):
        expected = rates[row["seed"], row["to"]] / rates[row["seed"], row["from"]]
        assert row["ratio"] == pytest.approx(expected, rel=1e-6)


def test_an_exponent_is_the_mean_log_ratio_of_the_seeds_over_the_log_change(
    use_rslora: dict[str, pd.DataFrame],
) -> None:
    outcomes, exponents = (use_rslora[name].set_index(["from", "to"]) for name in ("outcomes", "exponents"))
    # With use_rslora G grows as the square root of the rank at one alpha.
    changes = {
        ("rank 8, G 32", "rank 128, G 32"): 16.0,
        ("rank 32, G 32", "rank 32, G 181"): math.sqrt(32),
    }
    for pair, change in changes.items():
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
