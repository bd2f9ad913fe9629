"""Verdicts on a claim from an estimate and its interval: the rules that every experiment of this package shares.

Three questions have a rule each. Is a value the claimed one (`judge_gap`)? Does a range of predictions describe it,
against rival predictions (`judge_range`)? Is it negligible (`judge_equivalence`)? Each rule answers "undecided" where
the data cannot distinguish the alternatives. `summarise_outcomes` combines several comparisons into one verdict.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from rora_theory.stats.estimate import ROUNDING, Estimate

Outcome = Literal["agrees", "contradicts", "undecided"]
"""Result of one comparison with a claim."""

Status = Literal["holds", "fails", "undecided"]
"""Verdict on a claim from all its comparisons."""

TOLERANCE = 0.02
"""Relative difference up to which a value counts as agreeing with an exact one."""

RESOLUTION = 0.25
"""Relative half-width of an interval above which a comparison is undecided: a value off by a quarter could pass."""


def judge_gap(
    gap: float, half_width: float, *, tolerance: float = TOLERANCE, resolution: float = RESOLUTION
) -> Outcome:
    """Compare an estimate with a claimed value.

    Args:
      gap: Absolute difference between the estimate and the claim; NaN contradicts the claim.
      half_width: Largest difference that sampling error alone explains, in the same unit; NaN contradicts the claim.
      tolerance: Largest difference that is negligible.
      resolution: Half-width above which the comparison cannot detect a relevant difference.

    Returns:
      ``contradicts`` if the gap exceeds both the tolerance and the half-width; ``agrees`` if it does not and the
      half-width is at most the resolution; ``undecided`` otherwise.

    Examples:
      >>> judge_gap(0.01, 0.02), judge_gap(24.8, 5.0), judge_gap(24.8, 33.0)
      ('agrees', 'contradicts', 'undecided')
    """
    # A NaN compares false with everything, and must not pass.
    if not math.isfinite(gap) or math.isnan(half_width) or gap > max(tolerance, half_width):
        return "contradicts"
    return "agrees" if half_width <= resolution else "undecided"


def judge_gaps(
    gaps: Float[np.ndarray, " n"],
    half_widths: Float[np.ndarray, " n"],
    *,
    tolerance: float = TOLERANCE,
    resolution: float = RESOLUTION,
) -> list[Outcome]:
    """Apply `judge_gap` to several estimates."""
    return [
        judge_gap(gap, half_width, tolerance=tolerance, resolution=resolution)
        for gap, half_width in zip(gaps.tolist(), half_widths.tolist(), strict=True)
    ]


def summarise_outcomes(outcomes: Iterable[Outcome]) -> Status:
    """Return the verdict on a claim: one contradiction fails it, and one undecided comparison leaves it undecided.

    Examples:
      >>> summarise_outcomes(["agrees", "undecided"]), summarise_outcomes(["undecided", "contradicts"])
      ('undecided', 'fails')
    """
    outcomes = set(outcomes)
    if "contradicts" in outcomes:
        return "fails"
    return "undecided" if "undecided" in outcomes else "holds"


def judge_range(
    estimate: Estimate, prediction: tuple[float, float], rivals: Sequence[float], *, is_bound: bool, seeds: int
) -> Outcome:
    """Compare a measured value with a range of predictions and with rival predictions.

    A value supports a prediction only against a rival: an interval that contains both supports neither.

    Args:
      estimate: Measured value.
      prediction: Smallest and largest predicted value.
      rivals: Values predicted by rival explanations. Those strictly inside the predicted range are ignored, because the
        prediction includes them; so is one that is itself the only predicted value.
      is_bound: Whether the value is only a bound, because it comes from a best rate at the end of its grid.
      seeds: Number of seeds behind the value.

    Returns:
      ``contradicts`` if the 95% interval misses the range; ``agrees`` if it meets the range and excludes every rival;
      ``undecided`` if it contains a rival, there is no rival, the value is a bound, or there is one seed, whose error
      leaves out how one training run differs from the next.
    """
    # A bound, or a value without an error over seeds, decides nothing.
    if is_bound or seeds < 2 or not math.isfinite(estimate.half_width()):
        return "undecided"
    low, high = estimate.value - estimate.half_width(), estimate.value + estimate.half_width()
    if high < prediction[0] - ROUNDING or low > prediction[1] + ROUNDING:
        return "contradicts"
    # The prediction gains support only if the interval excludes what rivals predict instead.
    distinct_rivals = [
        rival
        for rival in rivals
        if not prediction[0] < rival < prediction[1] and not prediction[0] == rival == prediction[1]
    ]
    if not distinct_rivals or any(low <= rival <= high for rival in distinct_rivals):
        return "undecided"
    return "agrees"


def judge_equivalence(
    value: float, half_width: float, *, margin: float, threshold: float
) -> Literal["equal", "differs", "undecided"]:
    """Decide whether a difference is negligible.

    Args:
      value: Estimated difference.
      half_width: Half-width of its interval.
      margin: Largest absolute difference that is negligible.
      threshold: Absolute difference beyond which the whole interval must lie to count as a difference.

    Returns:
      ``differs`` if the whole interval lies beyond the threshold; ``equal`` if it lies within the margin;
      ``undecided`` otherwise.

    Examples:
      >>> [judge_equivalence(value, 0.02, margin=0.1, threshold=0.1) for value in (0.05, 0.09, 0.2)]
      ['equal', 'undecided', 'differs']
    """
    if abs(value) - half_width > threshold:
        return "differs"
    return "equal" if abs(value) + half_width <= margin else "undecided"
