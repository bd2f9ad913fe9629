"""Calibration of a range: exact shares of known ratios, errors of the best rates, and ranges of no width."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rora_theory.advice.best_rate import RateRange
from rora_theory.errors import InputError
from rora_theory.evidence.calibration import calibrate
from rora_theory.evidence.sweeps import RunRecord, sweeps_of
from rora_theory.stats.estimate import Estimate

RATES = np.geomspace(1e-5, 1e-1, 41)


def within(factor: float):
    """Return the policy that keeps the rate and states a range of a factor on both sides."""
    return lambda *_: RateRange(1 / factor, 1.0, factor)


def models_with_ratios(ratios: list[float], rates=RATES):
    """Return sweeps of one pair each, whose best rates have the given ratio."""
    runs = [
        RunRecord(f"m{index}", rank, 32.0, "lora", rate, math.exp(0.02 * math.log(rate / best) ** 2))
        for index, ratio in enumerate(ratios)
        for rank, best in ((4, 1e-3), (64, 1e-3 * ratio))
        for rate in rates
    ]
    return sweeps_of(runs, "s")


def test_the_share_of_known_ratios() -> None:
    sweeps = models_with_ratios([1.1, 1.3, 0.7, 1.9, 2.1, 0.4, 1.0, 1.2, 0.8, 1.4])
    result = calibrate(sweeps, within(1.5))
    assert result.share.value == pytest.approx(0.7)
    # The jackknife of a share over ten models of one pair is its standard error.
    assert result.share.error == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    assert (result.pairs, result.models, result.share.over) == (10, 10, "models")
    assert result.median_width == pytest.approx(1.5**2)
    # 90% of ten pairs is the ninth: the ratio 2.1.
    assert result.needed_scale == pytest.approx(math.log(2.1) / math.log(1.5), rel=1e-3)


def test_errors_of_the_best_rates_widen_the_range() -> None:
    sweep = models_with_ratios([2.0])[0]
    fits = tuple(replace(fit, log2_rate=Estimate(fit.log2_rate.value, 0.4, 60, "repeated runs")) for fit in sweep.fits)
    vars(sweep)["fits"] = fits  # what cached_property stores
    # Distance of one octave; half width 0.58 octaves, and 1.645 times sqrt(2) times 0.4 octaves from the errors.
    result = calibrate([sweep], within(1.5))
    assert (result.share.value, result.share_with_errors.value) == (0.0, 1.0)
    assert calibrate([sweep], within(1.2)).share_with_errors.value == 0.0


def test_a_single_rate_is_a_range_without_width() -> None:
    sweeps = models_with_ratios([1.0, 1.5])
    result = calibrate(sweeps, within(1.0))
    assert result.share.value == 0.5
    assert result.needed_scale == math.inf
    assert calibrate(models_with_ratios([1.0]), within(1.0)).needed_scale == 0.0


def test_a_range_that_is_calibrated_by_construction() -> None:
    """Ratios are log-normal, and the range is their central 90%; the share of 400 has a standard error of 1.5%."""
    random = np.random.default_rng(4)
    ratios = np.exp(0.3 * random.normal(size=400))
    result = calibrate(models_with_ratios(ratios.tolist(), RATES[::4]), within(math.exp(0.3 * 1.6449)))
    # False alarm once in 15,000.
    assert abs(result.share.value - 0.9) < 4 * 0.015
    assert 0.85 < result.needed_scale < 1.15


def test_a_pair_is_needed() -> None:
    with pytest.raises(InputError, match="sweeps"):
        calibrate([], within(2.0))
