"""Measured numbers that the advice uses."""

import csv
import json

import fill
import pytest

from rora_theory.advice import measured
from rora_theory.errors import InputError


@pytest.mark.parametrize("steps", [16, 64, 256])
def test_constants_at_a_measured_number_of_steps_are_the_published_range(steps) -> None:
    """The default covers SmolLM2-135M and Gemma 3 270M, whose constants differ by a factor of about eight."""
    ranges = [entry["ranges"]["constant"] for entry in measured.ENTRIES.values() if entry.get("steps") == steps]
    low, high = measured.default_displacement_constants(steps)
    assert high == pytest.approx(max(high for _, high in ranges), rel=1e-12)
    # Gemma was not trained for 256 steps: its constant after 64 steps is used there.
    gemma = measured.ENTRIES["displacement_constant_64_steps_gemma"]["ranges"]["constant"]
    assert low == pytest.approx(gemma[0] if steps == 256 else min(low for low, _ in ranges), rel=1e-12)


def test_constants_between_and_outside_of_the_measured_steps() -> None:
    """32 steps are halfway from 16 to 64 in log steps: the ends are geometric means. Outside, the nearest counts."""
    constants = measured.default_displacement_constants
    (low_16, high_16), (low_64, high_64) = map(constants, (16, 64))
    assert constants(32) == pytest.approx(((low_16 * low_64) ** 0.5, (high_16 * high_64) ** 0.5), rel=1e-12)
    assert (constants(1), constants(9000)) == (pytest.approx(constants(16)), pytest.approx(constants(256)))
    assert constants() == pytest.approx((low_64, constants(256)[1])), "all measured numbers of steps"


def test_constants_cover_every_model(monkeypatch) -> None:
    other = {64: (300.0, 400.0)}
    monkeypatch.setitem(measured.MEASURED_CONSTANTS, "another", other)
    low = measured._constants_of_model("Gemma 3 270M", 64)[0]
    assert measured.default_displacement_constants(64) == pytest.approx((low, 400.0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_a_number_of_steps_out_of_range_is_refused(steps) -> None:
    with pytest.raises(InputError, match=f"steps .*{steps}"):
        measured.default_displacement_constants(steps)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_best_rate_at_an_end_of_its_grid_gives_no_exponent_in_the_steps(schedule, monkeypatch, tmp_path) -> None:
    """A steep exponent, planted among the published pairs, widens the range only if its best rate is not at an edge."""
    name = f"steps_exponents_{schedule}"
    entry = measured.ENTRIES[name]
    file = entry["rows"].split()[0]
    with (fill.PUBLISHED / file).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    (tmp_path / file).parent.mkdir()
    monkeypatch.setattr(fill, "PUBLISHED", tmp_path)
    monkeypatch.setattr(fill, "load_rows", fill.load_rows.__wrapped__)  # without its cache
    low, high = entry["ranges"]["exponent"]
    for edge, lowest in (("", -9.0), ("first", low), ("second", low), ("both", low)):
        planted = rows[0] | {"first": "16", "second": "256", "seeds": "3", "exponent": "-9.0", "edge": edge}
        with (tmp_path / file).open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows([*rows, planted])
        filled = json.loads(fill.fill_packaged(json.dumps({name: entry}), "data.json")[0])
        assert filled[name]["ranges"]["exponent"] == pytest.approx([lowest, high])


def test_exponents_in_the_steps_cover_the_schedules_that_were_measured(monkeypatch) -> None:
    """A constant rate has its own range. Any other schedule has the range over all measured schedules."""
    constant = measured.MEASURED_STEPS_EXPONENTS["constant"]
    monkeypatch.setitem(measured.MEASURED_STEPS_EXPONENTS, "cosine", (-0.31, -0.19))
    expected = tuple(round(end, 1) for end in constant)
    assert measured.steps_exponents() == measured.steps_exponents("constant", None) == expected
    for schedules in (("cosine",), ("linear",), ("constant", "cosine")):
        assert measured.steps_exponents(*schedules) == (expected[0], -0.2)
