"""The series for E[sign(g . a) a] against the integral over t, and the rows it applies to."""

import numpy as np
import pytest

from rora_theory.laws import moments, sign_expectation


def rows(count: int, p_in: int, *, peak: float, seed: int = 0) -> np.ndarray:
    """Return unit rows whose first entries have about the share ``peak`` of the square."""
    random = np.random.default_rng(seed)
    plain = random.normal(size=(count, p_in)) * np.geomspace(1, 0.1, p_in)
    plain[:, 1:] *= np.sqrt((1 - peak) / np.sum(plain[:, 1:] ** 2, axis=1))[:, None]
    plain[:, 0] = np.sqrt(peak)
    return plain


@pytest.mark.parametrize("peak", [0.0, 0.3, 0.8, 0.94])
def test_series_is_the_integral(monkeypatch, peak) -> None:
    """The series agrees with the integral at the ends 12, 24 and 48, to the integral's own accuracy of 1e-10."""
    unit = rows(4, 900, peak=peak)
    done, actual = sign_expectation.uniform(unit)
    assert done.all()
    monkeypatch.setattr(sign_expectation, "uniform", lambda u: (np.zeros(len(u), bool), np.zeros_like(u)))
    moments._sign_direction.cache_clear()
    expected = moments._sign_direction(unit.tobytes(), unit.shape, "uniform")
    moments._sign_direction.cache_clear()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10 * np.max(np.abs(expected)))


def test_rows_left_to_the_integral() -> None:
    """A row of one entry, a short row and a row of zeros are not computed; their neighbours are."""
    unit = rows(4, 300, peak=0.2)
    unit[1] = np.eye(300)[7]
    unit[3] = 0
    done, actual = sign_expectation.uniform(unit)
    assert done.tolist() == [True, False, True, False]
    assert not actual[[1, 3]].any()
    assert not sign_expectation.uniform(rows(2, 3, peak=0.3))[0].any()


@pytest.mark.parametrize("kind", ["normal", "heavy", "wide", "heavier"])
def test_the_fast_series(kind) -> None:
    """The error is below 1e-3 of a row's norm, also in rows with heavy tails."""
    random = np.random.default_rng(0)
    freedom = {"heavy": 2, "wide": 2, "heavier": 0.7}.get(kind)
    unit = random.standard_t(freedom, size=(40, 700)) if freedom else random.normal(size=(40, 700))
    unit *= np.geomspace(1, 1e-3, 700) if kind == "wide" else 1.0
    unit[3] = 0
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    actual = sign_expectation.uniform_fast(unit)
    expected = moments.sign_direction(unit, "uniform")
    assert np.linalg.norm(actual - expected, axis=1).max() < 1e-3
    assert not actual[3].any()


@pytest.mark.parametrize("rest", [0.1, 0.03, 3e-3, 3e-4, 3e-5, 1e-6, 0.0])
def test_the_fast_series_of_rows_with_few_large_entries(rest) -> None:
    """One, two or three entries have nearly the whole square, as in modules with massive activations."""
    random = np.random.default_rng(1)
    unit = np.sqrt(rest) * random.normal(size=(5, 200)) / np.sqrt(200)
    for row, large in enumerate(([1.0], [1.0, 1.0], [1.0, -0.4], [0.9, 0.5, -0.4], [0.6, 0.6, 0.6])):
        unit[row, 10 : 10 + len(large)] = np.sqrt(1 - rest) * np.array(large) / np.linalg.norm(large)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    actual, expected = sign_expectation.uniform_fast(unit), moments.sign_direction(unit, "uniform")
    assert np.linalg.norm(actual - expected, axis=1).max() < 1e-3
    # The direction of the small entries is right, too: it decides the signal of tokens without the large ones.
    small = np.ones(200, bool)
    small[10:13] = False
    scale = np.linalg.norm(expected[:, small], axis=1)
    assert np.all(np.linalg.norm((actual - expected)[:, small], axis=1) <= 0.02 * scale)


def test_the_fast_series_of_short_rows() -> None:
    """E|a| = sqrt(3)/2 for one entry of variance 1; for two equal entries each has 2/3 of it."""
    half = np.sqrt(3) / 2
    np.testing.assert_allclose(sign_expectation.uniform_fast(np.array([[1.0], [-1.0]])), [[half], [-half]], atol=5e-4)
    pair = sign_expectation.uniform_fast(np.full((1, 2), np.sqrt(0.5)))
    np.testing.assert_allclose(pair, [[half * 2 / 3] * 2], atol=5e-4)


def test_the_fast_series_in_closed_form() -> None:
    """Without large entries it is the expansion to second order in 1 / p_in."""
    random = np.random.default_rng(0)
    g = random.uniform(0.5, 1.5, size=(5, 300))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    fourth, sixth = -6 / 5, 48 / 7
    q4, q6 = (np.sum(g**n, axis=1, keepdims=True) for n in (4, 6))
    closed = g * (1 + fourth * q4 / 8 - sixth * q6 / 48 + 105 / 1152 * fourth**2 * q4**2)
    closed += -fourth / 6 * g**3 * (1 + 5 / 8 * fourth * q4) + sixth / 40 * g**5
    exact = moments.sign_direction(g, "uniform") / np.sqrt(2 / np.pi)
    actual = sign_expectation.uniform_fast(g)
    assert sign_expectation.uniform(g)[0].all(), "the exact values are the series', not the integral's"
    np.testing.assert_allclose(closed, exact, rtol=3e-6)
    np.testing.assert_allclose(actual / np.sqrt(2 / np.pi), exact, rtol=3e-6)
    assert np.abs(g / exact - 1).max() > 1e-4  # the correction is no rounding
