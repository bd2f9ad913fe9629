"""The mixed model of the best rates of several seeds, on data whose answer is known, and the grid of runs."""

import importlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy

from rora_theory.advice.best_rate import Run
from rora_theory.advice.constants import CONSTANTS
from rora_theory.stats.rate_curves import Curve

EFFECTS = np.array([-9.0, -7.5, -11.0])


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Find the scripts as ``python benchmarks/NAME.py`` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def fit_mixed(*arguments, **options):
    return importlib.import_module("gain_laws").fit_mixed(*arguments, **options)


def draw(seeds, *, seed_spread, residual_spread, errors=0.0, generator=0):
    """Return values, design, seeds and errors of three settings with every seed."""
    random = np.random.default_rng(generator)
    levels = random.normal(0, seed_spread, seeds)
    design = np.tile(np.eye(3), (seeds, 1))
    by_seed = np.repeat(np.arange(seeds), 3)
    noise = random.normal(0, np.hypot(residual_spread, errors), 3 * seeds)
    return design @ EFFECTS + levels[by_seed] + noise, design, by_seed.tolist(), np.full(3 * seeds, errors)


def test_with_all_seeds_the_differences_are_the_paired_ones():
    values, design, seeds, errors = draw(6, seed_spread=1.0, residual_spread=0.2)
    fit = fit_mixed(values, design, seeds, errors)
    table = values.reshape(6, 3)
    np.testing.assert_allclose(fit.effects, table.mean(axis=0), atol=1e-6)
    # The residual variance of the two-way table, of which a difference of two settings has twice a sixth.
    residuals = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    variance = (residuals**2).sum() / (5 * 2)
    contrast = fit.covariance[0, 0] + fit.covariance[1, 1] - 2 * fit.covariance[0, 1]
    assert contrast == pytest.approx(2 * variance / 6, rel=1e-3)
    assert fit.residual_spread == pytest.approx(math.sqrt(variance), rel=1e-3)
    # The mean square of the seeds exceeds that of the residuals by three times the variance of the seeds.
    between = 3 * np.var(table.mean(axis=1), ddof=1)
    assert fit.seed_spread**2 == pytest.approx((between - variance) / 3, rel=1e-3)


def test_known_errors_take_the_place_of_the_residual():
    values, design, seeds, errors = draw(40, seed_spread=0.5, residual_spread=0.0, errors=0.3)
    fit = fit_mixed(values, design, seeds, errors)
    without = fit_mixed(values, design, seeds, np.zeros_like(errors))
    # Of 78 degrees of freedom: a chance of about 1 in 1,000 beyond 3.3 standard deviations, here 0.08 of 0.3.
    assert without.residual_spread == pytest.approx(0.3, abs=0.08)
    assert fit.residual_spread < 0.15


def test_a_value_with_a_large_error_counts_little():
    values, design, seeds, errors = draw(5, seed_spread=0.1, residual_spread=0.05)
    errors = errors + 0.01
    values[0], errors[0] = values[0] + 5, 100.0
    fit = fit_mixed(values, design, seeds, errors)
    np.testing.assert_allclose(fit.effects, EFFECTS, atol=0.3)


def test_the_likelihood_is_that_of_a_normal_distribution():
    values, design, seeds, errors = draw(4, seed_spread=0.4, residual_spread=0.2, errors=0.1)
    fit = fit_mixed(values, design, seeds, errors, restricted=False)
    same = np.equal.outer(seeds, seeds)
    covariance = fit.seed_spread**2 * same + np.diag(fit.residual_spread**2 + errors**2)
    expected = scipy.stats.multivariate_normal(design @ fit.effects, covariance).logpdf(values)
    assert fit.log_likelihood == pytest.approx(expected, abs=1e-6)


def test_the_rates_of_a_setting_are_carried_from_the_pilot():
    grid = importlib.import_module("gain_grid")
    setting = grid.GridSetting(8, 32.0, "constant", 1024)
    assert grid.centre(0.004, 1024, setting) == pytest.approx(0.004, rel=1e-12)
    strong = grid.GridSetting(64, 2048.0, "constant", 1024)
    assert grid.centre(0.004, 1024, strong) == pytest.approx(0.004 * 64**-0.75 * 8**0.15, rel=1e-12)


