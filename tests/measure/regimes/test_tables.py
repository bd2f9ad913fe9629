"""Whether a table agrees with the law, and summaries by type of module."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.runs import frames
from rora_theory.stats.verdicts import RESOLUTION

PUBLISHED = Path(__file__).parents[3] / "results" / "published"


def row_of(measured: float, error: float, adapters: float = 1000, **more: object) -> dict:
    """Return a row with the prediction 2, and the measurement and its error in units of the prediction."""
    row = {"module": "m", "split": "train", "optimizer": "sgd", "init": "gaussian", "rank": 1, "predicted": 2.0}
    return row | {"measured": 2 * measured, "standard_error": 2 * error, "adapters": adapters} | more


def judge(*rows: dict) -> dict:
    return regime_tables.judge_regime(pd.DataFrame(rows))


WIDE = 0.26 / 2.58
"""A standard error whose bar is wider than a quarter of the prediction, at one comparison of many adapters."""


@pytest.mark.parametrize(
    ("rows", "verdict", "undecided"),
    [
        # The larger of 2% and the error bar, 2.58 standard errors at one comparison: not their sum, not the smaller.
        ([(1.019, 1e-9)], "holds", 0),
        ([(0.979, 1e-9)], "fails", 0),
        ([(1.1, 0.04)], "holds", 0),
        ([(0.88, 0.04)], "fails", 0),
        ([(1.03, 0.007)], "fails", 0),
        # A bar wider than a quarter decides nothing, unless the value lies outside it.
        ([(1.2, WIDE)], "undecided", 1),
        ([(0.8, WIDE)], "undecided", 1),
        ([(1.2, 0.24 / 2.58)], "holds", 0),
        ([(1.0, WIDE)], "undecided", 1),
        ([(1.27, WIDE)], "fails", 0),
        # Each figure has the bar of its own adapters: 12% off at an error of 3%.
        ([(0.88, 0.03, 1000), (1.0, 0.01, 4)], "fails", 0),
        ([(0.88, 0.03, 4), (1.0, 0.01, 1000)], "holds", 0),
        ([(20.0, 0.1, 1)], "fails", 0),
    ],
)
def test_verdicts_on_single_values(rows: list[tuple], verdict: str, undecided: int) -> None:
    judged = judge(*(row_of(*row) for row in rows))
    assert (judged["verdict"], judged["undecided"], judged["outside"]) == (verdict, undecided, int(verdict == "fails"))


def test_few_adapters_and_many_comparisons_are_undecided() -> None:
    """Four adapters at a false-alarm rate of 1e-5 have an error bar of 60 standard errors, which includes twice the
    law.
    """
    assert judge(row_of(1.0, 0.1))["error_bars_in_standard_errors"] == {"1000": pytest.approx(2.58, abs=0.01)}
    two_rows = judge(row_of(1.0, 0.1), row_of(1.0, 1.0, adapters=4))
    assert two_rows["error_bars_in_standard_errors"]["4"] == pytest.approx(7.45, abs=0.01)  # Student's t, at half of it
    rows = [row_of(2.0, 0.05, adapters=4)] + [row_of(1.0, 0.05, adapters=4)] * 999
    judged = judge(*rows)
    assert judged["error_bars_in_standard_errors"]["4"] > 55
    assert (judged["verdict"], judged["undecided"], judged["outside"]) == ("undecided", 1000, 0)
    assert judge(*rows, row_of(9.0, 0.05, adapters=4))["verdict"] == "fails", "a failure outranks undecided values"
    counts = "undecided.* 1000 of 1000 .*2%.* 0.01.*, 1000 of them .*25%.*99.9% within 2%.*100.0%"
    assert re.search(counts, regime_tables.describe_verdict(judged))


@pytest.mark.parametrize(
    ("measured", "error"), [(math.nan, math.nan), (math.inf, math.nan), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_non_finite_measurement_fails(measured: float, error: float) -> None:
    """It fails if adapters were drawn; rows without adapters were not tested.

    The other figures are over finite rows.
    """
    wrong, untried = row_of(measured, error), row_of(math.nan, math.nan, adapters=math.nan)
    judged = judge(row_of(1.01, 0.01), wrong, untried)
    assert (judged["verdict"], judged["comparisons"], judged["outside"], judged["not_finite"]) == ("fails", 2, 1, 1)
    assert (judged["largest_deviation"], judged["largest_t"]) == pytest.approx((0.01, 1.0))
    assert judged["nearest_to_failing"]["measured"] == 2.02
    assert re.search("fails.* 1 of 2 .*2%.* 0.01.*; 1 not finite", regime_tables.describe_verdict(judged))
    alone = judge(wrong)
    assert (alone["verdict"], alone["largest_deviation"], alone["nearest_to_failing"]) == ("fails", None, None)
    assert regime_tables.describe_verdict(alone).endswith(" within 2%")
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in alone.values())
    table = regime_tables.measured_over_predicted(pd.DataFrame([row_of(1.0, 0.01), wrong]))
    assert not np.isfinite(table[["mean_ratio", "standard_error"]].to_numpy(float)).all(), (
        "the non-finite value is not dropped"
    )
    assert judge(untried) is None
    assert judge({"predicted": 1.0}) is None


def test_the_published_verdict_is_reproduced() -> None:
    """The published rows are a fifteenth of those measured."""
    published = json.loads((PUBLISHED / "regime" / "verdict.json").read_text())
    judged = regime_tables.judge_regime(frames.read_csv(PUBLISHED / "regime" / "results.csv"))
    assert (judged["verdict"], judged["outside"], judged["undecided"]) == (published["verdict"], 0, 0)
    widest = max(published["error_bars_in_standard_errors"].values()) * judged["median_relative_standard_error"]
    assert widest < RESOLUTION, "also at the number of comparisons of the whole run"


def test_agreement_is_a_mean_over_modules() -> None:
    """The mean is the root of the mean square, with its first-order error: m = sqrt((1/4 + 4) / 2) of 1/2 ± 0.03 and
    2 ± 0.01. The mean of four equal independent modules has half of the error of one.
    """
    rows = [row_of(1.0, 0.02)] * 4 + [row_of(0.5, 0.03, split="heldout"), row_of(2.0, 0.01, split="heldout")]
    table = regime_tables.measured_over_predicted(pd.DataFrame(rows))
    assert table[["split", "modules"]].to_numpy().tolist() == [["train", 4], ["heldout", 2]]
    mean = math.sqrt((0.25 + 4.0) / 2)
    error = math.hypot(0.5 * 0.03, 2.0 * 0.01) / 2 / mean
    figures = table[["mean_ratio", "standard_error", "largest_deviation", "largest_t"]].to_numpy(float)
    np.testing.assert_allclose(figures, [[1, 0.01, 0, 0], [mean, error, 1, 100]], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("run", ["regime_held_out", "regime_after/plain_16"])
def test_published_summaries(run) -> None:
    crossings, crossing_distances = (
        frames.read_csv(PUBLISHED / run / name) for name in (regime_tables.CROSSINGS, regime_tables.CROSSING_DISTANCES)
    )
    for name, expected in regime_tables.summaries(crossings, crossing_distances).items():
        pd.testing.assert_frame_equal(frames.read_csv(PUBLISHED / run / name), expected, check_dtype=False, rtol=1e-12)
