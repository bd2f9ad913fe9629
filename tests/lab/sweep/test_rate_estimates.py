"""Best rates by the whole curve and by three points, over all tokens and over the answers."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rora_theory.lab.sweep import analysis, results
from rora_theory.lab.sweep.curves import rate_table, ratio_table
from rora_theory.lab.sweep.runs import Reading, ReadRun, SweepRun
from rora_theory.stats.rate_curves import Curve

RATES = [1e-3 * 10 ** (k / 4) for k in range(-2, 3)]
TOKENS, ANSWER_TOKENS = [50, 60, 70, 40] * 6, [4, 5, 6, 7] * 6


def two_losses(best: float, answer_best: float, *, seed: int = 0, rank: int = 8) -> list[SweepRun]:
    """Return runs with another best rate by the loss of the answers than by that of all tokens."""
    random, runs = np.random.default_rng(seed), []
    hard = np.exp(0.2 * random.normal(size=len(TOKENS)))
    for rate in RATES:
        readings = []
        for step in (16, 64):
            losses, answer_losses = (
                (1 + 0.1 * math.log10(rate / minimum) ** 2 + 1e-4 * random.normal(size=len(counts))) * hard * counts
                for minimum, counts in ((best, TOKENS), (answer_best, ANSWER_TOKENS))
            )
            readings.append(Reading(step, losses.tolist(), answer_losses.tolist()))
        runs.append(SweepRun(rank, 64.0, rate, seed, ReadRun([], readings), read_at=(16, 64)))
    return runs


def analysed(runs: list[SweepRun], **others) -> dict[str, pd.DataFrame]:
    shared = {"warmup": 0, "schedule": "constant"}
    return analysis.analyse(runs, {"": (TOKENS, ANSWER_TOKENS)}, shared, **others)


def test_both_losses_have_their_own_best_rate_with_an_interval() -> None:
    rates = analysed(two_losses(1e-3, 5e-4))["rates"].query("step == 64").set_index(["loss_on", "estimate"])
    for loss_on, best in (("all", 1e-3), ("answer", 5e-4)):
        for estimate in ("whole curve", "three points"):
            row = rates.loc[loss_on, estimate]
            assert row["best_rate"] == pytest.approx(best, rel=0.03)
            assert row["low"] < row["best_rate"] < row["high"] < 1.3 * row["low"]
            assert (row["seeds"], row["error_over"], row["edge"]) == (1, "held-out records", "")


@pytest.mark.parametrize(("loss_on", "best"), [("all", 1e-3), ("answer", 5e-4)])
def test_runs_are_judged_by_the_loss_that_they_learned(loss_on, best) -> None:
    """Best rates, regrets and the marked rates use the answers if the prompts were masked in training."""
    runs = [replace(run, loss_on=loss_on) for rank in (8, 128) for run in two_losses(1e-3, 5e-4, rank=rank)]
    higher = [replace(run, loss_on=loss_on, gain=128.0) for run in two_losses(2e-3, 1e-3)]
    judged = analysed([*runs, *higher])
    assert judged["best"].query("gain == 64")["best_rate"].to_numpy() == pytest.approx(best, rel=0.03)
    assert judged["regret"].query("old_gain == 64")["tuned_rate"].to_numpy() == pytest.approx(best, rel=0.03)
    # Losses are per token of those that were learned.
    assert judged["best"]["best_loss"].to_numpy() == pytest.approx(1.0, abs=0.1)
    difference = judged["one_rate"].query("step == 64")["difference"].iloc[0]
    squares = [math.log10(RATES[0] / minimum) ** 2 for minimum in (best, 2 * best)]
    assert difference == pytest.approx(0.1 * (squares[0] - squares[1]), rel=0.1)
    table = results.results_table([replace(run, key="k") for run in runs], {"": (TOKENS, ANSWER_TOKENS)})
    marked = table[table["best_rate"].notna()]
    assert marked["learning_rate"].to_numpy() == pytest.approx(min(RATES, key=lambda rate: abs(math.log(rate / best))))


def test_ratios_use_the_curves_of_other_runs_by_the_same_loss() -> None:
    others = {"batch_size 32": two_losses(2e-3, 5e-4)}
    ratios = analysed(two_losses(1e-3, 5e-4), other_runs=others)["ratios"].query("step == 64")
    ratios = ratios[ratios["compared_with"] == "batch_size 32"].set_index(["loss_on", "estimate"])
    assert ratios.loc["all", "whole curve"]["ratio"] == pytest.approx(0.5, rel=0.05)
    assert ratios.loc["answer", "whole curve"]["ratio"] == pytest.approx(1.0, rel=0.05)


def curve(losses: list[float], resampled: np.ndarray | None = None) -> Curve:
    settings = ("adamw", "both", "lora", 1.0, 8, 8.0)
    return Curve(*settings, np.array(RATES), np.array([losses]), resampled, (0,), 24)


def test_a_curve_without_a_minimum_gives_the_end_of_its_grid_and_three_points_no_interval() -> None:
    rising = np.exp(0.02 * np.arange(5.0))
    noise = 1 + 1e-4 * np.random.default_rng(0).normal(size=(200, 1, 5))
    table = rate_table({"all": [curve(rising.tolist(), rising * noise)]}, 64).set_index("estimate")
    assert table["best_rate"].to_numpy() == pytest.approx(RATES[0], rel=0.2)
    assert (table["edge"] == "low").all()
    assert math.isnan(table.loc["three points", "high"])


def test_without_curves_there_are_no_rows() -> None:
    assert rate_table({"all": []}, 64).empty
    assert ratio_table({"all": []}, 64).empty