@pytest.mark.parametrize("name", ["small", "medium", "smollm2", "gemma"])
def test_each_setting_of_a_design_is_run_once_and_compared_with_a_reference_of_as_many_steps(name):
    grid = importlib.import_module("gain_grid")
    design = grid.DESIGNS[name]
    settings = design.reduced + design.more
    assert len(set(settings)) == len(settings)
    assert set(design.compared) <= set(settings)
    for schedule in grid.SCHEDULES:
        compared = [setting for setting in design.compared if setting.schedule == schedule]
        assert {setting.steps for setting in compared} == {design.steps(schedule)}
        assert grid.GridSetting(8, 32.0, schedule, design.steps(schedule)) in compared


def test_predictions_over_steps_are_powers_with_the_spread_of_the_advice():
    grid = importlib.import_module("gain_grid")
    rows = {(row["to"], row["law"]): row for row in grid.step_predictions((64, 256, 4096), {"own": -0.25})}
    assert rows["256 steps", "own"]["prediction"] == pytest.approx(4**-0.25, rel=1e-12)
    assert rows["4096 steps", "own"]["prediction"] == pytest.approx(0.5, rel=1e-12)
    assert rows["4096 steps", "keep the rate"]["prediction"] == 1
    steps = CONSTANTS["steps_exponent"]
    advice = rows["4096 steps", f"T^{steps.value:.2g}"]
    bounds = [advice[name] for name in ("low", "prediction", "high")]
    expected = [16 ** (steps.value + shift) for shift in (-steps.spread, 0, steps.spread)]
    np.testing.assert_allclose(bounds, expected, rtol=1e-12)


def parabola(best):
    """Return a curve over rates with the given best one: a factor of 4 costs 2."""
    rates = 2.0 ** np.arange(-14, -5)
    losses = 0.5 * np.log2(rates / best)[None, :] ** 2 + 3
    return Curve("adamw", "both", "lora", 1.0, 8, 4.0, rates, losses, seeds=(0,))


def test_rates_far_above_the_best_one_move_the_whole_curve_and_not_the_rate_near_the_minimum():
    laws, grid = importlib.import_module("gain_laws"), importlib.import_module("gain_grid")
    x = np.arange(-8, 9) / 2
    # A cubic up to 2 octaves above the minimum, and steeper beyond; the rates reach 4 octaves to either side.
    losses = np.exp(0.02 * x**2 + 0.004 * x**3 + 0.05 * np.where(x > 2, x - 2, 0.0) ** 3)[None]
    wide = Curve("adamw", "both", "lora", 1.0, 8, 4.0, 2.0**x, losses, seeds=(0,))
    narrow = replace(wide, rates=2.0 ** x[4:13], losses=losses[:, 4:13])
    setting = grid.GridSetting(8, 4.0, "constant", 64)
    of_wide, of_narrow = (
        laws.best_rows({0: {setting: curve}}).set_index("estimator")["best_rate"] for curve in (wide, narrow)
    )
    assert [of_wide["near the minimum"], of_narrow["near the minimum"]] == pytest.approx([1, 1], abs=2e-3)
    assert of_wide["whole curve"] < 0.8 < of_narrow["whole curve"]
    # The parabola through three points takes the steeper side for a lower best rate.
    assert of_narrow["three points"] < 0.99


def test_a_power_of_the_steps_is_judged_at_the_rate_that_the_other_seeds_tuned():
    laws = importlib.import_module("gain_laws")
    grid = importlib.import_module("gain_grid")
    design = replace(grid.DESIGNS["small"], read_at=(64, 256))
    setting = partial(grid.GridSetting, 8, 32.0, "constant")
    # The best rate falls as T^-0.5. The second seed's own best rate after 64 steps would mislead it.
    seeds = {
        seed: {setting(64): parabola(2.0**-9 * shift), setting(256): parabola(2.0**-10)}
        for seed, shift in ((0, 1.0), (1, 4.0), (2, 1.0))
    }
    rows = laws.steps_regret_rows(seeds, design).set_index(["seed", "policy"])
    assert set(rows["tuned_on"]) == {"other seeds"}
    assert rows.loc[(1, "T^-0.5"), "regret"] == pytest.approx(0, abs=1e-9)
    assert rows.loc[(1, "keep the rate"), "regret"] == pytest.approx(0.5, abs=1e-9)
    # Seed 0 is judged at the mean of the others, one of which is 4 times too high: a factor of 2.
    assert rows.loc[(0, "T^-0.5"), "regret"] == pytest.approx(0.5, abs=1e-9)


