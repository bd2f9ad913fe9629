"""The choice of the exponent in the number of steps: by its cost, on models that gave none."""

import importlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.advice.best_rate import Run
from rora_theory.advice.constants import CONSTANTS, EVIDENCE
from rora_theory.stats.rate_curves import Curve


@pytest.fixture
def steps(monkeypatch):
    """Find the scripts as ``python benchmarks/NAME.py`` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("steps_policies")


def parabola(best, cost=1.0):
    """Return a curve over rates with the given best one, where a factor of 2 costs about `cost`."""
    rates = 2.0 ** np.arange(-16, -3)
    losses = cost * np.log2(rates / best)[None, :] ** 2 + 300
    return Curve("adamw", "both", "lora", 1.0, 8, 4.0, rates, losses, seeds=(0,))


def after(steps, rank=8):
    """Return a setting after a number of steps."""
    return Run(rank, 32.0, steps)


def model(steps, exponent, *, cost=1.0, growth=16):
    """Return a model's pairs, of which the best rate falls as a power of the number of steps."""
    curves = {after(64): parabola(2.0**-8, cost), after(64 * growth): parabola(2.0**-8 * growth**exponent, cost)}
    return {"runs": steps.pairs_of(curves.items(), steps.is_pair)}


def test_a_pair_is_one_setting_after_fewer_and_more_steps(steps):
    curve, edge = parabola(2.0**-8), parabola(2.0**-16)
    curves = dict.fromkeys((after(64), after(256), after(1024), after(64, rank=2), after(16)), curve)
    pairs = steps.pairs_of((curves | {after(256, rank=2): edge}).items(), steps.is_pair)
    assert sorted(steps.growth(pair.old, pair.new) for pair in pairs) == [4, 4, 16]
    # Every pair is carried upwards.
    falling = {after(64): parabola(2.0**-7), after(256): parabola(2.0**-8)}
    (pair,) = steps.pairs_of(falling.items(), steps.is_pair)
    assert steps.exponent(pair) == pytest.approx(-0.5, abs=1e-6)
    assert pair.regret(steps.power_of_steps(-0.5))[0] == pytest.approx(0, abs=1e-6)
    assert pair.regret(steps.power_of_steps(0.0)) == (pytest.approx(1, rel=0.02), False)
    assert pair.regret(steps.power_of_steps(9.0))[1], "far outside of the rates"


def test_the_dearer_model_decides_and_is_judged_without_itself(steps):
    pairs = {"steep": model(steps, -0.5), "flat": model(steps, -0.25, cost=30.0)}
    scanned = steps.scan(pairs, steps.FAMILIES)
    own = steps.own_exponents(pairs, scanned)
    by_way = own.set_index(["model", "way"])["power"]
    for name, exponent in (("steep", -0.5), ("flat", -0.25)):
        assert by_way[name, "lowest regret"] == pytest.approx(exponent)
        assert by_way[name, "mean exponent"] == pytest.approx(exponent, abs=0.01)
    chosen = steps.ways(scanned, own)
    assert chosen["lowest regret"] == pytest.approx(-0.25, abs=0.026), "thirty times the cost of the other"
    assert chosen["mean of best"] == pytest.approx(-0.375)
    assert chosen["mean exponent"] == pytest.approx(-0.375, abs=0.01)
    policies = steps.judged(pairs, scanned, own)
    fitted = policies[policies["runs"] == "runs"].set_index(["model", "policy"])["power"]
    assert fitted["steep", "lowest regret"] == pytest.approx(-0.25)
    assert fitted["flat", "lowest regret"] == pytest.approx(-0.5)
    # With two models all three ways swap the exponents; the mean over models has the same weight for each.
    means = policies[policies["model"] == "all models"].set_index("policy")["mean"]
    assert means["lowest regret"] == pytest.approx((1 + 30) / 2, rel=0.02)


def test_the_way_with_the_lowest_regret_on_models_left_out_is_chosen(steps):
    rows = [("all models", "keep the rate", 0.0), ("all models", "mean of best", 0.2), ("one", "mean exponent", 0.0)]
    rows += [("all models", "mean exponent", 0.3), ("all models", "lowest regret", 0.1)]
    policies = pd.DataFrame(rows, columns=["model", "policy", "mean"])
    assert steps.chosen_way(policies) == "lowest regret"
    policies["mean"] = [0.0, 0.05, 0.0, 0.3, 0.1]
    assert steps.chosen_way(policies) == "mean of best"


