"""The posterior of a probe: the prior where losses say nothing, a known answer where they do, and honest ranges."""

import math

import numpy as np
import pytest

from rora_theory.advice.best_rate import QUANTILE, LogChange
from rora_theory.errors import InputError
from rora_theory.measure.tuning import posterior
from rora_theory.measure.tuning.plan import ProbeRun
from rora_theory.measure.tuning.posterior import RateBelief, update

PRIOR = RateBelief(math.log(1e-3), 0.6)
NO_CARRY = LogChange(0.0, 0.0)
TOKENS = (40, 60, 50, 30, 20, 80)


def probe(
    best: float, *, curvature: float = 0.042, noise: float = 0.0, seed: int = 0, records=TOKENS
) -> list[ProbeRun]:
    """Return five runs whose losses per token follow a parabola, with independent noise on every record."""
    random = np.random.default_rng(seed)
    level = random.normal(2.0, 0.5, len(records))  # shared by all runs, as records differ more than rates do
    runs = []
    for rate in 1e-3 * 3.0 ** np.arange(-2, 3):
        height = 0.5 * curvature * math.log(rate / best) ** 2
        losses = (level + height + noise * random.normal(size=len(records))) * np.array(records)
        runs.append(ProbeRun(rate, 16, tuple(losses.tolist())))
    return runs


def test_losses_that_say_nothing_leave_the_prior() -> None:
    """Equal losses, a single run, and noise far above every difference."""
    equal = [ProbeRun(rate, 16, (80.0,) * len(TOKENS)) for rate in (3e-4, 1e-3, 3e-3)]
    for runs in (equal[:1], probe(1e-4, noise=50.0)):
        belief = update(PRIOR, runs, TOKENS, NO_CARRY).belief
        assert (belief.mean, belief.spread) == (pytest.approx(PRIOR.mean, abs=0.02), pytest.approx(0.6, abs=0.02))


def test_clear_losses_move_the_rate_to_their_minimum() -> None:
    found = update(PRIOR, probe(2.5e-3, noise=1e-4), TOKENS, NO_CARRY)
    assert found.factor == pytest.approx(2.5, rel=0.15)
    assert found.belief.spread < 0.35
    assert f"multiplied it by {found.factor:.2f}" in found.sentence()
    assert found.belief.rates.low < 2.5e-3 < found.belief.rates.high


def test_the_carry_shifts_and_widens() -> None:
    """A change of the best rate by a factor of two, known to 0.5, adds its mean and its variance to the likelihood."""
    runs = probe(1e-3, noise=1e-4)
    exact = update(PRIOR, runs, TOKENS, LogChange(math.log(2), 0.0)).belief
    loose = update(PRIOR, runs, TOKENS, LogChange(math.log(2), 0.5)).belief
    assert PRIOR.mean < loose.mean < exact.mean <= PRIOR.mean + math.log(2)
    assert exact.spread < loose.spread < PRIOR.spread


def test_shared_noise_of_the_records_cancels() -> None:
    """Records differ by 0.5 nats, rates by hundredths: without pairing, the probe would say nothing."""
    runs = probe(3e-3, noise=1e-4)
    paired = update(PRIOR, runs, TOKENS, NO_CARRY).belief
    random = np.random.default_rng(1)
    shuffled = [ProbeRun(run.learning_rate, 16, tuple(random.permutation(run.losses).tolist())) for run in runs]
    unpaired = update(PRIOR, shuffled, TOKENS, NO_CARRY).belief
    assert paired.spread < 0.6 * unpaired.spread


def test_a_divergence_bounds_the_rate_from_above() -> None:
    runs = [*probe(1e-3, noise=50.0), ProbeRun(6e-4, 16, diverged_at=3)]
    belief = update(PRIOR, runs, TOKENS, NO_CARRY).belief
    assert belief.mean < math.log(7e-4)


def test_every_rate_diverged() -> None:
    with pytest.raises(InputError, match="diverged"):
        update(PRIOR, [ProbeRun(1e-3, 16, diverged_at=2)], TOKENS, NO_CARRY)


def test_ranges_hold_nine_tenths_of_the_truths() -> None:
    """Truths from the prior, curvatures from theirs, probes with noise: 300 ranges hold 90% of them.

    The standard error is 0.017; a correct range fails outside of 0.84 to 0.96 with probability below 0.001.
    """
    random = np.random.default_rng(2)
    inside = 0
    for seed in range(300):
        truth = random.normal(PRIOR.mean, PRIOR.spread)
        shown = truth + random.normal(0, posterior.SEED_SPREAD)
        curvature = posterior.CURVATURE * math.exp(random.normal(0, posterior.LOG_CURVATURE_SPREAD))
        runs = probe(math.exp(shown), curvature=curvature, noise=0.02, seed=seed)
        belief = update(PRIOR, runs, TOKENS, NO_CARRY).belief
        inside += abs(truth - belief.mean) < QUANTILE * belief.spread
    assert 0.84 < inside / 300 < 0.97


def test_the_expected_regret_is_that_of_a_parabola() -> None:
    """Half the curvature times the variance: a spread of log 2 costs 0.010 nats."""
    assert RateBelief(0.0, math.log(2)).expected_regret == pytest.approx(0.010, abs=1e-3)
