"""The plan of a probe: its cost, the order of its runs, and resumption after an interruption."""

import itertools
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

from rora_theory.advice import measured
from rora_theory.errors import InputError
from rora_theory.measure.tuning import curve
from rora_theory.measure.tuning.curve import SEED_DEGREES, SEED_LOG2_ERROR, fit_best_rate
from rora_theory.measure.tuning.plan import (
    ProbeRun,
    carry_steps,
    make_plan,
    next_trial,
    scaled_warmup,
)
from rora_theory.measure.tuning.result import conclude, expected_regret, rank_factors

TOKENS = (40, 60, 50, 30)
PUBLISHED = Path(__file__).parents[3] / "results" / "published"


def losses_at(rate, best, *, limit=math.inf, width=1.0):
    """Return summed losses of the records: the log loss is asymmetric in the log rate, steeper above the best one."""
    if rate > limit:
        return None
    distance = math.log2(rate / best) / width
    per_token = 1.2 * math.exp(0.02 * distance**2 + (0.01 * distance**3 if distance > 0 else 0.0))
    return tuple(per_token * size * (1 + 0.1 * index) for index, size in enumerate(TOKENS))


def probe(plan, best_at_64, *, limit=math.inf, finished=()):
    """Run a probe on curves whose best rate depends on the steps as in `carry_steps`."""
    runs = list(finished)
    while (trial := next_trial(plan, runs)) is not None:
        best = carry_steps(best_at_64, 64, trial.steps, plan.schedule).best
        losses = losses_at(trial.learning_rate, best, limit=limit)
        runs.append(
            ProbeRun(trial.learning_rate, trial.steps, diverged_at=2)
            if losses is None
            else ProbeRun(trial.learning_rate, trial.steps, losses, (1.0, 0.5, 2.0))
        )
        assert len(runs) < 100
    return runs


def plan_of(steps, **settings):
    return make_plan(steps, 64.0, **{"batch_tokens": 1000, "held_out_tokens": 10_000} | settings)


def best_at_64(plan, factor):
    """Return the best rate of 64 steps that differs by a factor from the one that the probe expects."""
    return factor * carry_steps(plan.learning_rate, plan.probe_steps, 64, plan.schedule).best