def test_the_range_of_the_others_holds_a_pair_up_to_its_ends(steps):
    exponents = {"a": -0.2, "b": -0.4, "c": -0.3, "far": -0.9}
    pairs = {name: model(steps, exponent) for name, exponent in exponents.items()}
    scanned = steps.scan(pairs, steps.FAMILIES)
    own = steps.own_exponents(pairs, scanned)
    assert steps.spread_over_models(own[own["model"] != "far"], -0.3) == pytest.approx(math.sqrt(0.02 / 2), rel=0.01)
    table = steps.coverage(pairs, scanned, own, "mean exponent").set_index("model")
    assert table["coverage"].to_dict() == {"a": 1.0, "b": 1.0, "c": 1.0, "far": 0.0}
    assert table.loc["far", "power"] == pytest.approx(-0.3, abs=0.01)


def test_the_published_exponent_is_the_chosen_one_with_the_extremes_of_its_models(steps):
    folder = steps.PUBLISHED / "steps_policies"
    policies, exponents = (pd.read_csv(folder / f"{name}.csv") for name in ("policies", "exponents"))
    table = exponents[exponents["estimator"] == "three points"].set_index(["way", "model"])["power"]
    constant = CONSTANTS["steps_exponent"]
    assert constant.value == pytest.approx(table[steps.chosen_way(policies), "all models"])
    own = table["mean exponent"].drop("all models")
    assert constant.spread == pytest.approx(math.sqrt(((own - constant.value) ** 2).sum() / 3))
    assert [EVIDENCE[f"steps_{name}"]["power"] for name in ("steepest", "flattest")] == [own.min(), own.max()]
    # As the sentence of the advice says.
    assert set(own.nsmallest(2).index) == {"SmolLM2-135M", "Gemma 3 270M"}


def test_the_published_regrets_come_from_the_published_runs(steps):
    """Recomputed for the runs of SmolLM2 and Gemma; without the readings at the edge of their rates."""
    folders = {
        ("SmolLM2-135M", "constant"): ("horizon", (64, 256)),
        ("Gemma 3 270M", "cosine"): ("horizon_gemma_cosine", (256, 1024)),
    }
    pairs = {
        key: steps.pairs_of(steps.curves_after(steps.PUBLISHED / folder, numbers).items(), steps.is_pair)
        for key, (folder, numbers) in folders.items()
    }
    table = pd.read_csv(steps.PUBLISHED / "steps_policies" / "policies.csv").set_index(["model", "runs", "policy"])
    for (name, runs), chosen in pairs.items():
        costs = [pair.regret(steps.power_of_steps(-0.25))[0] for pair in chosen]
        row = table.loc[(name, runs, "T^-0.25")]
        assert (row["pairs"], row["mean"], row["largest"]) == (
            len(costs),
            pytest.approx(np.mean(costs), abs=1e-9),
            pytest.approx(max(costs), abs=1e-9),
        )


@pytest.mark.parametrize(("power", "exponent"), [(1.0, -0.5), (0.25, -0.2)])
def test_a_loss_of_two_terms_has_the_exponent_that_one_rate_gives(steps, power, exponent):
    """L = 1 + (eta T)^-s / 5 + 20 eta on a dense grid: s is that of the formula, and the best rates fall as it says."""
    rates = 2.0 ** np.arange(-12, 0, 0.25)
    curves = {}
    for number in (16, 64, 256):
        losses = 1 + (rates * number) ** -power / 5 + 20 * rates
        curves[after(number)] = Curve("adamw", "both", "lora", 1.0, 8, 4.0, rates, losses[None], seeds=(0,))
    (row,) = steps.two_term_rows("model", curves)
    assert (row["from_steps"], row["to_steps"]) == (16, 256)
    assert row["fall"] == pytest.approx(power, rel=1e-9)
    assert row["two_terms"] == pytest.approx(exponent, rel=1e-9)
    assert row["measured"] == pytest.approx(exponent, abs=0.02)


def test_the_summary_has_each_models_exponent_by_both_estimators(steps):
    published = steps.PUBLISHED / "steps_policies"
    summary = pd.read_csv(published / "summary.csv").set_index("model").drop("all models")
    table = pd.read_csv(published / "exponents.csv").query("way == 'mean exponent' and model != 'all models'")
    exponents = table.pivot(index="model", columns="estimator", values="power").loc[summary.index]
    np.testing.assert_allclose(summary["exponent"], exponents["three points"], rtol=1e-12)
    np.testing.assert_allclose(summary["exponent_whole_curve"], exponents["whole curve"], rtol=1e-12)
