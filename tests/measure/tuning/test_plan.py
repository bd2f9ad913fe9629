"""The plan of a probe: its cost, the order of its runs, and resumption after an interruption."""

import math
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory.advice.best_rate import Run, best_rate_change
from rora_theory.errors import InputError
from rora_theory.evidence.starting_rates import starting_rate
from rora_theory.measure.tuning.belief import CURVATURE
from rora_theory.measure.tuning.plan import (
    LARGER_BUDGETS,
    PAIRED_ERROR,
    explain_useless_probe,
    make_plan,
    next_trial,
    scaled_warmup,
)
from rora_theory.measure.tuning.posterior import SEED_SPREAD
from rora_theory.measure.tuning.prior import REFERENCE, rate_prior
from rora_theory.measure.tuning.result import MAX_SEARCH_WIDTH, conclude, conclude_without_probe
from rora_theory.measure.tuning.trial import ProbeRun

TOKENS = (40, 60, 50, 30)
PUBLISHED = Path(__file__).parents[3] / "results" / "published"


def losses_at(rate, best, *, limit=math.inf, width=1.0):
    """Return summed losses of the records: the log loss is asymmetric in the log rate, steeper above the best one."""
    if rate > limit:
        return None
    distance = math.log2(rate / best) / width
    per_token = 1.2 * math.exp(0.02 * distance**2 + (0.01 * distance**3 if distance > 0 else 0.0))
    return tuple(per_token * size * (1 + 0.1 * index) for index, size in enumerate(TOKENS))


def probe(plan, factor=1.0, *, limit=math.inf, finished=()):
    """Run a probe on curves whose best rate is the prior's times a factor, transferred by the law of the advice."""
    runs = list(finished)
    while (trial := next_trial(plan, runs)) is not None:
        to_trial = best_rate_change(plan.run, plan.probe_run(trial.steps)).mean
        best = factor * math.exp(plan.prior.mean + to_trial)
        losses = losses_at(trial.learning_rate, best, limit=limit)
        runs.append(
            ProbeRun(trial.learning_rate, trial.steps, diverged_at=2)
            if losses is None
            else ProbeRun(trial.learning_rate, trial.steps, losses, (1.0, 0.5, 2.0))
        )
        assert len(runs) < 100
    return runs


def plan_of(steps, *, schedule="cosine", rank=128, **settings):
    run = Run(rank, 64.0, steps, schedule, 8)
    return make_plan(run, **{"probe_rank": 8, "batch_tokens": 1000, "held_out_tokens": 10_000} | settings)


def concluded(plan, runs):
    return conclude(plan, runs, TOKENS, config=None)