def concluded(plan, runs, rank=128):
    return conclude(plan, runs, TOKENS, config=None, rank=rank, probe_rank=8)


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
def test_a_probe_finds_the_best_rate_within_its_budget(steps, factors) -> None:
    """The regret is below 0.003 nats, though the best rate lies elsewhere than the probe expects, even where the grid
    has to be extended."""
    plan = plan_of(steps)
    for factor in factors:
        runs = probe(plan, best_at_64(plan, factor))
        assert plan.spent(runs) <= 0.1 * steps
        assert plan.probe_steps <= max(steps // 16, 5)
        result = concluded(plan, runs)
        assert result.cost.share <= 0.1
        true = carry_steps(best_at_64(plan, factor), 64, steps, plan.schedule).best
        assert result.probe.edge == ""
        assert result.low < true < result.high
        at_best, at_advised = (sum(losses_at(rate, true)) / sum(TOKENS) for rate in (true, result.learning_rate))
        assert at_advised - at_best < 0.003, (factor, true, result.learning_rate)
        assert result.displacement_constant == pytest.approx(128.0)


def test_a_short_run_costs_at_most_26_steps_of_256() -> None:
    plan = plan_of(256, batch_tokens=320, held_out_tokens=96 * 80)
    assert plan.spent(probe(plan, 8e-4)) <= 26
    assert plan.screen_steps is None
    assert plan.held_out_tokens(320) * 0.5 / 320 == pytest.approx(plan.evaluation_cost, rel=0.01)
    assert "25.6 training steps" in plan.sentence()


def test_screening_begins_where_a_third_of_a_run_is_long_enough() -> None:
    """At the default budget from 1,695 planned steps; the sentence states whether and how rates are screened."""
    plans = {steps: plan_of(steps) for steps in (256, 1000, 1694, 1695, 2000)}
    assert [steps for steps, plan in plans.items() if plan.screen_steps is not None] == [1695, 2000]
    for plan in plans.values():
        runs = probe(plan, best_at_64(plan, 1.0))
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
    runs = probe(plan, 8e-4)
    short, full = ([run for run in runs if run.steps == steps] for steps in (plan.screen_steps, plan.probe_steps))
    assert len(short) >= 5
    assert 3 <= len(full) <= 4
    assert sum(run.steps for run in short) < sum(run.steps for run in full)


@pytest.mark.parametrize(("factor", "edge"), [(1 / 100, "low"), (100.0, "high")])
def test_an_edge_that_remains_at_the_end_of_the_budget_is_reported(factor, edge) -> None:
    plan = plan_of(256)
    result = concluded(plan, probe(plan, best_at_64(plan, factor)), rank=8)
    assert result.probe.edge == edge
    assert any(f"at the {edge} end" in sentence for sentence in result.assumptions)
    assert f"at the {edge} end" in result.sentence()
    assert result.expected_regret.is_edge
    assert result.high / result.low > 16


def test_divergence_counts_as_infinite_loss_and_higher_rates_are_not_trained() -> None:
    plan = plan_of(2000)
    limit = 0.3 * plan.learning_rate
    runs = probe(plan, 8e-4, limit=limit)
    lowest = min(run.learning_rate for run in runs if run.diverged_at is not None)
    for steps in (plan.screen_steps, plan.probe_steps):
        assert sum(run.learning_rate >= lowest for run in runs if run.steps == steps) <= 3
    result = concluded(plan, runs)
    assert result.probe.learning_rate <= limit
    diverged = result.curve[result.curve["diverged_at"].notna()]
    assert diverged["held_out_loss"].eq(math.inf).all()
    assert diverged["stopped_early"].all()
    with pytest.raises(InputError, match="every run of the probe diverged"):
        fit_best_rate(plan_of(256), probe(plan_of(256), 8e-4, limit=0.0), TOKENS)


@given(st.integers(0, 12), st.floats(0.1, 10))
def test_an_interrupted_probe_continues_with_the_same_runs(cut, factor) -> None:
    plan = plan_of(2000)
    runs = probe(plan, 8e-4 * factor)
    stored = [ProbeRun.from_json(run.as_json()) for run in runs[:cut]]
    assert probe(plan, 8e-4 * factor, finished=stored) == runs


@given(
    st.floats(40, 10_000), st.floats(0.02, 1.0), st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0.01, 100.0),
    st.lists(st.floats(0.1, 2.0), min_size=64, max_size=64),
)  # fmt: skip
def test_the_cost_is_within_the_budget(total, budget, batch_tokens, held_out_tokens, factor, sizes) -> None:
    """The cost counts the tokens of the steps that the runs take, and no step less than its number."""
    steps, step_tokens = math.ceil(total / budget), [size * batch_tokens for size in sizes]
    tokens = {"batch_tokens": batch_tokens, "held_out_tokens": held_out_tokens, "step_tokens": step_tokens}
    plan = plan_of(steps, **tokens, budget=budget)
    runs = probe(plan, 8e-4 * factor)
    assert plan.spent(runs) <= budget * steps * (1 + 1e-9)
    lengths = [run.diverged_at or run.steps for run in runs]
    evaluations = sum(run.diverged_at is None for run in runs) * plan.evaluation_cost
    assert sum(lengths) + evaluations <= plan.spent(runs) * (1 + 1e-9)
    trained = sum(math.fsum(step_tokens[:length]) for length in lengths) / batch_tokens
    assert trained + evaluations <= plan.spent(runs) * (1 + 1e-9)
    assert plan.evaluation_cost <= 0.5 * held_out_tokens / batch_tokens * (1 + 1e-9)
    assert sum(run.steps == plan.probe_steps for run in runs) >= 3


def test_the_initial_rate_is_carried_to_the_probe(monkeypatch) -> None:
    """A rate of the planned run becomes a higher one for the probe's shorter run.

    The default is the published best rate.
    """
    monkeypatch.setitem(measured.MEASURED_STEPS_EXPONENTS, "cosine", (-0.7, -0.2))
    constant, cosine = (plan_of(2000, learning_rate=2e-4, schedule=schedule) for schedule in ("constant", "cosine"))
    assert constant.learning_rate == pytest.approx(2e-4 * (2000 / constant.probe_steps) ** 0.5)
    assert cosine.learning_rate == pytest.approx(2e-4 * (2000 / cosine.probe_steps) ** 0.45), "it falls more slowly"
    published, weaker, decaying = (
        make_plan(1024, strength, batch_tokens=1, held_out_tokens=1, schedule=schedule)
        for strength, schedule in ((64.0, "constant"), (16.0, "constant"), (64.0, "cosine"))
    )
    assert published.learning_rate == pytest.approx(8.08e-4 * (64 / published.probe_steps) ** 0.5, rel=1e-3)
    assert 1.5 < weaker.learning_rate / published.learning_rate < 4
    assert 1.5 < decaying.learning_rate / published.learning_rate < 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 100}, "steps .* got 100"),
        ({"steps": 0}, "steps"),
        ({"strength": 0.0}, "strength"),
        ({"budget": 1.5}, "budget"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"held_out_tokens": 0}, "held_out_tokens"),
    ],
)
def test_bad_input(settings, named) -> None:
    with pytest.raises(InputError, match=named):
        make_plan(**{"steps": 2000, "strength": 64.0, "batch_tokens": 100, "held_out_tokens": 100} | settings)


