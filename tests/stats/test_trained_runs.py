"""Trained runs: equal resampled records at every rate, the curve, and the errors of a difference."""

from dataclasses import replace

import numpy as np
import pytest
from support.trained_runs import trained_run

from rora_theory.errors import InputError
from rora_theory.stats.estimate import over_seeds
from rora_theory.stats.paired import mean_per_token
from rora_theory.stats.rate_curves import estimate
from rora_theory.stats.trained_runs import bootstrap, curve_of_runs, curves_of_runs, loss_difference


def test_the_bootstrap_draws_the_same_records_at_every_rate():
    """The records differ widely and the loss of a token does not, so that no draw changes the ratio of sums."""
    tokens = np.array([1.0, 10.0, 100.0])
    runs = [trained_run(rate=factor, loss=factor, records=factor * tokens, tokens=tokens) for factor in (1.0, 3.0)]
    runs.append(trained_run(rate=9.0, loss=np.inf))
    np.testing.assert_allclose(bootstrap(runs, draws=7), [[1.0, 3.0, np.inf]] * 7)
    np.testing.assert_allclose(bootstrap([runs[2], runs[0]], draws=2), [[np.inf, 1.0]] * 2)
    level = np.array([5.0, 1.0, 2.0]) * tokens
    uneven = [trained_run(rate=factor, records=factor * level, tokens=tokens) for factor in (1.0, 3.0)]
    drawn = bootstrap(uneven, draws=50)
    np.testing.assert_allclose(drawn[:, 1], 3 * drawn[:, 0])
    assert len(np.unique(drawn[:, 0])) > 3
    np.testing.assert_array_equal(drawn, bootstrap(uneven, draws=50), "seeded: methods share their draws")
    shares = bootstrap([trained_run(records=np.array([1.0, 0.0, 0.0]), tokens=np.ones(3))], draws=50)
    assert set(np.round(3 * shares.ravel()).tolist()) == {0, 1, 2, 3}, "the first record is drawn 0 to 3 times"


def test_losses_by_record_need_equal_records_or_none():
    first, second = (
        trained_run(seed=seed, records=np.array(sums), tokens=np.ones(2))
        for seed, sums in enumerate(([1.0, 3.0], [3.0, 5.0]))
    )
    without_records = replace(second, records=None, tokens=None)
    assert bootstrap([first, without_records], draws=2) is None
    assert not loss_difference([first], [without_records]).has_error
    message = r"seed 0 and lora of rank 8 at 0\.1, seed 1 .*held-out records"
    other = replace(second, tokens=np.array([1.0, 2.0]))
    for call in (lambda: bootstrap([first, other], draws=2), lambda: loss_difference([first], [other])):
        with pytest.raises(InputError, match=message):
            call()


def test_the_spread_of_the_bootstrap_is_the_error_of_the_ratio() -> None:
    """Losses in proportion to the tokens never change, and runs share their records."""
    tokens = np.random.default_rng(1).integers(20, 60, 300).astype(float)
    losses = tokens * np.random.default_rng(2).normal(1.0, 0.1, 300)
    runs = [trained_run(records=sums, tokens=tokens) for sums in (3 * tokens, losses, 2 * losses)]
    drawn = bootstrap(runs, draws=2000)
    np.testing.assert_allclose(drawn[:, 0], 3.0, rtol=1e-12)
    np.testing.assert_allclose(drawn[:, 2], 2 * drawn[:, 1], rtol=1e-12)
    error = mean_per_token(losses.tolist(), tokens.astype(int).tolist()).error
    # The deviation of 2000 draws is known to 1.6%; 5 of its errors, and a part in 300 for the first order.
    assert np.std(drawn[:, 1]) == pytest.approx(error, rel=0.085)
    assert not np.array_equal(drawn, bootstrap(runs, draws=2000, seed=1))
    # Each of three records is drawn as often as another; their shares are known to 0.006.
    shares = bootstrap([trained_run(records=row, tokens=np.ones(3)) for row in np.eye(3)], draws=2000).mean(axis=0)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