@pytest.mark.parametrize(
    ("steps", "factors"),
    [
        (180, (0.7, 1.0, 2.5)),
        (256, (0.3, 0.7, 1.0, 2.5)),
        (1000, (1 / 4, 1 / 3, 1.0, 2.5, 8.0)),
        (2000, (1 / 8, 1 / 3, 1.0, 2.5, 8.0)),
        (10_000, (1 / 30, 1 / 8, 1 / 3, 1.0, 2.5, 8.0, 30.0)),
        (200_000, (1 / 30, 1 / 8, 1 / 3, 1.0, 2.5, 8.0, 30.0)),
    ],
)
def test_a_probe_moves_towards_the_best_rate_within_its_budget(steps, factors) -> None:
    """The rate moves from the prior's towards the true one, and the range holds it where the prior's does."""
    plan = plan_of(steps)
    for factor in factors:
        runs = probe(plan, factor)
        assert plan.spent(runs) <= 0.1 * steps
        assert plan.probe_steps <= max(steps // 16, 5)
        result = concluded(plan, runs)
        assert result.cost.share <= 0.1
        assert (result.low, result.learning_rate, result.high) == result.posterior.belief.rates
        moved, true = math.log(result.posterior.factor), math.log(factor)
        assert abs(true - moved) <= abs(true) + 0.1, "no worse than the prior"
        assert moved * true >= -0.05
        if abs(true) > 1:
            assert moved / true > 0.1
        assert result.posterior.belief.spread < plan.prior.spread
        assert result.expected_regret < plan.prior.expected_regret
        assert result.displacement_constant == pytest.approx(128.0)


def test_a_short_run_costs_at_most_26_steps_of_256() -> None:
    plan = plan_of(256, batch_tokens=320, held_out_tokens=96 * 80)
    assert plan.spent(probe(plan)) <= 26
    assert plan.screen_steps is None
    assert plan.held_out_tokens(320) * 0.5 / 320 == pytest.approx(plan.evaluation_cost, rel=0.01)
    assert "25.6 training steps" in plan.sentence()


def test_screening_begins_where_a_third_of_a_run_is_long_enough() -> None:
    """At the default budget from 1,695 planned steps; the sentence states whether and how rates are screened."""
    plans = {steps: plan_of(steps) for steps in (256, 1000, 1694, 1695, 2000)}
    assert [steps for steps, plan in plans.items() if plan.screen_steps is not None] == [1695, 2000]
    for plan in plans.values():
        runs = probe(plan)
        if plan.screen_steps is None:
            assert {run.steps for run in runs} == {plan.probe_steps}
            assert "begins at 1,695 planned steps" in plan.sentence()
        else:
            assert {run.steps for run in runs} == {plan.screen_steps, plan.probe_steps}
            assert f"for {plan.screen_steps} steps" in plan.sentence()
        assert f"for {plan.probe_steps} steps" in plan.sentence()
        assert ("without screening" in plan.sentence()) is (plan.screen_steps is None)
    # At other budgets, and if a part of the budget is spent beforehand.
    for settings in ({"budget": 0.07}, {"budget": 0.2}, {"budget": 0.9}, {"setup_tokens": 20_000}):
        first = int(
            re.search(r"begins at ([\d,]+)", plan_of(380, **{"budget": 0.1} | settings).sentence())[1].replace(",", "")
        )
        shorter, longer = plan_of(first - 1, **settings), plan_of(first, **settings)
        assert (shorter.screen_steps, longer.screen_steps) == (None, 8)


def test_screening_shortens_most_runs() -> None:
    """Five rates or more have short runs; the best and its neighbours are trained longer."""
    plan = plan_of(2000)
    runs = probe(plan)
    short, full = ([run for run in runs if run.steps == steps] for steps in (plan.screen_steps, plan.probe_steps))
    assert len(short) >= 5
    assert 3 <= len(full) <= 4
    assert sum(run.steps for run in short) < sum(run.steps for run in full)


def test_divergence_counts_as_infinite_loss_and_higher_rates_are_not_trained() -> None:
    plan = plan_of(2000)
    limit = 0.3 * plan.learning_rate
    runs = probe(plan, limit=limit)
    lowest = min(run.learning_rate for run in runs if run.diverged_at is not None)
    for steps in (plan.screen_steps, plan.probe_steps):
        assert sum(run.learning_rate >= lowest for run in runs if run.steps == steps) <= 3
    result = concluded(plan, runs)
    assert result.posterior.factor < 0.9
    diverged = result.curve[result.curve["diverged_at"].notna()]
    assert diverged["held_out_loss"].eq(math.inf).all()
    assert diverged["stopped_early"].all()
    with pytest.raises(InputError, match="every run of the probe diverged"):
        concluded(plan_of(256), probe(plan_of(256), limit=0.0))


def test_equal_losses_at_every_rate_are_refused() -> None:
    plan = plan_of(256)
    runs = [ProbeRun(rate, plan.probe_steps, (1.0,) * len(TOKENS)) for rate in (1e-4, 1e-3)]
    with pytest.raises(InputError, match="same loss"):
        concluded(plan, runs)


@given(st.integers(0, 12), st.floats(0.1, 10))
def test_an_interrupted_probe_continues_with_the_same_runs(cut, factor) -> None:
    plan = plan_of(2000)
    runs = probe(plan, factor)
    stored = [ProbeRun.from_json(run.as_json()) for run in runs[:cut]]
    assert probe(plan, factor, finished=stored) == runs


@given(
    st.floats(40, 10_000), st.floats(0.02, 1.0), st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0.01, 100.0),
    st.lists(st.floats(0.1, 2.0), min_size=64, max_size=64),
)  # fmt: skip
def test_the_cost_is_within_the_budget(total, budget, batch_tokens, held_out_tokens, factor, sizes) -> None:
    """The cost counts the tokens of the steps that the runs take, and no step less than its number."""
    steps, step_tokens = math.ceil(total / budget), [size * batch_tokens for size in sizes]
    tokens = {"batch_tokens": batch_tokens, "held_out_tokens": held_out_tokens, "step_tokens": step_tokens}
    plan = plan_of(steps, **tokens, budget=budget)
    runs = probe(plan, factor)
    assert plan.spent(runs) <= budget * steps * (1 + 1e-9)
    lengths = [run.diverged_at or run.steps for run in runs]
    evaluations = sum(run.diverged_at is None for run in runs) * plan.evaluation_cost
    assert sum(lengths) + evaluations <= plan.spent(runs) * (1 + 1e-9)
    trained = sum(math.fsum(step_tokens[:length]) for length in lengths) / batch_tokens
    assert trained + evaluations <= plan.spent(runs) * (1 + 1e-9)
    assert plan.evaluation_cost <= 0.5 * held_out_tokens / batch_tokens * (1 + 1e-9)
    assert sum(run.steps == plan.probe_steps for run in runs) >= 3


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_grid_begins_at_the_prior_carried_to_the_probe(schedule) -> None:
    plan = plan_of(2000, schedule=schedule)
    assert plan.prior == rate_prior(plan.run)
    to_planned = best_rate_change(Run(8, 64.0, plan.probe_steps, schedule, 8), Run(128, 64.0, 2000, schedule, 8))
    assert plan.learning_rate * math.exp(to_planned.mean) == pytest.approx(plan.prior.rates.best)
    assert plan.learning_rate > plan.prior.rates.best, "shorter runs take higher rates"
    guess = plan_of(2000, learning_rate=2e-4, schedule=schedule)
    assert guess.prior.rates.best == pytest.approx(2e-4)
    assert guess.prior.spread == plan.prior.spread


