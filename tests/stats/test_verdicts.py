"""Rules of all verdicts: gaps against intervals, ranges against rivals, equivalence within a margin."""

import math

import numpy as np
import pytest

from rora_theory.lab.sweep.law import RIVALS
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.verdicts import judge_equivalence, judge_gap, judge_gaps, judge_range, summarise_outcomes


@pytest.mark.parametrize(
    ("gap", "threshold", "expected"),
    [
        (0.02, 0.0, "agrees"), (0.021, 0.0, "contradicts"), (0.25, 0.25, "agrees"), (0.26, 0.25, "contradicts"),
        (0.26, 0.26, "undecided"), (0.0, 0.26, "undecided"), (math.nan, 0.1, "contradicts"),
        (0.1, math.nan, "contradicts"), (math.inf, math.inf, "contradicts"), (9.0, math.inf, "undecided"),
    ],
)  # fmt: skip
def test_a_gap_is_judged_against_its_threshold(gap: float, threshold: float, expected: str) -> None:
    assert judge_gap(gap, threshold) == expected


def test_several_gaps_are_judged_one_by_one_and_summarised() -> None:
    outcomes = judge_gaps(np.array([0.01, 0.5, 0.5]), np.array([0.1, 0.1, 0.6]))
    assert outcomes == ["agrees", "contradicts", "undecided"]
    assert summarise_outcomes(outcomes) == "fails"
    assert summarise_outcomes(outcomes[::2]) == "undecided"
    assert summarise_outcomes(outcomes[:1]) == summarise_outcomes([]) == "holds"


def test_a_difference_is_equal_or_different_only_with_its_whole_interval() -> None:
    def judged(value: float, half_width: float, threshold: float = 0.0) -> str:
        return judge_equivalence(value, half_width, margin=0.01, threshold=threshold)

    assert judged(0.005, 0.006) == "undecided"
    assert judged(-0.005, 0.005) == "equal", "the interval touches 0 and the margin"
    assert judged(0.001, 0.009) == "equal"
    assert judged(0.005, 0.004) == "differs", "smaller than the margin, and not 0"
    assert judged(-0.02, 0.001) == "differs"
    assert judged(-0.02, 0.015, threshold=0.01) == "undecided"
    assert judged(0.5, math.inf) == "undecided"


def test_a_range_needs_a_rival_that_the_interval_excludes() -> None:
    def judged(value: float, error: float, *, edge: bool = False, seeds: int = 2) -> str:
        slope = Estimate(value, error, 1000, "seeds")
        return judge_range(slope, (-0.55, -0.5), (-1.0, 0.0), is_bound=edge, seeds=seeds)

    assert judged(-0.52, 0.01) == "agrees"
    assert judged(-0.60, 0.03) == "agrees"
    assert judged(-0.60, 0.02) == "contradicts"
    assert judged(-0.45, 0.02) == "contradicts"
    assert judged(-0.70, 0.20) == "undecided", "-1 is within"
    assert judged(-0.30, 0.20) == "undecided", "0 is within"
    assert judged(-0.52, 0.01, edge=True) == "undecided"
    assert judged(-0.52, 0.01, seeds=1) == judged(-0.70, 0.01, seeds=1) == "undecided"
    assert judged(-0.52, math.inf) == "undecided"
    over_rank = Estimate(0.25, 0.13, 1000, "seeds")
    assert judge_range(over_rank, (0.0, 0.0), RIVALS["rank"], is_bound=False, seeds=3) == "undecided"
    assert judge_range(over_rank, (0.0, 0.0), (-1.0,), is_bound=False, seeds=3) == "agrees"
    equal = Estimate(2e-16, 0.0, 3, "seeds")  # seeds that agree to the digit: 0, but for rounding
    assert judge_range(equal, (0.0, 0.0), (-1.0,), is_bound=False, seeds=3) == "agrees"
    # A rival at the end of the range counts; one strictly inside is part of the prediction.
    near_zero = Estimate(0.05, 0.03, 1000, "seeds")
    for rival, verdict in ((0.0, "undecided"), (0.1, "agrees"), (0.3, "agrees")):
        assert judge_range(near_zero, (0.0, 0.3), (rival, 0.5), is_bound=False, seeds=3) == verdict
    for rivals in ((), (0.0,)):
        assert judge_range(over_rank, (0.0, 0.0), rivals, is_bound=False, seeds=3) == "undecided", "no rival"