def test_the_warm_up_of_a_probe_is_rounded_down() -> None:
    assert scaled_warmup(0, 2000, 28) == 0
    assert scaled_warmup(100, 2000, 39) == 1


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_expected_regret_is_that_of_published_probes(schedule) -> None:
    """No published probe that inside its scope was compared with full runs cost more than the sentence states."""
    probes = pd.concat([pd.read_csv(path) for path in sorted(PUBLISHED.glob("tune_*/probes.csv"))])
    replays = pd.concat([pd.read_csv(path) for path in sorted(PUBLISHED.glob("tune*/cases.csv"))])
    for same_rank in (True, False):
        usual, short = (expected_regret(same_rank=same_rank, schedule=schedule, probe_steps=steps) for steps in (16, 5))
        assert ("rank" in usual.changed) is not same_rank
        assert usual.pairs >= usual.probes >= 10
        assert 0 < usual.median < usual.largest <= short.largest
        cost = probes[(probes["rank"] == 8) == same_rank]
        for regret, is_short in ((short, True), (usual, False)):
            same_length = cost[(cost["probe_steps"] < 16) == is_short]
            if schedule != "constant":
                assert regret.largest >= same_length["regret"].max()
                assert regret.is_lower_bound or not same_length["is_lower_bound"].any()
            scope = (f"{regret.largest:.4f}", "SmolLM2-135M", f"{regret.probes} probe", f"{regret.pairs} pairs")
            for expected in scope:
                assert expected in regret.sentence()
            assert ("at least" in regret.sentence()) == regret.is_lower_bound
        assert ("cosine schedule" in usual.sentence()) is (schedule != "constant")
        assert ("Gemma" in usual.sentence()) is (schedule != "constant")
    largest = replays[(replays["strength"] == 64) & ~replays["is_edge"]]["regret"].max()
    both = [expected_regret(same_rank=same, schedule="cosine", probe_steps=64).largest for same in (True, False)]
    assert max(both) >= largest or schedule == "constant"
    # A probe at an end of its rates is not taken to be as good as the others.
    at_edge = expected_regret(same_rank=True, schedule=schedule, probe_steps=64, is_edge=True)
    assert at_edge.largest == pytest.approx(replays[replays["is_edge"]]["regret"].max())
    assert at_edge.pairs == replays["is_edge"].sum()
    assert ("at an end" in at_edge.sentence(), "at an end" in usual.sentence()) == (True, False)


@pytest.mark.parametrize(("largest", "is_stated"), [(0.5, True), (1e-5, False)])
def test_a_short_probe_is_not_considered_better_than_a_long_one(monkeypatch, largest, is_stated) -> None:
    """Plant the regret of the short probes above and below that of the others."""
    original = measured.probe_regret

    def planted(probes, schedule):
        cost = original(probes, schedule)
        return replace(cost, largest=largest) if probes == "short" else cost

    monkeypatch.setattr(measured, "probe_regret", planted)
    usual, short = (expected_regret(same_rank=True, schedule="cosine", probe_steps=steps) for steps in (16, 5))
    assert (short.largest == largest) is is_stated
    assert (short == usual) is not is_stated


def test_a_result_states_the_cost_of_probes_of_its_schedule_and_length() -> None:
    for steps, schedule in ((256, "cosine"), (2000, "cosine"), (2000, "constant")):
        plan = plan_of(steps, schedule=schedule)
        result = concluded(plan, probe(plan, best_at_64(plan, 1.0)))
        assert result.expected_regret == expected_regret(
            same_rank=False, schedule=schedule, probe_steps=plan.probe_steps
        )
        assert not result.expected_regret.is_edge


