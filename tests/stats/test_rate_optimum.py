"""The minimum of a loss curve, its edges and diverged runs, and the predicted slopes."""

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.stats.rate_optimum import best_rate, fit_minima, grid_gap, predicted_slopes, rate_gap

RATES = 2.0 ** np.arange(-6, 3)


@pytest.mark.parametrize(
    ("rates", "centre"),
    [(RATES, 0.03), (RATES, 0.11), (RATES, 0.7), (RATES[:3], RATES[1]), (np.array([0.01, 0.03, 0.05, 0.2]), 0.04)],
)
def test_parabola_is_found(rates, centre):
    """A curve that is a parabola in log loss has its vertex found exactly, wherever it lies between the rates."""
    best = best_rate(rates, np.exp(0.3 * np.log(rates / centre) ** 2 - 1))
    assert (best.rate, best.loss) == pytest.approx((centre, np.exp(-1)), rel=1e-9)
    assert best.edge == ""


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
def test_predicted_slopes(kappa):
    """Slopes keep eta gamma^2 (r, sqrt(r)), eta gamma (SGD); eta gamma (r, sqrt(r)), eta^2 gamma r (Adam)."""
    sgd = {"signal": 2 * kappa - 1, "cross-talk": 2 * kappa - 0.5, "A moves": kappa}
    adam = {"signal": kappa - 1, "cross-talk": kappa - 0.5, "A moves": kappa / 2 - 0.5}
    predicted = [predicted_slopes(name, kappa) for name in ("sgd", "momentum", "adam", "adamw")]
    assert predicted == [sgd, sgd, adam, adam]
    del sgd["A moves"], adam["A moves"]
    assert [predicted_slopes(name, kappa, trained="B") for name in ("sgd", "adam")] == [sgd, adam]


def test_edges_and_diverged_runs():
    falling = np.linspace(2, 1, len(RATES))
    assert best_rate(RATES, falling) == (RATES[-1], 1.0, "high")
    assert best_rate(RATES, falling[::-1]) == (RATES[0], 1.0, "low")
    falling[-2:] = np.nan, np.inf  # the rate below the first that diverges is no edge, and no parabola passes there
    assert best_rate(RATES, falling) == (RATES[-3], falling[-3], "")


def test_several_curves_are_fitted_independently():
    """Vertices agree with NumPy's fit of three points, also next to an edge and to a run that diverged."""
    curves = np.exp(np.random.default_rng(0).normal(size=(50, len(RATES))))
    curves[7, :] = np.linspace(2, 1, len(RATES))
    curves[8, int(np.argmin(curves[8])) - 1] = np.inf
    best_rate_table = fit_minima(RATES, curves)
    for best, losses in zip(best_rate_table, curves, strict=True):
        alone = best_rate(RATES, losses)  # NumPy's logarithm of other numbers of elements may differ in the last digit
        assert (best.rate, best.loss) == pytest.approx((alone.rate, alone.loss), rel=1e-12)
        assert best.edge == alone.edge
    inner = [(best, losses) for best, losses in zip(best_rate_table, curves, strict=True) if best.rate not in RATES]
    assert 25 < len(inner) < 50
    for best, losses in inner:
        at = int(np.argmin(losses))
        fit = np.polynomial.Polynomial.fit(np.log(RATES[at - 1 : at + 2]), np.log(losses[at - 1 : at + 2]), 2)
        vertex = fit.deriv().roots()[0]
        assert (np.log(best.rate), np.log(best.loss)) == pytest.approx((vertex, fit(vertex)), abs=1e-9)


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
        best_rate(rates, losses)


def test_the_loss_that_a_grid_hides():
    """Bounds by hand: even and uneven neighbours, a diverged run on either side or both, and the edges."""
    rates = np.exp([0.0, 1.0, 3.0])
    left, right = np.exp([0.3, 0.6])
    assert grid_gap(rates, 5 * np.array([left, 1.0, right])) == pytest.approx(5 * 0.3 * (0.3 * 2 + 0.6) / 3 * 2)
    assert grid_gap(rates, np.array([left, 1.0, np.nan])) == pytest.approx(0.3 * 2)
    assert grid_gap(rates, np.array([np.inf, 1.0, right])) == pytest.approx(0.6 / 2)
    assert grid_gap(rates, np.array([np.inf, 1.0, np.inf])) == np.inf
    assert (grid_gap(rates, np.array([1.0, 2.0, 3.0])), grid_gap(rates, np.array([3.0, 2.0, 1.0]))) == (0.0, 0.0)


def test_how_far_the_best_rate_may_lie_beside_a_run_that_diverged():
    """Bounds by hand in log2: half the wider side next to diverged runs, 0 for a parabola and at an edge."""
    rates = np.array([1.0, 2.0, 16.0, 32.0])
    nan = np.nan
    for losses, gap in (
        ([2, 1, 2, 3], 0), ([2, 1, nan, 3], 1.5), ([nan, 1, 2, 3], 1.5), ([3, 2, 1, nan], 1.5),
        ([3, nan, 1, 2], 1.5), ([1, nan, 2, 3], 0), ([nan, nan, nan, 1], 0), ([nan, 3, 1, 2], 0),
    ):  # fmt: skip
        assert rate_gap(rates, np.array(losses, float)) == pytest.approx(gap)
    assert rate_gap(rates[:3], np.array([nan, 1, nan])) == pytest.approx(1.5)


def test_a_nearly_straight_curve_has_its_minimum_at_the_end() -> None:
    """The vertex of its parabola overflows and is not computed."""
    rates = np.array([1e-3, 1e-2, 1e-1])
    (best,) = fit_minima(rates, np.exp(-0.1 * np.log(rates) + 1e-6 * np.log(rates) ** 2)[None])
    assert (best.rate, best.edge) == (0.1, "high")
    # Two losses that differ, with logarithms that do not.
    (best,) = fit_minima(rates, np.array([[np.nextafter(100.0, 101.0), 100.0, 100.0]]))
    assert 1e-3 < best.rate < 1e-1
