"""Measured numbers that the advice uses."""

import pytest

from rora_theory.advice import measured
from rora_theory.errors import InputError


@pytest.mark.parametrize("steps", [16, 64, 256])
def test_constants_at_a_measured_number_of_steps_are_the_published_range(steps) -> None:
    low, high = measured.ENTRIES[f"displacement_constant_{steps}_steps"]["ranges"]["constant"]
    assert measured.default_displacement_constants(steps) == pytest.approx((low, high), rel=1e-12)


def test_constants_are_interpolated_in_log_steps() -> None:
    """32 steps are halfway from 16 to 64 in log steps, so the ends are geometric means."""
    (low_16, high_16), (low_64, high_64) = map(measured.default_displacement_constants, (16, 64))
    expected = ((low_16 * low_64) ** 0.5, (high_16 * high_64) ** 0.5)
    assert measured.default_displacement_constants(32) == pytest.approx(expected, rel=1e-12)


def test_constants_outside_the_measured_steps_are_the_nearest() -> None:
    assert measured.default_displacement_constants(1) == pytest.approx(measured.default_displacement_constants(16))
    assert measured.default_displacement_constants(9000) == pytest.approx(measured.default_displacement_constants(256))


def test_constants_without_steps_cover_all_measured_numbers() -> None:
    expected = (measured.default_displacement_constants(16)[0], measured.default_displacement_constants(256)[1])
    assert measured.default_displacement_constants() == pytest.approx(expected)


def test_constants_cover_every_model(monkeypatch) -> None:
    other = {64: (300.0, 400.0)}
    monkeypatch.setitem(measured.MEASURED_CONSTANTS, "another", other)
    low = measured._constants_of_model("SmolLM2-135M", 64)[0]
    assert measured.default_displacement_constants(64) == pytest.approx((low, 400.0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_a_number_of_steps_out_of_range_is_refused(steps) -> None:
    with pytest.raises(InputError, match=f"steps .*{steps}"):
        measured.default_displacement_constants(steps)


def test_the_exponents_in_the_steps_bracket_one_half() -> None:
    low, high = measured.STEPS_EXPONENTS
    assert -1 < low < -0.5 < high < 0