@pytest.mark.parametrize("lacks_records", [False, True])
def test_a_curve_has_its_seeds_and_rates_in_order(lacks_records):
    """Runs come in any order. The resampled losses follow the seeds and rates if all runs have records."""
    tokens = np.array([1.0, 10.0, 100.0])
    runs = [
        trained_run(
            "rora", rate=rate, seed=seed, loss=seed + rate, records=(seed + rate) * tokens, tokens=tokens, kappa=0.5
        )
        for seed in (3, 1)
        for rate in (0.4, 0.1, 0.2)
    ]
    runs = [replace(run, kappa=0.5) for run in runs]
    runs[0] = replace(runs[0], loss=np.inf, records=None, tokens=None)
    if lacks_records:
        runs[1] = replace(runs[1], records=None, tokens=None)
    curve = curve_of_runs(runs, draws=5)
    assert (curve.rule, curve.kappa, curve.rank, curve.scaling) == ("rora", 0.5, 8, 2.0)
    assert (curve.seeds, curve.rates.tolist()) == ((1, 3), [0.1, 0.2, 0.4])
    losses = [[1.1, 1.2, 1.4], [3.1, 3.2, np.inf]]
    np.testing.assert_allclose(curve.losses, losses)
    if lacks_records:
        assert curve.resampled is None
    else:
        np.testing.assert_allclose(curve.resampled, [losses] * 5)


@pytest.mark.parametrize("n", [8, 96])
def test_the_interval_over_records_is_student_s(n):
    """Tokens of equal number make the loss a mean; 20,000 samples give its error within 2% (four standard errors)."""
    records = np.random.default_rng(n).normal(2.0, 0.5, n)
    curve = curve_of_runs(
        [trained_run(rate=rate, records=rate * records, tokens=np.ones(n)) for rate in (1.0, 2.0, 4.0)],
        draws=20_000,
    )
    loss = estimate(lambda curve: curve.losses[:, 0], curve)
    expected = over_seeds(records)
    assert (loss.n, loss.over) == (n, "held-out records")
    assert (loss.error, loss.half_width()) == pytest.approx((expected.error, expected.half_width()), rel=0.02)


@pytest.mark.parametrize(
    ("by_seed", "records", "over"),
    [
        ((0.1, -0.1, 0.3), True, "seeds and held-out records"),
        ((0.1,), True, "held-out records"),
        ((0.1, 0.3), False, "seeds"),
        ((0.1,), False, ""),
    ],
)
def test_both_errors_are_kept(by_seed, records, over):
    """Errors over seeds and over four records, computed by hand; no error for one seed without records.

    The records' differences grow from seed to seed, with ``noise`` as their mean. What both sides share cancels.
    """
    tokens, noise = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, -2.0, 2.0, -1.0])
    shared = np.array([5.0, 3.0, -4.0, -4.0])
    growth = 2 * np.arange(1, len(by_seed) + 1) / (len(by_seed) + 1)

    def records_of(sums):
        return {"records": sums, "tokens": tokens} if records else {}

    first, second = (
        [
            trained_run(seed=seed, loss=loss, **records_of(loss * tokens + growth[seed] * sums))
            for seed, loss in enumerate(losses)
        ]
        for losses, sums in ((2 + np.array(by_seed), shared + noise), (np.full(len(by_seed), 2.0), shared))
    )
    difference = loss_difference(first, second)
    assert (difference.over, difference.value) == (over, pytest.approx(np.mean(by_seed)))
    by_seeds = np.std(by_seed, ddof=1) / len(by_seed) ** 0.5 if len(by_seed) > 1 else np.inf
    by_records = np.sqrt(np.sum(noise**2) * 4 / 3) / 100
    both = {"held-out records": by_records, "seeds and held-out records": np.hypot(by_seeds, by_records)}
    expected = both.get(over, by_seeds)
    assert difference.error == pytest.approx(expected, rel=1e-9)


def test_curves_come_in_the_order_of_their_runs():
    """Each optimizer, kind of training, method, rank and scaling has a curve of its own, if it has three rates."""
    settings = ({"optimizer": "sgd"}, {"trained": "B"}, {"method": "rora"}, {"rank": 4}, {"gamma": 1.0}, {"kappa": 0.0})
    runs = [trained_run(rate=rate, loss=rate, **setting) for rate in (0.3, 0.1, 0.2) for setting in settings]
    curves = curves_of_runs([*runs, trained_run(rate=0.1), trained_run(rate=0.2)])
    found = [(c.optimizer, c.trained, c.rule, c.rank, c.scaling, c.kappa) for c in curves]
    plain = {"optimizer": "adamw", "trained": "both", "method": "lora", "rank": 8, "gamma": 2.0, "kappa": 1.0}
    assert found == [tuple((plain | setting).values()) for setting in settings]
    assert [curve.losses.tolist() for curve in curves] == [[[0.1, 0.2, 0.3]]] * len(settings)