def test_the_regret_of_a_predicted_ratio_is_at_the_rate_carried_from_its_first_setting():
    laws, grid = importlib.import_module("gain_laws"), importlib.import_module("gain_grid")
    old, new = grid.GridSetting(8, 4.0, "constant", 1024), grid.GridSetting(64, 4.0, "constant", 1024)
    large = grid.GridSetting(8, 4.0, "constant", 1024, batch_size=64)
    # The best rate grows fourfold with either change.
    best = {old: 2.0**-11, new: 2.0**-9, large: 2.0**-9}
    seeds = {seed: {setting: parabola(rate) for setting, rate in best.items()} for seed in (0, 1, 2)}
    pairs = [{"change": "rank", "to": new.name}, {"change": "batch", "to": large.name}]
    predictions = pd.DataFrame([pair | {"schedule": "constant", "from": old.name} for pair in pairs])
    rows = laws.regret_rows(seeds, predictions, 200.0, grid.DESIGNS["small_more"])
    costs = rows[rows["seed"] == 1].set_index(["to", "policy"])["regret"]
    # A factor of 4 costs 2 nats; the square root of 16 gives it, and r^0.15 gives 8^0.15.
    assert costs[large.name, "keep the rate"] == pytest.approx(2, abs=1e-6)
    assert costs[large.name, "B^0.5"] == pytest.approx(0, abs=1e-6)
    assert costs[new.name, "keep the rate"] == pytest.approx(2, abs=1e-6)
    power = CONSTANTS["rank_exponent"].value
    assert costs[new.name, "advice"] == pytest.approx(0.5 * (2 - 3 * power) ** 2, abs=0.05)
    # At one G all laws without the rank keep the rate, and one row says so.
    assert list(costs[new.name].index) == ["keep the rate", "advice"]


def test_the_settings_with_use_rslora_share_an_alpha_and_are_compared_with_each_other():
    grid = importlib.import_module("gain_grid")
    design = grid.DESIGNS["small_more"]
    pairs = [(old, new) for change, old, new in grid.more_comparisons() if change == "use_rslora"]
    assert len(pairs) == 4
    for setting in {setting for pair in pairs for setting in pair}:
        assert setting.gain / math.sqrt(setting.rank) == pytest.approx(32, rel=1e-12)
        assert setting in design.reduced


def test_every_compared_setting_is_run_here_or_in_the_design_of_five_seeds():
    grid = importlib.import_module("gain_grid")
    run = {*grid.DESIGNS["small"].reduced, *grid.DESIGNS["small_more"].reduced, *grid.DESIGNS["small_more"].more}
    for _, old, new in grid.more_comparisons():
        assert {old, new} <= run


@pytest.mark.parametrize(("design", "steps"), [("long_gains", 4096), ("longest_gains", 16384)])
def test_the_long_runs_over_g_have_the_reference_of_the_long_runs_and_the_constant_of_the_pilot(design, steps):
    grid = importlib.import_module("gain_grid")
    assert {setting.steps for setting in grid.DESIGNS[design].compared} == {steps}
    folder = grid.PUBLISHED / "small_long"
    rate, constants = grid.read_pilot(folder, steps)
    best = pd.read_csv(folder / "best.csv").query(f"estimator == 'three points' and steps == {steps}")["best_rate"]
    assert rate == pytest.approx(math.exp(np.log(best).mean()), rel=1e-12)
    pilot = pd.read_csv(grid.PUBLISHED / "small_models" / "pilot.csv").set_index("quantity")["value"]
    assert constants[0] == pilot["displacement constant"]
    assert constants[1] < constants[0] < constants[2]


