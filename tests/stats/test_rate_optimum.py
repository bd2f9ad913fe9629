"""The minimum of a loss curve, its edges and diverged runs, and the predicted slopes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory.errors import InputError
from rora_theory.stats.rate_optimum import fit_minima, grid_gaps, predicted_slopes, rate_gaps

RATES = 2.0 ** np.arange(-6, 3)


@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_a_minimum_is_the_vertex_of_three_points_or_a_measured_point(seed, count):
    """Vertices agree with NumPy's fit on any grid; at an edge and beside a run that diverged no parabola passes."""
    random = np.random.default_rng(seed)
    rates = np.exp(np.cumsum(random.uniform(0.1, 2, count)))
    curves = np.exp(random.normal(size=(20, count)))
    curves[:, 1:][random.random((20, count - 1)) < 0.2] = random.choice([np.nan, np.inf])
    for best, measured in zip(fit_minima(rates, curves), curves, strict=True):
        losses = np.where(np.isfinite(measured), measured, np.inf)
        at = int(np.argmin(losses))
        around = slice(at - 1, at + 2)
        assert best.edge == ("low" if at == 0 else "high" if at == count - 1 else "")
        expected = rates[at]
        if not best.edge and np.isfinite(losses[around]).all():
            fit = np.polynomial.Polynomial.fit(np.log(rates[around]), np.log(losses[around]), 2)
            expected = np.exp(fit.deriv().roots()[0])
        assert best.rate == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
def test_predicted_slopes(kappa):
    """Slopes keep eta gamma^2 (r, sqrt(r)), eta gamma (SGD); eta gamma (r, sqrt(r)), eta^2 gamma r (Adam)."""
    sgd = {"signal": 2 * kappa - 1, "cross-talk": 2 * kappa - 0.5, "A moves": kappa}
    adam = {"signal": kappa - 1, "cross-talk": kappa - 0.5, "A moves": kappa / 2 - 0.5}
    predicted = [predicted_slopes(name, kappa) for name in ("sgd", "momentum", "adam", "adamw")]
    assert predicted == [sgd, sgd, adam, adam]
    del sgd["A moves"], adam["A moves"]
    assert [predicted_slopes(name, kappa, trained="B") for name in ("sgd", "adam")] == [sgd, adam]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rates", "losses", "message"),
    [
        (RATES, np.full(len(RATES), np.nan), "every run diverged"),
        (RATES[:3], np.ones(4), "rates"),
        (np.array([1.0, 1.0, 2.0]), np.ones(3), "rates"),
        (RATES[:2], np.ones(2), "rates"),
        (RATES[::-1], np.ones(len(RATES)), "rates"),
        (np.array([0.0, 1.0, 2.0]), np.ones(3), "rates"),
    ],
)
def test_bad_curves(rates, losses, message):
    with pytest.raises(InputError, match=message):
        fit_minima(rates, losses[None])


def test_the_loss_that_a_grid_hides():
    """Bounds by hand: even and uneven neighbours, a diverged run on either side or both, and the edges."""
    rates = np.exp([0.0, 1.0, 3.0])
    left, right = np.exp([0.3, 0.6])
    curves = {
        (5 * left, 5.0, 5 * right): 5 * 0.3 * (0.3 * 2 + 0.6) / 3 * 2, (left, 1.0, np.nan): 0.3 * 2,
        (np.inf, 1.0, right): 0.6 / 2, (np.inf, 1.0, np.inf): np.inf, (1.0, 2.0, 3.0): 0.0, (3.0, 2.0, 1.0): 0.0,
    }  # fmt: skip
    assert grid_gaps(rates, np.array(list(curves))).tolist() == pytest.approx(list(curves.values()))


def test_how_far_the_best_rate_may_lie_beside_a_run_that_diverged():
    """Bounds by hand in log2: half the wider side next to diverged runs, 0 for a parabola and at an edge."""
    rates = np.array([1.0, 2.0, 16.0, 32.0])
    nan = np.nan
    for losses, gap in (
        ([2, 1, 2, 3], 0), ([2, 1, nan, 3], 1.5), ([nan, 1, 2, 3], 1.5), ([3, 2, 1, nan], 1.5),
        ([3, nan, 1, 2], 1.5), ([1, nan, 2, 3], 0), ([nan, nan, nan, 1], 0), ([nan, 3, 1, 2], 0),
    ):  # fmt: skip
        assert rate_gaps(rates, np.array([losses], float)).tolist() == [pytest.approx(gap)]
    assert rate_gaps(rates[:3], np.array([[nan, 1, nan]])).tolist() == [pytest.approx(1.5)]


def test_a_nearly_straight_curve_has_its_minimum_at_the_end() -> None:
    """The vertex of its parabola overflows and is not computed."""
    rates = np.array([1e-3, 1e-2, 1e-1])
    (best,) = fit_minima(rates, np.exp(-0.1 * np.log(rates) + 1e-6 * np.log(rates) ** 2)[None])
    assert (best.rate, best.edge) == (0.1, "high")
    # Two losses that differ, with logarithms that do not.
    (best,) = fit_minima(rates, np.array([[np.nextafter(100.0, 101.0), 100.0, 100.0]]))
    assert 1e-3 < best.rate < 1e-1


def test_a_reach_uses_all_rates_near_the_lowest_loss() -> None:
    """On a dense grid three points measure the noise; least squares over half a decade finds the optimum."""
    random, rates, optimum = np.random.default_rng(6), np.geomspace(1e-5, 1e-3, 41), 1.3e-4
    losses = np.exp(0.01 * np.log(rates / optimum) ** 2 + 3e-4 * random.normal(size=(200, 41)))
    near, wide = (np.log([best.rate / optimum for best in fit_minima(rates, losses, reach)]) for reach in (0.0, 1.25))
    # Three points 0.12 apart differ by less than the noise; the fit over 22 rates has a standard deviation of 0.01.
    assert np.std(wide) < 0.25 * np.std(near)
    assert abs(np.mean(wide)) < 0.02
    # Where no other rate lies within reach, the fit is the vertex through three points.
    coarse = np.array([1e-4, 3e-4, 1e-3, 3e-3])
    curves = np.exp(0.02 * np.log(coarse / np.array([[2e-4], [5e-4]])) ** 2)
    assert fit_minima(coarse, curves, 1.25) == fit_minima(coarse, curves)
    # Runs that diverged do not belong to the fit.
    dense = np.geomspace(1e-4, 1e-2, 21)
    curve = np.exp(0.02 * np.log(dense / 5e-4) ** 2)
    curve[np.argmin(curve) + 3 :] = np.inf
    assert fit_minima(dense, curve[None], 1.25)[0].rate == pytest.approx(5e-4)
