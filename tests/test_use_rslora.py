"""The published comparison of use_rslora with its predictions follows from the published runs."""

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published" / "use_rslora"


def test_outcomes_follow_from_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import use_rslora

    folder = tmp_path / "use_rslora"
    shutil.copytree(PUBLISHED, folder)
    for name in ("best.csv", "outcomes.csv"):
        (folder / name).unlink()
    monkeypatch.setattr(sys, "argv", ["use_rslora.py", "--out", str(folder)])
    use_rslora.main()
    for name in ("best.csv", "outcomes.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(folder / name), pd.read_csv(PUBLISHED / name), rtol=1e-5)


def test_a_ratio_is_the_second_best_rate_over_the_first() -> None:
    # From the table of best rates, so that a swap of the two curves shows.
    best = pd.read_csv(PUBLISHED / "best.csv")
    best["setting"] = [f"rank {rank}, G {gain:.3g}" for rank, gain in zip(best["rank"], best["gain"], strict=True)]
    rates = best.set_index(["seed", "setting"])["best_rate"]
    outcomes = pd.read_csv(PUBLISHED / "outcomes.csv").dropna(subset=["ratio"])
    assert len(outcomes) >= 2
    for row in outcomes.to_dict("records"):
        expected = rates[row["seed"], row["to"]] / rates[row["seed"], row["from"]]
        assert row["ratio"] == pytest.approx(expected, rel=1e-6)
