"""The rate for nothing: the public sweeps' rates by the law of the advice, and the regret of one and of three runs."""

import math
from pathlib import Path

import numpy as np
import pytest

from rora_theory import InputError, Setting, transfer
from rora_theory.advice.best_rate import Run, best_rate_change
from rora_theory.evidence.rate_prior import (
    CURVATURE,
    PUBLIC_CURVATURE,
    REFERENCE,
    RateBelief,
    expected_rate,
    rate_prior,
)
from rora_theory.evidence.starting_rates import models, starting_rate
from rora_theory.evidence.sweeps import load_sweeps
from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import read_runs, read_tokens

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def test_the_prior_is_the_public_sweeps_carried_to_the_planned_run() -> None:
    """At the sweeps' own run it is their rate; a larger model has a lower one; distance widens the spread."""
    small, large = (rate_prior(REFERENCE, parameters=parameters) for parameters in (1.0, 70.0))
    theirs = rate_prior(Run(16, 32.0, 780, "cosine", 128), parameters=1.0)
    assert theirs.mean == pytest.approx(starting_rate(parameters=1.0).log_mean, rel=1e-12)
    assert small.rates.best > large.rates.best
    assert 1e-4 < large.rates.best < 1e-3
    # Another rank and alpha follow the advice.
    moved = rate_prior(Run(64, 16.0, 780, "cosine", 128), parameters=1.0)
    expected = transfer(Setting(16, 32.0, 1e-4), 64, alpha=16.0).learning_rate / 1e-4
    assert moved.rates.best / small.rates.best == pytest.approx(expected)
    planned = Run(8, 16.0, 20_000, "constant", 4)
    far, change = rate_prior(planned, parameters=1.0), best_rate_change(REFERENCE, planned)
    assert far.mean == pytest.approx(small.mean + change.mean)
    assert far.spread == pytest.approx(math.hypot(small.spread, change.spread))
    assert far.spread > small.spread
    assert rate_prior(REFERENCE, family="Qwen3", parameters=8.0).spread < rate_prior(REFERENCE, parameters=8.0).spread


def test_the_range_holds_nine_tenths_of_the_distribution() -> None:
    """The quantile of 95% of a normal distribution lies 1.645 standard deviations above its mean."""
    low, best, high = RateBelief(math.log(1e-3), 0.5).rates
    assert (low, best, high) == pytest.approx((1e-3 / math.exp(0.82243), 1e-3, 1e-3 * math.exp(0.82243)), rel=1e-5)


def test_the_expected_regret_is_that_of_a_parabola() -> None:
    """Half the curvature times the variance: a spread of log 2 costs 0.010 nats."""
    assert RateBelief(0.0, math.log(2)).expected_regret == pytest.approx(0.010, abs=1e-3)


@pytest.mark.parametrize("spread", [0.2, 0.46, 0.7, 1.5])
def test_the_regret_of_three_runs_is_that_of_drawn_best_rates(spread) -> None:
    """Draws of the best rate, each with the lowest of three parabolas' losses, against the closed form.

    The tolerance is five standard errors of the mean of 400,000 draws, about 1% of the regret: a correct formula fails
    in one of the four cases with probability 2e-6. A wrong sign or factor of either correction changes the regret by
    more than 5% in at least one of the cases.
    """
    belief = RateBelief(math.log(1e-3), spread)
    best = belief.mean + spread * np.random.default_rng(0).normal(size=400_000)
    losses = [0.5 * CURVATURE * (math.log(rate) - best) ** 2 for rate in belief.three_rates]
    regrets = np.min(losses, axis=0)
    error = float(regrets.std() / math.sqrt(len(regrets)))
    assert error < 0.01 * regrets.mean()
    assert belief.expected_regret_of_three == pytest.approx(float(regrets.mean()), abs=5 * error)
    assert float(np.mean(losses[1])) == pytest.approx(belief.expected_regret, rel=0.02)


def test_three_runs_cannot_gain_where_one_is_exact_nor_cover_what_is_far() -> None:
    """A tiny spread leaves the regret of one run; a huge one leaves that of the nearest of the two outer rates."""
    assert RateBelief(0.0, 0.01).expected_regret_of_three == pytest.approx(RateBelief(0.0, 0.01).expected_regret)
    spread = 1e4
    far = 0.5 * CURVATURE * (spread**2 - 2 * math.log(2) * spread * math.sqrt(2 / math.pi))
    assert RateBelief(0.0, spread).expected_regret_of_three == pytest.approx(far, rel=1e-7)


def test_the_result_states_the_rate_its_range_and_what_it_assumes() -> None:
    run = Run(128, 64.0, 2000, "cosine", 8)
    config, prior = {"r": 128}, rate_prior(run, parameters=0.1)
    result = expected_rate(run, config=config, parameters=0.1, remarks=("A remark.",))
    assert (result.low, result.learning_rate, result.high) == prior.rates
    assert (result.expected_regret, result.expected_regret_of_three) == (
        prior.expected_regret,
        prior.expected_regret_of_three,
    )
    assert result.config is config
    half, rate, double = prior.three_rates
    assert (2 * half, double) == pytest.approx((rate, 2 * rate))
    sentence = result.sentence()
    for number in (f"{rate:.3g}", f"{half:.3g}", f"{double:.3g}", "2,000"):
        assert f" {number}" in sentence
    assert f"regret is {prior.expected_regret:.4f} nats" in sentence
    assert f"then {prior.expected_regret_of_three:.4f}." in sentence
    smallest = min(model.parameters for model in models())
    assert any("extrapolated" in text for text in result.assumptions)
    assert result.assumptions[-1] == "A remark."
    largest = max(model.parameters for model in models())
    for parameters in (smallest, largest, None):
        other = expected_rate(run, config=config, parameters=parameters)
        assert not any("extrapolated" in text for text in other.assumptions)
    beyond = expected_rate(run, config=config, parameters=7e9)
    assert "larger" in beyond.assumptions[-1]
    assert "extrapolated" in beyond.assumptions[-1]


@pytest.mark.parametrize(
    ("arguments", "named"), [({"family": "none"}, "family .*'none'"), ({"parameters": 0.0}, "parameters .* 0")]
)
def test_bad_input(arguments, named) -> None:
    with pytest.raises(InputError, match=named) as refused:
        expected_rate(REFERENCE, config=None, **arguments)
    assert "\n" not in str(refused.value)


def median_curvature(curves) -> float:
    """Return the median curvature of the parabola through the lowest mean loss and its neighbours, against log rate."""
    values = []
    for curve in curves:
        losses, place = curve.losses.mean(axis=0), int(curve.losses.mean(axis=0).argmin())
        if 0 < place < len(losses) - 1:
            near = slice(place - 1, place + 2)
            values.append(2 * np.polyfit(np.log(curve.rates[near]), losses[near], 2)[0])
    assert len(values) >= 10
    return float(np.median(values))


def test_the_curvatures_are_those_of_published_curves() -> None:
    """Our runs of SmolLM2-135M after 64 steps, and the public sweeps that ship with the package."""
    runs = read_runs(PUBLISHED / "horizon")
    tokens = next(iter(read_tokens(PUBLISHED / "horizon").values()))[0]
    ours = [curve for curve in curves_at(runs, tokens, 64, draws=2) if curve.gain and not curve.edge]
    assert median_curvature(ours) == pytest.approx(CURVATURE, rel=0.15)
    public = [fit.curve for sweep in load_sweeps("tinker") for fit in sweep.fits if fit.is_inside]
    assert median_curvature(public) == pytest.approx(PUBLIC_CURVATURE, rel=0.15)
