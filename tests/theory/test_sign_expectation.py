"""The series for E[sign(g . a) a]: against the integral over each t, and which rows it serves."""

import numpy as np
import pytest

from rora_theory.theory import laws, sign_expectation


def rows(count: int, p_in: int, *, peak: float, seed: int = 0) -> np.ndarray:
    """Unit rows whose first entries have about the share ``peak`` of the square."""
    random = np.random.default_rng(seed)
    plain = random.normal(size=(count, p_in)) * np.geomspace(1, 0.1, p_in)
    plain[:, 1:] *= np.sqrt((1 - peak) / np.sum(plain[:, 1:] ** 2, axis=1))[:, None]
    plain[:, 0] = np.sqrt(peak)
    return plain


@pytest.mark.parametrize("peak", [0.0, 0.3, 0.8, 0.94])
def test_series_is_the_integral(monkeypatch, peak) -> None:
    """Ends at 12, 24 and 48; 1e-10 of the largest is what the integral itself promises."""
    unit = rows(4, 900, peak=peak)
    done, found = sign_expectation.uniform(unit)
    assert done.all()
    monkeypatch.setattr(sign_expectation, "uniform", lambda u: (np.zeros(len(u), bool), np.zeros_like(u)))
    laws._sign_direction.cache_clear()
    expected = laws._sign_direction(unit.tobytes(), unit.shape, "uniform")
    laws._sign_direction.cache_clear()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.max(np.abs(expected)))


def test_rows_left_to_the_integral() -> None:
    """A row of one entry, a short row and a row of zeros are not served, and their neighbours are."""
    unit = rows(4, 300, peak=0.2)
    unit[1] = np.eye(300)[7]
    unit[3] = 0
    done, found = sign_expectation.uniform(unit)
    assert done.tolist() == [True, False, True, False]
    assert not found[[1, 3]].any()
    assert not sign_expectation.uniform(rows(2, 3, peak=0.3))[0].any()


def test_nearly_gaussian_rows() -> None:
    """Many equal entries: sqrt(2/pi) g, with the correction -(kurtosis - 3)/(24 p) that Edgeworth's series gives.

    E[sign(u) a_j] = d E|u| / d g_j, and E|u| = sqrt(2/pi) (1 - k4 / 24) for a sum of fourth cumulant k4 = -1.2 S4.
    """
    p_in = 400
    unit = np.full((1, p_in), 1 / np.sqrt(p_in))
    done, found = sign_expectation.uniform(unit)
    assert done.all()
    total = float(np.sum(found * unit))  # E|u|
    assert total == pytest.approx(np.sqrt(2 / np.pi) * (1 + 1.2 / p_in / 24), rel=3e-6)  # next term ~ 1/p^2