def test_an_exponent_in_the_steps_is_the_slope_from_the_fewest_to_the_most():
    folders = importlib.import_module("sweep_folders")
    rates = pd.Series([0.25, 1.0, 0.9], index=[1024, 64, 256])
    assert folders.exponent_in_steps(rates) == pytest.approx(-0.5, rel=1e-12)


def test_the_constants_of_the_advice_come_from_the_runs_that_their_coverage_counts():
    """Later runs are tests of the constants, and no part of them."""
    script = importlib.import_module("advice_constants")
    law = {name: CONSTANTS[name].value for name in ("rank_exponent", "displacement_constant")}
    pairs = script.pairs_of(script.our_best_rates(), **law)
    counts = pd.Series([pair.model for pair in pairs if not script.is_at_one_gain(pair)]).value_counts()
    published = pd.read_csv(script.PUBLISHED / "constants" / "coverage.csv").query("judged_by == 'own spread'")
    assert counts.to_dict() == published.set_index("model")["pairs"].to_dict()


def test_later_seeds_are_no_part_of_the_constants():
    constants, policies = (importlib.import_module(name) for name in ("advice_constants", "gain_policies"))
    folder = policies.PUBLISHED / "gain_seeds" / "gemma"
    best = pd.read_csv(folder / "best.csv").query("estimator == 'three points' and seed == 0").set_index("gain")
    ours = {rate.gain: rate.log_rate for rate in constants.our_best_rates() if rate.model == "Gemma 3 270M"}
    for gain in (4.0, 2048.0):
        assert ours[gain] == pytest.approx(math.log(best.loc[gain, "best_rate"]), rel=1e-12)
    # All ordered pairs of the four G of one seed.
    assert len(policies.seeded_pairs("gemma", "constant", "gain_seeds/gemma")) == 4 * 3


def test_later_runs_are_judged_with_constants_of_other_models_and_enter_no_other_table():
    policies = importlib.import_module("gain_policies")
    pair = policies.Pair(Run(8, 32.0), Run(8, 128.0), 2.0**-9, 2.0**-10, parabola(2.0**-10))
    rows = [("power of G", "ours", 0.5), ("power of G", "other", 1.0)]
    rows += [("displacement law", "ours", 10.0), ("displacement law", "other", 1e9)]
    own = pd.DataFrame(rows, columns=["law", "model", "constant"])
    table = policies.judged({"ours": {"later": [pair]}}, own).set_index("law")
    # At four times G the power 1 of the other model gives a quarter of the rate, and the best is a half: an octave.
    assert table.loc["power of G", "mean"] == pytest.approx(0.5, abs=1e-6)
    assert table.loc["first step", "mean"] == pytest.approx(0.5, abs=1e-6)
    # Far below the other model's K the law is the square root, which is right here.
    assert table.loc["displacement law", "mean"] == pytest.approx(0, abs=1e-4)
    published = pd.read_csv(policies.PUBLISHED / "gain_policies" / "policies.csv")
    tests = pd.read_csv(policies.PUBLISHED / "gain_policies" / "tests.csv")
    keys = [set(zip(frame["model"], frame["runs"], strict=True)) for frame in (published, tests)]
    assert keys[0].isdisjoint(keys[1])


def test_a_pair_over_g_has_one_schedule_batch_and_number_of_steps():
    policies = importlib.import_module("gain_policies")
    old = Run(8, 32.0, 64, "constant", 4)
    assert policies.is_pair(old, replace(old, gain=64.0, rank=2))
    assert policies.is_pair(old, replace(old, gain=16.0))
    assert not policies.is_pair(old, replace(old, gain=33.0)), "no change of G"
    for other in ({"steps": 256}, {"schedule": "cosine"}, {"batch_size": 16}):
        assert not policies.is_pair(old, replace(old, gain=64.0, **other))


def test_policies_of_one_rate_have_one_factor_under_the_first_name():
    folders = importlib.import_module("sweep_folders")
    by_name = {
        "keep": lambda old, new, rate: rate,
        "root": lambda old, new, rate: rate * (new.gain / old.gain) ** 0.5,
        "none": lambda old, new, rate: rate * (new.gain / old.gain) ** 0,
    }
    assert folders.distinct_factors(by_name, Run(8, 4.0), Run(8, 16.0)) == {"keep": 1, "root": 2}
    assert folders.distinct_factors(by_name, Run(8, 4.0), Run(2, 4.0)) == {"keep": 1}