def test_the_prior_is_the_public_sweeps_carried_to_the_planned_run() -> None:
    """At the sweeps' own run it is their rate; a larger model has a lower one; distance widens the spread."""
    small, large = (rate_prior(REFERENCE, parameters=parameters) for parameters in (1.0, 70.0))
    theirs = rate_prior(Run(16, 32.0, 780, "cosine", 128), parameters=1.0)
    assert theirs.mean == pytest.approx(starting_rate(parameters=1.0).log_mean, rel=1e-12)
    assert small.rates.best > large.rates.best
    assert 1e-4 < large.rates.best < 1e-3
    far = rate_prior(Run(8, 16.0, 20_000, "constant", 4), parameters=1.0)
    assert far.spread > small.spread
    change = best_rate_change(REFERENCE, Run(8, 16.0, 20_000, "constant", 4))
    assert far.mean == pytest.approx(small.mean + change.mean)
    assert far.spread == pytest.approx(math.hypot(small.spread, change.spread))
    assert rate_prior(REFERENCE, family="Qwen3", parameters=8.0).spread < rate_prior(REFERENCE, parameters=8.0).spread


def test_no_probe_gives_the_prior() -> None:
    prior = rate_prior(Run(128, 64.0, 2000, "cosine", 8))
    result = conclude_without_probe(prior, steps=2000, config=None)
    assert (result.low, result.learning_rate, result.high) == prior.rates
    assert (result.cost.spent, result.probe_steps, len(result.curve)) == (0, 0, 0)
    assert "probe" not in result.sentence()
    assert f"{prior.expected_regret:.4f} nats" in result.sentence()


def test_what_a_probe_is_expected_to_gain_is_stated_beforehand() -> None:
    """Precisions add: the prior's, and that of the fit, the seeds and the carry."""
    plan = plan_of(2000)
    records = plan.paired_error / (2 * CURVATURE * math.log(plan.spacing))
    variance = plan.carry.spread**2 + SEED_SPREAD**2 + 0.3**2 + records**2
    assert plan.expected_spread**-2 == pytest.approx(plan.prior.spread**-2 + 1 / variance)
    assert f"is expected to leave {0.5 * CURVATURE * plan.expected_spread**2:.4f}" in plan.sentence()
    assert f"expected regret of {plan.prior.expected_regret:.4f}" in plan.sentence()


def test_held_out_tokens_have_an_error_that_the_plan_counts() -> None:
    """Fewer tokens leave a higher regret; the needed number makes the error a third of the difference of one rate."""
    few, many = (plan_of(2000, held_out_tokens=tokens) for tokens in (200, 1e9))
    assert few.expected_regret > many.expected_regret
    assert few.paired_error == pytest.approx(PAIRED_ERROR / math.sqrt(200))
    difference = 0.5 * CURVATURE * math.log(few.spacing) ** 2
    assert PAIRED_ERROR / math.sqrt(few.needed_tokens) == pytest.approx(difference / 3, rel=1e-3)
    assert f"about {few.needed_tokens:,} are needed" in few.sentence()
    rich = plan_of(2000, held_out_tokens=1e9, batch_tokens=10_000)
    assert "are needed" not in rich.sentence()


