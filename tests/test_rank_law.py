"""The published judgement of the rank's law, recomputed in a few lines, and a planted mechanism that it must find."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import rank_law  # noqa: E402

FOLDER = ROOT / "results" / "published" / "rank_law"


def test_the_power_law_s_error_on_models_left_out() -> None:
    """An independent path: slopes through centred logarithms, one model left out at a time."""
    table = pd.read_csv(rank_law.TABLES / "best_rates.csv")
    table = table[(table["source"] == "tinker") & (table["place"] == "inside") & (table["rank"] >= 4)]
    groups = []
    for _, rows in table.groupby("model"):
        x, y = np.log(rows["rank"]), np.log(rows["best_rate"])
        if len(rows) > 1:
            groups.append((np.array(x - x.mean()), np.array(y - y.mean())))
    total = 0.0
    for left_out in range(len(groups)):
        others = [group for index, group in enumerate(groups) if index != left_out]
        slope = sum(x @ y for x, y in others) / sum(x @ x for x, _ in others)
        x, y = groups[left_out]
        total += np.sum((y - slope * x) ** 2)
    published = pd.read_csv(FOLDER / "judgement.csv").set_index(["first_rank", "mechanism"])
    row = published.loc[(4, "power law")]
    assert row["models"] == len(groups)
    assert row["squared_error"] == pytest.approx(total, rel=0.01)  # the constant is chosen on a grid of 0.001
    assert published.loc[(4, "no dependence"), "squared_error"] == pytest.approx(sum(y @ y for _, y in groups))


def test_the_judgement_finds_a_planted_mechanism() -> None:
    """Best rates that follow the size, module by module, with small noise: the power law is worse, size is not."""
    random = np.random.default_rng(0)
    crossing_ranks = np.array([2.0, 8.0, 30.0])
    ranks = np.array([4, 16, 64, 128])
    rows = []
    for model in range(12):
        logs = [-0.5 * np.mean(np.log1p(crossing_ranks / rank)) for rank in ranks]
        rates = np.exp(random.normal() + np.array(logs) + 0.005 * random.normal(size=len(ranks)))
        rows += [
            {"model": model, "rank": r, "best_rate": e, "best_loss": 1.0} for r, e in zip(ranks, rates, strict=True)
        ]
    judged = rank_law.judge(pd.DataFrame(rows), crossing_ranks, 4).set_index("mechanism")
    assert judged.loc["size, module by module, no constant", "verdict"] == "better"
    assert judged.loc["no dependence", "verdict"] == "worse"
    assert judged.loc["size, module by module, w fitted", "constant"] == pytest.approx(1.0, rel=0.2)


def test_predictions_stand_beside_outcomes() -> None:
    """Both name the same models; the predictions of the size and of the curvature follow from the crossing ranks."""
    predictions = pd.read_csv(FOLDER / "predictions.csv")
    for model in rank_law.REGIMES:
        values = rank_law.crossing_ranks(model)
        rows = predictions[predictions["model"] == model].set_index(["mechanism", "constants"])["exponent"]
        size = 0.5 * np.log(np.mean(1 + values / 8) / np.mean(1 + values / 128)) / np.log(16)
        assert rows["size of the held-out change", "none"] == pytest.approx(size, abs=5e-4)
        curvature = np.log(np.mean(1 + values / 8) / np.mean(1 + values / 128)) / np.log(16)
        assert rows["curvature along cross-talk", "w = 1"] == pytest.approx(curvature, abs=5e-4)
    assert set(rank_law.outcomes()["model"]) == set(rank_law.REGIMES)