def test_every_set_of_runs_and_every_model_has_the_same_weight():
    law_regrets = importlib.import_module("law_regrets")

    # Keeping the rate costs half the square of the distance in octaves.
    def pairs(octaves, count):
        pair = law_regrets.Pair(
            Run(8, 4.0), Run(8, 16.0), 2.0**-9, 2.0 ** (octaves - 9), parabola(2.0 ** (octaves - 9))
        )
        return [pair] * count

    table = {"one": {"few": pairs(1, 1), "many": pairs(2, 9)}, "two": {"few": pairs(0, 2)}}
    judged = law_regrets.judge(table, lambda model: {"keep": (lambda old, new: 1.0, 0.0)})
    totals = law_regrets.with_totals(judged).query("runs == 'all'").set_index("model")
    assert totals["mean"].to_dict() == pytest.approx({"one": (0.5 + 2) / 2, "two": 0, "all models": 0.625}, abs=1e-6)
    assert totals["pairs"].to_dict() == {"one": 10, "two": 2, "all models": 12}
    assert totals.loc["all models", "largest"] == pytest.approx(2, abs=1e-6)


def test_a_ratio_by_the_answers_is_of_the_rates_that_are_best_by_the_answers():
    laws, grid = (importlib.import_module(name) for name in ("gain_laws", "gain_grid"))
    old, new = grid.GridSetting(8, 32.0, "constant", 1024), grid.GridSetting(8, 256.0, "constant", 1024)
    best = {"all": {old: 2.0**-9, new: 2.0**-11}, "answer": {old: 2.0**-9, new: 2.0**-10}}
    tables = {
        loss_on: laws.best_rows({seed: {key: parabola(rate) for key, rate in rates.items()} for seed in (0, 1)})
        for loss_on, rates in best.items()
    }
    predictions = pd.DataFrame([{"schedule": "constant", "change": "G", "from": old.name, "to": new.name}])
    table = laws.token_rows(tables, predictions, grid.DESIGNS["small"]).set_index(["estimator", "loss_on"])
    assert table.loc[("three points", "all"), "ratio"] == pytest.approx(1 / 4, rel=1e-6)
    assert table.loc[("three points", "answer"), "ratio"] == pytest.approx(1 / 2, rel=1e-6)
    assert set(table["seeds"]) == {2}


def test_the_lowest_losses_over_g_are_compared_at_one_rank_by_seed_and_inside_the_rates():
    laws, grid = (importlib.import_module(name) for name in ("gain_laws", "gain_grid"))
    low, high, other = (
        grid.GridSetting(rank, gain, "constant", 64) for rank, gain in ((8, 32.0), (8, 256.0), (64, 256.0))
    )

    def raised(best, by):
        return replace(parabola(best), losses=parabola(best).losses + by)

    # At G = 256 the lowest loss is 0.2 and 0.3 lower; the third seed's best rate is the lowest one.
    curves = {
        seed: {low: raised(2.0**-9, level), high: raised(best, level - gain), other: raised(2.0**-10, level - 1)}
        for seed, level, gain, best in ((0, 0.0, 0.2, 2.0**-11), (1, 5.0, 0.3, 2.0**-11), (2, 0.0, 3.0, 2.0**-15))
    }
    (row,) = laws.lowest_loss_rows(curves).to_dict("records")
    assert (row["rank"], row["gain"], row["seeds"], row["left_out"]) == (8, 256.0, 2, 1)
    assert row["difference"] == pytest.approx(-0.25)
    # Student's t of two seeds is 12.7, and the standard error 0.05.
    assert row["half_width"] == pytest.approx(12.7062 * 0.05 + row["grid_error"], rel=1e-4)
    assert row["grid_error"] > 0
    assert row["verdict"] == "undecided"
    pair = {seed: {low: curves[0][low], high: raised(2.0**-11, -2 - seed / 100)} for seed in range(3)}
    assert list(laws.lowest_loss_rows(pair)["verdict"]) == ["lower"]
    assert not len(laws.lowest_loss_rows({0: {low: curves[0][low]}}))
