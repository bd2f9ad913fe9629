r"""What the published tables can bear: arithmetic, chance, repetition, granularity, sampling error.

Accuracies of n items have the standard error :math:`\sqrt{p(1-p)/n}`, and their average over eight tasks
:math:`\sqrt{\sum_t p_t(1-p_t)/n_t}/8`, with n the sizes of the full evaluation sets. Two rows of a table were
scored on the same items, which usually makes their gap less uncertain than two independent sets would: per
item the difference is -1, 0 or 1, so its variance lies between :math:`|g| - g^2` (one method is right
wherever the other is) and :math:`p(1-p) + q(1-q) + 2\sqrt{p(1-p)q(1-q)}`. Which holds needs the per-item
answers, which are not published; gaps are judged here as if independent, and seeds add to that.

Every function returns findings, facts about printed numbers with the figures that show them. A finding is a
reason to look, not a verdict on its cause.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rora_theory.commonsense.published import NAMES, Claim, Row
from rora_theory.commonsense.tasks import TASKS
from rora_theory.errors import InputError

SIZES = tuple(task.full_size for task in TASKS.values())
CHANCE = tuple(100.0 / task.full_choices for task in TASKS.values())
"""Accuracy of guessing, in percent (ARC's few items of 3 or 5 choices change it by less than 0.01)."""

HALF = 0.05
"""Half a unit of the last printed digit."""


@dataclass(frozen=True)
class Finding:
    """One fact about the printed numbers.

    Attributes:
      kind: which check found it.
      where: the row or rows.
      text: one sentence with the figures.
      printed, expected: the two figures that differ, where there are two.
      z: distance in standard errors, where there is one.
    """

    kind: str
    where: str
    text: str
    printed: float | None = None
    expected: float | None = None
    z: float | None = None


def score_error(percent: float, size: int) -> float:
    """Standard error, in points, of an accuracy in percent over ``size`` items."""
    share = percent / 100.0
    return 100.0 * math.sqrt(share * (1.0 - share) / size)


def average_error(scores: Sequence[float], sizes: Sequence[int] = SIZES) -> float:
    """Standard error, in points, of the unweighted average of accuracies in percent."""
    variance = sum(score_error(score, size) ** 2 for score, size in zip(scores, sizes, strict=True))
    return math.sqrt(variance) / len(scores)


def averages(rows: Sequence[Row]) -> list[Finding]:
    """Printed averages that rounding of the eight entries and of the average cannot bring to their mean.

    Eight entries rounded to 0.1 move their mean by at most 0.05, and so does printing the mean: 0.1 in all.
    """
    found = []
    for row in rows:
        if abs(row.average - mean(row)) > 2 * HALF + 1e-9:
            text = f"prints the average {row.average:.1f}; its eight entries average {mean(row):.2f}"
            found.append(Finding("average", row.label, text, row.average, mean(row)))
    return found


def differences(rows: Sequence[Row], claims: Sequence[Claim]) -> list[Finding]:
    """Quoted differences that are not the difference of the printed averages, or not that of the rows' entries.

    A difference of two means of eight rounded entries is known to 0.1; printing it adds 0.05.
    """
    found = []
    for claim in claims:
        ours, theirs = claimed_rows(rows, claim)
        printed = ours.average - theirs.average
        exact = mean(ours) - mean(theirs)
        if abs(printed - claim.printed) > 1e-6 or abs(exact - claim.printed) > 3 * HALF + 1e-9:
            text = (
                f"quotes {claim.printed:.1f} points over {claim.against}; the printed averages "
                f"{ours.average:.1f} and {theirs.average:.1f} differ by {printed:.1f}, the rows' entries by "
                f"{exact:.2f}"
            )
            found.append(Finding("difference", claim.place, text, claim.printed, exact))
    return found


def mean(row: Row) -> float:
    """Average of a row's eight printed entries."""
    return math.fsum(row.scores) / len(row.scores)


def claimed_rows(rows: Sequence[Row], claim: Claim) -> tuple[Row, Row]:
    """The two rows a claim compares.

    Raises:
      InputError: a row is missing or not unique.
    """

    def pick(method: str, rank: int | None) -> Row:
        fits = [row for row in rows if (row.model, row.method, row.rank) == (claim.model, method, rank) and row.table]
        if len(fits) != 1:
            raise InputError(f"{len(fits)} rows are {claim.model} {method} rank {rank}; accepted is one")
        return fits[0]

    return pick(claim.method, claim.rank), pick(claim.against, claim.against_rank)


def best_marks(rows: Sequence[Row]) -> list[Finding]:
    """Rows marked best that are not the best average of their model and method, or the reverse."""
    found = []
    for key, group in _grouped(rows, lambda row: (row.model, row.method)).items():
        if not any(row.marked_best for row in group):
            continue
        top = max(row.average for row in group)
        for row in group:
            if row.marked_best != (row.average == top):
                marked = "is" if row.marked_best else "is not"
                text = f"{marked} marked best at {row.average:.1f}; the best of {' '.join(key)} is {top:.1f}"
                found.append(Finding("best", row.label, text, row.average, top))
    return found


def below_chance(rows: Sequence[Row], *, z: float = 2.0) -> list[Finding]:
    """Entries more than ``z`` standard errors below guessing evenly among the choices.

    Under the published protocol such an entry counts unparsed answers as wrong, or the run is broken;
    knowledge cannot be the cause.
    """
    found = []
    for row in rows:
        for name, score, size, chance in zip(NAMES, row.scores, SIZES, CHANCE, strict=True):
            distance = (score - chance) / score_error(chance, size)
            if distance < -z:
                text = f"{name} {score:.1f} is below chance {chance:.1f} by {-distance:.1f} standard errors"
                found.append(Finding("below chance", row.label, text, score, chance, distance))
    return found


def repeated(rows: Sequence[Row], *, least: int = 4) -> list[Finding]:
    """Pairs of rows of one model and source with at least ``least`` of the eight entries equal to the digit.

    Two runs of equal true accuracy and independent errors print the same 0.1 with a probability of about 0.1
    over 3.5 standard errors: 0.02 at 1200 items near 50%. Four coincidences of eight are then below 1e-4.
    """
    found = []
    for group in _grouped(rows, lambda row: (row.source, row.model)).values():
        for first, second in itertools.combinations(group, 2):
            same = [name for name, a, b in zip(NAMES, first.scores, second.scores, strict=True) if a == b]
            if len(same) >= least:
                text = f"{len(same)} of 8 entries are equal: {', '.join(same)}"
                found.append(Finding("repeated", f"{first.label} = {second.label}", text, float(len(same))))
    return found


def taken_over(rows: Sequence[Row], anchors: Sequence[Row]) -> list[Finding]:
    """Rows whose eight entries all equal those of an earlier publication: numbers carried over, not run again."""
    return [
        Finding("taken over", row.label, f"all eight entries are those of {anchor.label}")
        for row in rows
        for anchor in anchors
        if row.model == anchor.model and row.scores == anchor.scores
    ]


def impossible(rows: Sequence[Row]) -> list[Finding]:
    """Entries that no number of right answers out of the full set gives (only OBQA's 500 items are this coarse)."""
    found = []
    for row in rows:
        for name, score, size in zip(NAMES, row.scores, SIZES, strict=True):
            if not possible(score, size):
                text = f"{name} {score:.1f} is not k/{size} for any k, to the printed digit"
                found.append(Finding("impossible", row.label, text, score))
    return found


def possible(percent: float, size: int) -> bool:
    """Whether some count of ``size`` items prints as ``percent`` to one decimal, rounded to nearest either
    way at ties."""
    near = percent * size / 100.0
    return any(abs(100.0 * count / size - percent) <= HALF + 1e-9 for count in (math.floor(near), math.ceil(near)))


def within_noise(rows: Sequence[Row], method: str = "RoRA", *, z: float = 2.0) -> list[Finding]:
    """Entries and averages whose gap to the best other row of the group is below ``z`` standard errors of a gap.

    A group is one table, model and rank. Positive and negative gaps count alike; test sets as if independent
    (module docstring), one run each.
    """
    found = []
    for group in _grouped(rows, lambda row: (row.source, row.table, row.model, row.rank)).values():
        ours = [row for row in group if row.method == method]
        others = [row for row in group if row.method != method]
        if not ours or not others:
            continue
        row, best = ours[0], max(others, key=lambda other: other.average)
        pairs = [
            (name, a, b, math.hypot(score_error(a, size), score_error(b, size)))
            for name, a, b, size in zip(NAMES, row.scores, best.scores, SIZES, strict=True)
        ]
        error = math.hypot(average_error(row.scores), average_error(best.scores))
        for name, ours_, theirs, spread in [*pairs, ("average", row.average, best.average, error)]:
            distance = (ours_ - theirs) / spread
            if abs(distance) < z:
                text = (
                    f"{name}: {ours_:.1f} against {best.method}'s {theirs:.1f} is {ours_ - theirs:+.1f} "
                    f"points, {abs(distance):.1f} standard errors ({spread:.1f})"
                )
                found.append(Finding("within noise", row.label, text, ours_, theirs, distance))
    return found


# Layers, hidden, key/value width, intermediate, parameters in all, of the models whose shares Table I prints.
MODELS = {
    "LLaMA-7B": (32, 4096, 4096, 11008, 6_738_415_616),
    "LLaMA-13B": (40, 5120, 5120, 13824, 13_015_864_320),
    "LLaMA2-7B": (32, 4096, 4096, 11008, 6_738_415_616),
    "LLaMA3-8B": (32, 4096, 1024, 14336, 8_030_261_248),
}


def lora_percent(model: str, rank: int) -> float:
    """Trainable share, in percent of base and adapter together, of LoRA on q, k, v, up and down (published targets)."""
    layers, hidden, keys, inner, total = MODELS[model]
    widths = (hidden + hidden) + 2 * (hidden + keys) + 2 * (hidden + inner)
    own = layers * rank * widths
    return 100.0 * own / (total + own)


def parameter_shares(rows: Sequence[Row], *, stated_rank: int = 128, method: str = "RoRA") -> list[Finding]:
    """Printed parameter shares of ``method`` that are not those of the rank the text states for its best row."""
    found = []
    for row in rows:
        if row.params_percent is None or row.method != method or row.model not in MODELS:
            continue
        expected = lora_percent(row.model, stated_rank)
        if abs(row.params_percent - expected) > 0.1 * expected:
            odds = [percent / (100 - percent) for percent in (row.params_percent, expected)]
            implied = stated_rank * odds[0] / odds[1]  # own / total is proportional to the rank
            text = (
                f"prints {row.params_percent:.2f}% trainable; rank {stated_rank} trains {expected:.2f}%, the "
                f"printed share is rank {implied:.0f}'s"
            )
            found.append(Finding("parameter share", row.label, text, row.params_percent, expected))
    return found


def audit(rows: Sequence[Row], claims: Sequence[Claim]) -> list[Finding]:
    """Every check of this module on the paper's rows, the repository's rows serving as anchors."""
    paper = [row for row in rows if row.source == "RoRA paper"]
    anchors = [row for row in rows if row.source != "RoRA paper"]
    return [
        *averages(rows),
        *differences(paper, claims),
        *best_marks(paper),
        *below_chance(rows),
        *repeated(rows),
        *taken_over(paper, anchors),
        *impossible(rows),
        *within_noise(paper),
        *parameter_shares(paper),
    ]


def _grouped(rows: Sequence[Row], key: Callable[[Row], tuple[object, ...]]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