def test_the_range_allows_for_another_rank() -> None:
    plan = plan_of(2000)
    runs = probe(plan, 8e-4)
    same, larger = (concluded(plan, runs, rank) for rank in (8, 128))
    assert larger.learning_rate == same.learning_rate
    assert (larger.low / same.low, larger.high / same.high) == pytest.approx((0.79, 1.85), abs=0.01)
    assert rank_factors(8, 8) == (1, 1, 1)
    assert rank_factors(8, 2).low < 1 < rank_factors(8, 2).high


def test_the_range_covers_the_exponents_in_the_rank_of_both_schedules(monkeypatch) -> None:
    """Under a schedule other than a constant rate it covers the intervals that were measured under any schedule."""
    for folder, name in (("horizon_cosine", "SmolLM2-135M"), ("horizon_gemma_cosine", "Gemma 3 270M")):
        rows = pd.read_csv(PUBLISHED / folder / "exponents.csv").query("over == 'rank'")
        assert len(rows)
        for schedule, (_, row) in itertools.product(("cosine", "linear"), rows.iterrows()):
            ends = [row["exponent"] + side * row["half_width"] for side in (-1, 1)]
            factors = rank_factors(8, 128, schedule)
            assert factors.low <= 16 ** ends[0] < 16 ** ends[1] <= factors.high
            assert factors.best == 1
        plan = plan_of(2000)
        assert any(name in sentence for sentence in concluded(plan, probe(plan, 8e-4)).assumptions[3:])
    wider = measured.RankExponent("another", "cosine", 0.1, 0.9)
    monkeypatch.setattr(measured, "RANK_EXPONENTS", (*measured.RANK_EXPONENTS, wider))
    assert rank_factors(8, 128, "linear").high == rank_factors(8, 128, "cosine").high == pytest.approx(16**0.9)
    assert rank_factors(8, 128, "constant").high == pytest.approx(1.85, abs=0.01)


def test_the_plot_shows_curve_and_range(tmp_path) -> None:
    """The method returns a figure that the caller saves, as for other measurements."""
    plan = plan_of(2000)
    result = concluded(plan, probe(plan, 8e-4, limit=4 * plan.learning_rate), rank=8)
    figure = result.plot()
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert f"{plan.probe_steps} steps" in axis.get_legend_handles_labels()[1]
    assert result.plot(axis) is figure
    assert f"{result.learning_rate:.3g}" in result.sentence()
    figure.savefig(tmp_path / "probe.png")
    plt.close(figure)


def test_the_interval_over_eight_records_covers_the_best_rate(monkeypatch) -> None:
    """The best rate of a record deviates by two octaves, that of the seed by `SEED_LOG2_ERROR`.

    A 95% interval covers it in fewer than 368 of 400 draws (seed 0) with a probability of 0.004.
    """
    monkeypatch.setattr(curve, "DRAWS", 200)
    random, plan, rates, covered = np.random.default_rng(0), plan_of(256), 2.0 ** np.arange(-8, 9, 2), 0
    for _ in range(400):
        records = 2.0 * random.normal(size=(8, 1)) + SEED_LOG2_ERROR * random.normal()
        losses = 1 + 1e-4 * (np.log2(rates) - records) ** 2
        runs = [
            ProbeRun(rate, plan.probe_steps, tuple(column))
            for rate, column in zip(rates.tolist(), losses.T.tolist(), strict=True)
        ]
        fitted = fit_best_rate(plan, runs, [1] * 8)
        covered += fitted.low < 1.0 < fitted.high
    assert covered >= 368


def test_the_spread_between_seeds_is_that_of_the_published_runs() -> None:
    """It lies between the mean and the largest spread of runs with three seeds."""
    best = pd.read_csv(PUBLISHED / "horizon" / "best.csv")
    assert (best["seeds"] - 1)[best["log2_error"].notna()].sum() >= SEED_DEGREES
    best = best[(best["seeds"] == 3) & (best["error_over"] == "seeds")]
    spreads = best["log2_error"] * np.sqrt(best["seeds"])
    assert len(spreads) >= 5
    assert spreads.mean() < SEED_LOG2_ERROR < spreads.max()


def test_the_assumptions_state_the_steps_of_the_runs_behind_the_exponents() -> None:
    for schedule, is_stated in (("constant", False), ("cosine", True)):
        plan = plan_of(2000, schedule=schedule)
        sentence = concluded(plan, probe(plan, 8e-4)).assumptions[0]
        assert "16 to 256 steps at a constant rate" in sentence
        assert ("16 to 1,024 steps under cosine decay" in sentence) is is_stated