def test_the_paired_error_is_that_of_the_published_runs() -> None:
    errors = pd.read_csv(PUBLISHED / "tune" / "paired_errors.csv").query("steps <= 64")["per_root_token"]
    assert errors.min() <= PAIRED_ERROR <= errors.max()


def explanation(run: Run, *, budget: float = 0.1, **settings) -> str | None:
    settings = {"probe_rank": 8, "batch_tokens": 1000, "held_out_tokens": 10_000} | settings
    return explain_useless_probe(make_plan(run, budget=budget, **settings), **settings)


def test_a_probe_that_cannot_beat_the_prior_is_explained_beforehand() -> None:
    """A run like those of the prior has no useful probe; a short one has one at a larger budget, which is named."""
    assert explanation(Run(128, 64.0, 2000, "cosine", 8)) is None
    like_the_prior = explanation(REFERENCE, batch_tokens=60_000, family="Qwen3", parameters=8.0)
    assert "not worth its cost; no budget up to the cost of the run (780 steps)" in like_the_prior
    large_batch, few_tokens = Run(128, 64.0, 1000, "cosine", 128), {"batch_tokens": 20}
    sentence = explanation(large_batch, **few_tokens)
    named = float(re.search(r"budget=([\d.]+) is expected to leave", sentence)[1])
    assert explanation(large_batch, budget=named, **few_tokens) is None
    smaller = [budget for budget in LARGER_BUDGETS if budget < named]
    assert len(smaller) >= 2
    assert all(explanation(large_batch, budget=budget, **few_tokens) for budget in smaller)


def test_a_range_that_is_too_wide_to_search_says_so() -> None:
    prior = rate_prior(Run(128, 64.0, 2000, "cosine", 8))
    for spread, is_wide in ((0.2, False), (1.5, True)):
        result = conclude_without_probe(replace(prior, spread=spread), steps=2000, config=None)
        assert (result.high / result.low > MAX_SEARCH_WIDTH) is is_wide
        assert ("too wide to search" in result.sentence()) is is_wide


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 100}, r"budget .*0\.18 .* 100 steps, got 0\.1"),
        ({"steps": 0}, "steps"),
        ({"budget": 1.5}, "budget"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"held_out_tokens": 0}, "held_out_tokens"),
    ],
)
def test_bad_input(settings, named) -> None:
    with pytest.raises(InputError, match=named):
        plan_of(**{"steps": 2000, "batch_tokens": 100, "held_out_tokens": 100} | settings)


def test_the_warm_up_of_a_probe_is_rounded_down() -> None:
    assert scaled_warmup(0, 2000, 28) == 0
    assert scaled_warmup(100, 2000, 39) == 1


def test_the_plot_shows_curve_and_range(tmp_path) -> None:
    """The method returns a figure that the caller saves, as for other measurements."""
    plan = plan_of(2000)
    result = concluded(plan, probe(plan, limit=4 * plan.learning_rate))
    figure = result.plot()
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert f"{plan.probe_steps} steps" in axis.get_legend_handles_labels()[1]
    assert result.plot(axis) is figure
    assert f"{result.learning_rate:.3g}" in result.sentence()
    figure.savefig(tmp_path / "probe.png")
    plt.close(figure)


def test_the_spread_between_seeds_is_that_of_the_published_runs() -> None:
    """It lies between the mean and the largest spread of runs with three seeds."""
    best = pd.read_csv(PUBLISHED / "horizon" / "best.csv")
    best = best[(best["seeds"] == 3) & (best["error_over"] == "seeds")]
    spreads = best["log2_error"] * np.sqrt(best["seeds"])
    assert len(spreads) >= 5
    assert spreads.mean() < SEED_SPREAD / math.log(2) < spreads.max()


def test_the_assumptions_state_the_law_s_exponents() -> None:
    plan = plan_of(2000)
    sentences = concluded(plan, probe(plan)).assumptions
    assert any(f"From {plan.probe_steps} to 2,000 steps" in sentence for sentence in sentences)
    assert any("rank 8" in sentence for sentence in sentences)
    same = plan_of(2000, rank=8)
    assert not any("rank 8" in sentence for sentence in concluded(same, probe(same)).assumptions)
