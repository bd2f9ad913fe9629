"""Measured numbers that the advice uses."""

import csv
import json

import fill
import pytest

from rora_theory.advice import measured


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
