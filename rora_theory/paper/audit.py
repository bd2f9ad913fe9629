r"""Audit of published tables: arithmetic, chance level, repetition, granularity and sampling error.

An accuracy over n items has the standard error :math:`\sqrt{p(1-p)/n}`, and the average over eight tasks
:math:`\sqrt{\sum_t p_t(1-p_t)/n_t}/8`, with n the sizes of the full evaluation sets. Two rows of a table are scored on
the same items, which usually makes their difference less uncertain than that of two independent sets. The difference of
one item is -1, 0 or 1, so that its variance lies between :math:`|g| - g^2` (one method is right whenever the other is)
and :math:`p(1-p) + q(1-q) + 2\sqrt{p(1-p)q(1-q)}`. The exact value requires the answers to each item, which are not
published. Differences are judged here as if the sets were independent; the variation between seeds comes on top.

Every function returns findings: facts about printed numbers, with the figures that show them. A finding is a reason to
look closer, not a statement about its cause.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rora_theory.errors import InputError
from rora_theory.paper.published import NAMES, Claim, PublishedRow
from rora_theory.paper.tasks import PUBLISHED_TASKS
from rora_theory.stats.estimate import standard_score

SIZES = tuple(task.size for task in PUBLISHED_TASKS.values())
"""Number of items of each full evaluation set."""

CHANCE = tuple(100.0 / task.choices for task in PUBLISHED_TASKS.values())
"""Accuracy of guessing in percent (ARC's few items with 3 or 5 choices change it by less than 0.01)."""

HALF_DIGIT = 0.05
"""Half a unit of the last printed digit."""

EXACT_HALF_DIGIT = Fraction(1, 20)
"""`HALF_DIGIT` as an exact fraction."""

HALF_PERCENT_DIGIT = 0.005
"""Half a unit of the last printed digit of a parameter percentage, which has two decimals."""

STANDARD_ERRORS = 2.0
"""Distance in standard errors from which on an entry differs from guessing, or from another entry."""

MIN_EQUAL = 4
"""Number of equal entries among eight from which on two rows count as repeated or copied."""

RORA = "RoRA"
"""Name of the paper's own method in its tables."""


@dataclass(frozen=True)
class Finding:
    """A fact about printed numbers.

    Attributes:
      kind: Name of the check.
      where: Label of the row or rows.
      text: Sentence with the figures.
      printed: Printed figure, if the finding compares two.
      expected: Figure that the printed one is compared with.
      z: Distance in standard errors, if the check has one.
    """

    kind: str
    where: str
    text: str
    printed: float | None = None
    expected: float | None = None
    z: float | None = None


def score_error(percent: float, size: int) -> float:
    """Compute the standard error, in points, of an accuracy in percent over ``size`` items."""
    share = percent / 100.0
    return 100.0 * math.sqrt(share * (1.0 - share) / size)


def average_error(scores: Sequence[float], sizes: Sequence[int] = SIZES) -> float:
    """Compute the standard error, in points, of the unweighted average of accuracies in percent."""
    variance = sum(score_error(score, size) ** 2 for score, size in zip(scores, sizes, strict=True))
    return math.sqrt(variance) / len(scores)


def find_wrong_averages(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find printed averages that no counts of right answers consistent with the row's entries can give."""
    findings = []
    for row in rows:
        # The exact average lies between the bounds, and the printed one is rounded from it.
        low, high = mean_bounds(row)
        if not low - EXACT_HALF_DIGIT <= _exact(row.average) <= high + EXACT_HALF_DIGIT:
            text = (
                f"prints the average {row.average:.1f}; its eight entries, counts out of the test sets' sizes, average "
                f"{_format_range(low, high)}"
            )
            findings.append(Finding("average", row.label, text, row.average, average_row(row)))
    return findings


def mean_bounds(row: PublishedRow) -> tuple[Fraction, Fraction]:
    """Compute the smallest and largest average of the eight accuracies that is consistent with the printed entries.

    Every accuracy is k/n of its test set and rounds to its entry. An entry that no count gives (see
    `find_impossible_entries`) contributes the whole interval that rounds to it.

    Args:
      row: Printed row.

    Returns:
      The bounds in percent, as exact fractions.
    """
    lows, highs = [], []
    for score, size in zip(row.scores, SIZES, strict=True):
        counts = possible_counts(score, size)
        if counts:
            lows.append(Fraction(100 * counts[0], size))
            highs.append(Fraction(100 * counts[-1], size))
        else:
            lows.append(_exact(score) - EXACT_HALF_DIGIT)
            highs.append(_exact(score) + EXACT_HALF_DIGIT)
    return sum(lows, Fraction()) / len(lows), sum(highs, Fraction()) / len(highs)


def possible_counts(percent: float, size: int) -> range:
    """Return the counts out of ``size`` items that round to ``percent`` with one decimal; ties round either way."""
    low, high = (_exact(percent) + sign * EXACT_HALF_DIGIT for sign in (-1, 1))
    return range(max(math.ceil(low * size / 100), 0), min(math.floor(high * size / 100), size) + 1)


def find_wrong_differences(rows: Sequence[PublishedRow], claims: Sequence[Claim]) -> list[Finding]:
    """Find quoted differences that contradict the printed averages or the rows' entries.

    The difference of two means of eight rounded entries is known to 0.1; printing it adds 0.05.
    """
    findings = []
    for claim in claims:
        ours, theirs = claimed_rows(rows, claim)
        printed = ours.average - theirs.average
        exact = average_row(ours) - average_row(theirs)
        # Averages are compared as printed, exact means up to the rounding of two means and of the quote.
        if abs(printed - claim.printed) > 1e-6 or abs(exact - claim.printed) > 3 * HALF_DIGIT + 1e-9:
            text = (
                f"quotes {claim.printed:.1f} points over {claim.against}; the printed averages "
                f"{ours.average:.1f} and {theirs.average:.1f} differ by {printed:.1f}, the rows' entries by "
                f"{exact:.2f}"
            )
            findings.append(Finding("difference", claim.place, text, claim.printed, exact))
    return findings


def average_row(row: PublishedRow) -> float:
    """Compute the average of a row's eight printed entries."""
    return math.fsum(row.scores) / len(row.scores)


def claimed_rows(rows: Sequence[PublishedRow], claim: Claim) -> tuple[PublishedRow, PublishedRow]:
    """Find the two rows that a claim compares.

    Args:
      rows: Published rows.
      claim: Claim of the paper's text.

    Returns:
      The row of the claimed method, and the row it is compared with.

    Raises:
      InputError: If a row is missing or not unique.
    """

    def pick(method: str, rank: int | None) -> PublishedRow:
        key = (claim.model, method, rank)
        matches = [row for row in rows if (row.model, row.method, row.rank) == key and row.table]
        if len(matches) != 1:
            raise InputError(f"rows must have exactly one row {claim.model} {method} rank {rank}, got {len(matches)}")
        return matches[0]

    return pick(claim.method, claim.rank), pick(claim.against, claim.against_rank)


def find_wrong_best_marks(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find rows marked best that are not the best average of their model and method, and the reverse."""
    findings = []
    for key, group in _group_rows(rows, lambda row: (row.model, row.method)).items():
        # Only groups in which the paper marks a row.
        if not any(row.marked_best for row in group):
            continue
        top = max(row.average for row in group)
        for row in group:
            if row.marked_best != (row.average == top):
                marked = "is" if row.marked_best else "is not"
                text = f"{marked} marked best at {row.average:.1f}; the best of {' '.join(key)} is {top:.1f}"
                findings.append(Finding("best", row.label, text, row.average, top))
    return findings


def find_entries_below_chance(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find entries more than two standard errors below uniform guessing among the choices.

    Under the published protocol such an entry counts unparsed answers as wrong, or the run is broken. A lack of
    knowledge cannot be the cause.
    """
    findings = []
    for row in rows:
        for name, score, size, chance in zip(NAMES, row.scores, SIZES, CHANCE, strict=True):
            distance = (score - chance) / score_error(chance, size)
            if distance < -STANDARD_ERRORS:
                text = f"{name} {score:.1f} is below chance {chance:.1f} by {-distance:.1f} standard errors"
                findings.append(Finding("below chance", row.label, text, score, chance, distance))
    return findings


def find_repeated_rows(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find pairs of rows of one model and source with at least `MIN_EQUAL` of the eight entries identical.

    Two runs with equal true accuracy and independent errors print the same digit with a probability of about 0.1
    divided by 3.5 standard errors: 0.02 for 1200 items near 50%. The probability of four coincidences among eight is
    then below 1e-4.
    """
    findings = []
    for group in _group_rows(rows, lambda row: (row.source, row.model)).values():
        for first, second in itertools.combinations(group, 2):
            equal_names = [name for name, a, b in zip(NAMES, first.scores, second.scores, strict=True) if a == b]
            if len(equal_names) >= MIN_EQUAL:
                text = f"{len(equal_names)} of 8 entries are equal: {', '.join(equal_names)}"
                findings.append(Finding("repeated", f"{first.label} = {second.label}", text, float(len(equal_names))))
    return findings


def find_copied_rows(rows: Sequence[PublishedRow], anchors: Sequence[PublishedRow]) -> list[Finding]:
    """Find rows that share at least `MIN_EQUAL` entries with an earlier published row of the same model.

    Such numbers were carried over and not measured again. Among several earlier rows the one with the most equal
    entries is reported; ties go to the first published. ``Finding.printed`` is the number of equal entries.
    """
    findings = []
    for row in rows:
        # Number of equal entries, task by task, with every earlier row of the model.
        equal_counts = [
            (sum(a == b for a, b in zip(row.scores, anchor.scores, strict=True)), anchor)
            for anchor in anchors
            if anchor.model == row.model
        ]
        # `max` returns the first of equal maxima, the earliest publication.
        count, anchor = max(equal_counts, key=lambda pair: pair[0], default=(0, None))
        if anchor is not None and count >= MIN_EQUAL:
            averages_differ = (
                "" if row.average == anchor.average else f" (average {row.average:.1f} for {anchor.average:.1f})"
            )
            text = f"{count} of 8 entries are those of {anchor.label}{averages_differ}"
            findings.append(Finding("copied", row.label, text, float(count)))
    return findings


def find_impossible_entries(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find entries that no count of right answers in the full set can give (only OBQA's 500 items are so coarse)."""
    findings = []
    for row in rows:
        for name, score, size in zip(NAMES, row.scores, SIZES, strict=True):
            if not possible_counts(score, size):
                text = f"{name} {score:.1f} is not k/{size} for any k, to the printed digit"
                findings.append(Finding("impossible", row.label, text, score))
    return findings


def find_differences_within_noise(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find RoRA's entries and averages within two standard errors of those of the best other row of the group.

    A group is one table, model and rank. Differences of both signs count. Test sets are treated as independent, with
    one run per row.

    Returns:
      One finding per entry or average below the threshold.
    """
    findings = []
    for group in _group_rows(rows, lambda row: (row.source, row.table, row.model, row.rank)).values():
        own_rows = [row for row in group if row.method == RORA]
        rivals = [row for row in group if row.method != RORA]
        if not own_rows or not rivals:
            continue
        # The method's row against the best average of the others.
        row, best = own_rows[0], max(rivals, key=lambda other: other.average)
        # Name, both figures and the standard error of their difference: the eight entries, then the average.
        comparisons = [
            (name, ours, theirs, math.hypot(score_error(ours, size), score_error(theirs, size)))
            for name, ours, theirs, size in zip(NAMES, row.scores, best.scores, SIZES, strict=True)
        ]
        error_of_average = math.hypot(average_error(row.scores), average_error(best.scores))
        comparisons.append(("average", row.average, best.average, error_of_average))
        for name, ours, theirs, error in comparisons:
            distance = standard_score(ours - theirs, error)
            if abs(distance) < STANDARD_ERRORS:
                text = (
                    f"{name}: {ours:.1f} against {best.method}'s {theirs:.1f} is {ours - theirs:+.1f} "
                    f"points, {abs(distance):.1f} standard errors ({error:.1f})"
                )
                findings.append(Finding("within noise", row.label, text, ours, theirs, distance))
    return findings


MODELS = {
    "LLaMA-7B": (32, 4096, 4096, 11008, 6_738_415_616),
    "LLaMA-13B": (40, 5120, 5120, 13824, 13_015_864_320),
    "LLaMA2-7B": (32, 4096, 4096, 11008, 6_738_415_616),
    "LLaMA3-8B": (32, 4096, 1024, 14336, 8_030_261_248),
}
"""Number of layers, hidden width, key/value width, intermediate width and total parameters of the models in Table I."""


def lora_percent(model: str, rank: int) -> float:
    """Compute LoRA's trainable percentage of base and adapter for the published targets: q, k, v, up and down."""
    layers, hidden, keys, inner, total = MODELS[model]
    # An adapter of a module has r (p_in + p_out) parameters: q is square, k and v are equal, as are up and down.
    widths = (hidden + hidden) + 2 * (hidden + keys) + 2 * (hidden + inner)
    adapter = layers * rank * widths
    return 100.0 * adapter / (total + adapter)


STATED_RANKS = {("LLaMA-7B", "RoRA"): 128}
"""Ranks that the paper states for rows of Table I: Sec. IV and Fig. 1, for this row only."""


def find_wrong_parameter_shares(rows: Sequence[PublishedRow]) -> list[Finding]:
    """Find the ranks that RoRA's printed parameter percentages correspond to.

    Rows with the percentage of their stated rank give no finding: the printed figure has to be the exact one rounded to
    two decimals, as the figures of all rows of LoRA are at rank 32.

    Returns:
      One finding per row without a stated rank or with another percentage.
    """
    findings = []
    for row in rows:
        if row.params_percent is None or row.method != RORA or row.model not in MODELS:
            continue
        rank = STATED_RANKS.get((row.model, row.method))
        # Rank whose share is nearest to the printed percentage.
        percent_at_one = lora_percent(row.model, 1)
        # The ratio of adapter to base parameters is proportional to the rank.
        implied = round(row.params_percent / (100 - row.params_percent) * (100 - percent_at_one) / percent_at_one)
        expected = None if rank is None else lora_percent(row.model, rank)
        if expected is None:
            text = f"prints {row.params_percent:.2f}% trainable, rank {implied}'s share; no rank is stated"
        elif abs(row.params_percent - expected) > HALF_PERCENT_DIGIT + 1e-9:
            text = (
                f"prints {row.params_percent:.2f}% trainable, rank {implied}'s share; the stated rank {rank} trains "
                f"{expected:.2f}%"
            )
        else:
            continue
        findings.append(Finding("parameter share", row.label, text, row.params_percent, expected))
    return findings


def audit(rows: Sequence[PublishedRow], claims: Sequence[Claim]) -> list[Finding]:
    """Run every check of this module on the paper's rows; earlier publications serve as anchors."""
    paper = [row for row in rows if row.source == "RoRA paper"]
    anchors = [row for row in rows if row.source != "RoRA paper"]
    return [
        *find_wrong_averages(rows),
        *find_wrong_differences(paper, claims),
        *find_wrong_best_marks(paper),
        *find_entries_below_chance(rows),
        *find_repeated_rows(rows),
        *find_copied_rows([row for row in paper if row.table == "I"], anchors),
        *find_impossible_entries(rows),
        *find_differences_within_noise(paper),
        *find_wrong_parameter_shares(paper),
    ]


def _exact(printed: float) -> Fraction:
    """Return a number with one decimal as an exact fraction."""
    return Fraction(round(10 * printed), 10)


def _format_range(low: Fraction, high: Fraction) -> str:
    return f"{float(low):.4f} to {float(high):.4f}"


def _group_rows(
    rows: Sequence[PublishedRow], key: Callable[[PublishedRow], tuple[object, ...]]
) -> dict[tuple, list[PublishedRow]]:
    groups: dict[tuple, list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
