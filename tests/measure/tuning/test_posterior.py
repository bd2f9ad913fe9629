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


RUNS = [
    ProbeRun(4e-4, 16, (88.0, 131.0, 111.0)),
    ProbeRun(1e-3, 16, (86.5, 129.5, 108.2)),
    ProbeRun(2.5e-3, 16, (87.4, 129.8, 110.3)),
    ProbeRun(3e-3, 16, diverged_at=3),
]


def summed(prior: RateBelief, runs: list[ProbeRun], carry: LogChange, tokens=(40, 60, 50)) -> tuple[float, float]:
    """Return the posterior's mean and spread by sums over the probe's best rate and the curvature.

    Differences from the first run's loss do not depend on the level. The curvature's logarithm has a spread of 1 around
    0.042, the parabola an error of 0.25 of a loss's height, a divergence a margin of 0.35, and seeds a spread of 0.17,
    all in natural logarithms.
    """
    finished = [run for run in runs if run.diverged_at is None]
    counts, sums = np.array(tokens, float), np.array([run.losses for run in finished])
    losses = sums.sum(axis=1) / counts.sum()
    residuals = sums - losses[:, None] * counts
    covariance = residuals @ residuals.T / counts.sum() ** 2 * len(counts) / (len(counts) - 1)
    covariance += np.diag((0.25 * (losses - losses.min())) ** 2)
    contrasts = np.eye(len(finished))[1:] - np.eye(len(finished))[0]
    inverse = np.linalg.inv(contrasts @ covariance @ contrasts.T)
    y = np.linspace(math.log(1e-5), math.log(0.3), 400)
    heights = 0.5 * (np.log([run.learning_rate for run in finished]) - y[:, None]) ** 2
    likelihood = np.zeros(len(y))
    for offset in np.linspace(-3, 3, 25):
        error = (losses - 0.042 * math.exp(offset) * heights) @ contrasts.T
        likelihood += np.exp(-0.5 * offset**2 - 0.5 * (error @ inverse * error).sum(axis=1))
    for run in runs:
        if run.diverged_at is not None:
            likelihood *= [0.5 * math.erfc(-(math.log(run.learning_rate) - rate) / 0.35 / math.sqrt(2)) for rate in y]
    x = np.linspace(prior.mean - 4 * prior.spread, prior.mean + 4 * prior.spread, 300)
    carried = np.exp(-0.5 * ((x[:, None] - carry.mean - y) / math.hypot(carry.spread, 0.17)) ** 2) @ likelihood
    weights = carried * np.exp(-0.5 * ((x - prior.mean) / prior.spread) ** 2)
    weights /= weights.sum()
    mean = float(weights @ x)
    return mean, math.sqrt(float(weights @ (x - mean) ** 2))


@pytest.mark.parametrize("carry", [LogChange(0.3, 0.2), LogChange(-0.5, 0.0)])
def test_the_posterior_is_that_of_sums_over_all_unknowns(carry) -> None:
    prior = RateBelief(math.log(8e-4), 0.7)
    for runs in (RUNS, RUNS[:3]):
        belief = update(prior, runs, (40, 60, 50), carry).belief
        assert (belief.mean, belief.spread) == pytest.approx(summed(prior, runs, carry), abs=2e-4)


def test_the_interval_includes_the_spread_between_seeds() -> None:
    """Without other errors, the losses of one seed leave the spread of its best rate around that of another."""
    runs = probe(1e-3, noise=1e-6, curvature=0.042)
    spread = update(RateBelief(math.log(1e-3), 3.0), runs, TOKENS, NO_CARRY).belief.spread
    assert spread > 0.17


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


def test_the_range_holds_nine_tenths_of_the_distribution() -> None:
    """The quantile of 95% of a normal distribution lies 1.645 standard deviations above its mean."""
    low, best, high = RateBelief(math.log(1e-3), 0.5).rates
    assert (low, best, high) == pytest.approx((1e-3 / math.exp(0.82243), 1e-3, 1e-3 * math.exp(0.82243)), rel=1e-5)


def test_the_expected_regret_is_that_of_a_parabola() -> None:
    """Half the curvature times the variance: a spread of log 2 costs 0.010 nats."""
    assert RateBelief(0.0, math.log(2)).expected_regret == pytest.approx(0.010, abs=1e-3)
