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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rora_theory.data.tasks import TASKS
from rora_theory.errors import InputError
from rora_theory.paper.published import NAMES, Claim, PublishedRow
from rora_theory.stats.estimate import in_errors

SIZES = tuple(task.full_size for task in TASKS.values())
CHANCE = tuple(100.0 / task.full_choices for task in TASKS.values())
"""Accuracy of guessing, in percent (ARC's few items of 3 or 5 choices change it by less than 0.01)."""

HALF = 0.05
"""Half a unit of the last printed digit."""

HALF_EXACT = Fraction(1, 20)


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


def averages(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Printed averages that no eight counts of right answers give which print as the row's entries."""
    found = []
    for row in rows:
        low, high = mean_bounds(row)
        if not low - HALF_EXACT <= _exact(row.average) <= high + HALF_EXACT:
            text = (
                f"prints the average {row.average:.1f}; its eight entries, counts out of the test sets' sizes, average "
                f"{_spread(low, high)}"
            )
            found.append(Finding("average", row.label, text, row.average, mean(row)))
    return found


def mean_bounds(row: PublishedRow) -> tuple[Fraction, Fraction]:
    """Least and largest average of the eight accuracies, in percent: each is k/n of its test set and prints as it does.

    An entry that is no such count (`impossible`) counts with all that rounds to it.
    """
    ends = []
    for score, size in zip(row.scores, SIZES, strict=True):
        counts = possible_counts(score, size)
        printed = _exact(score)
        ends.append(
            (Fraction(100 * counts[0], size), Fraction(100 * counts[-1], size))
            if counts
            else (printed - HALF_EXACT, printed + HALF_EXACT)
        )
    lows, highs = zip(*ends, strict=True)
    return sum(lows, Fraction()) / len(lows), sum(highs, Fraction()) / len(highs)


def possible_counts(percent: float, size: int) -> range:
    """Counts of ``size`` items that print as ``percent`` to one decimal, rounded to nearest, either way at ties."""
    low, high = (_exact(percent) + sign * HALF_EXACT for sign in (-1, 1))
    return range(max(math.ceil(low * size / 100), 0), min(math.floor(high * size / 100), size) + 1)


def differences(rows: Sequence[PublishedRow], claims: Sequence[Claim]) -> list[Finding]:
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


def mean(row: PublishedRow) -> float:
    """Average of a row's eight printed entries."""
    return math.fsum(row.scores) / len(row.scores)


def claimed_rows(rows: Sequence[PublishedRow], claim: Claim) -> tuple[PublishedRow, PublishedRow]:
    """The two rows a claim compares.

    Raises:
      InputError: a row is missing or not unique.
    """

    def pick(method: str, rank: int | None) -> PublishedRow:
        fits = [row for row in rows if (row.model, row.method, row.rank) == (claim.model, method, rank) and row.table]
        if len(fits) != 1:
            raise InputError(f"{len(fits)} rows are {claim.model} {method} rank {rank}; accepted is one")
        return fits[0]

    return pick(claim.method, claim.rank), pick(claim.against, claim.against_rank)


def best_marks(rows: Sequence[PublishedRow]) -> list[Finding]:
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


def below_chance(rows: Sequence[PublishedRow], *, z: float = 2.0) -> list[Finding]:
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


def repeated(rows: Sequence[PublishedRow], *, least: int = 4) -> list[Finding]:
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


def copied(rows: Sequence[PublishedRow], anchors: Sequence[PublishedRow], *, least: int = 4) -> list[Finding]:
    """Rows with at least ``least`` entries of one earlier published row of their model: numbers carried over, not run
    again. Of several such rows the one with the most equal entries counts, the first published where they tie.

    ``printed`` is the number of equal entries of eight.
    """
    found = []
    for row in rows:
        same = [
            (sum(a == b for a, b in zip(row.scores, anchor.scores, strict=True)), anchor)
            for anchor in anchors
            if anchor.model == row.model
        ]
        count, anchor = max(same, key=lambda pair: pair[0], default=(0, None))
        if anchor is not None and count >= least:
            averages_ = (
                "" if row.average == anchor.average else f" (average {row.average:.1f} for {anchor.average:.1f})"
            )
            text = f"{count} of 8 entries are those of {anchor.label}{averages_}"
            found.append(Finding("copied", row.label, text, float(count)))
    return found


def impossible(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Entries that no number of right answers out of the full set gives (only OBQA's 500 items are this coarse)."""
    found = []
    for row in rows:
        for name, score, size in zip(NAMES, row.scores, SIZES, strict=True):
            if not possible_counts(score, size):
                text = f"{name} {score:.1f} is not k/{size} for any k, to the printed digit"
                found.append(Finding("impossible", row.label, text, score))
    return found


def within_noise(rows: Sequence[PublishedRow], method: str = "RoRA", *, z: float = 2.0) -> list[Finding]:
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
            distance = in_errors(ours_ - theirs, spread)
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


STATED_RANKS = {("LLaMA-7B", "RoRA"): 128}
"""Ranks of Table I's rows that the paper states: Sec. IV and Fig. 1, for this row alone."""


def parameter_shares(
    rows: Sequence[PublishedRow], *, stated: Mapping[tuple[str, str], int] = STATED_RANKS, method: str = "RoRA"
) -> list[Finding]:
    """Ranks that the printed parameter shares of ``method`` are those of, and the stated rank where there is another.

    Rows whose share is that of the stated rank are left out.
    """
    found = []
    for row in rows:
        if row.params_percent is None or row.method != method or row.model not in MODELS:
            continue
        rank = stated.get((row.model, row.method))
        one = lora_percent(row.model, 1)
        # own / total is proportional to the rank
        implied = round(row.params_percent / (100 - row.params_percent) * (100 - one) / one)
        expected = None if rank is None else lora_percent(row.model, rank)
        if expected is None:
            text = f"prints {row.params_percent:.2f}% trainable, rank {implied}'s share; no rank is stated"
        elif abs(row.params_percent - expected) > 0.1 * expected:
            text = (
                f"prints {row.params_percent:.2f}% trainable, rank {implied}'s share; the stated rank {rank} trains "
                f"{expected:.2f}%"
            )
        else:
            continue
        found.append(Finding("parameter share", row.label, text, row.params_percent, expected))
    return found


def audit(rows: Sequence[PublishedRow], claims: Sequence[Claim]) -> list[Finding]:
    """Every check of this module on the paper's rows, those published before serving as anchors."""
    paper = [row for row in rows if row.source == "RoRA paper"]
    anchors = [row for row in rows if row.source != "RoRA paper"]
    return [
        *averages(rows),
        *differences(paper, claims),
        *best_marks(paper),
        *below_chance(rows),
        *repeated(rows),
        *copied([row for row in paper if row.table == "I"], anchors),
        *impossible(rows),
        *within_noise(paper),
        *parameter_shares(paper),
    ]


def _exact(printed: float) -> Fraction:
    """A number of one decimal, which a float holds only nearly."""
    return Fraction(round(10 * printed), 10)


def _spread(low: Fraction, high: Fraction) -> str:
    return f"{float(low):.4f} to {float(high):.4f}"


def _grouped(
    rows: Sequence[PublishedRow], key: Callable[[PublishedRow], tuple[object, ...]]
) -> dict[tuple, list[PublishedRow]]:
    groups: dict[tuple, list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
