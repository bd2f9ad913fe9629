"""The stored tables equal the printed ones; the audit of their contents.

`tests/sims/test_audit.py` compares all findings in the printed tables; these tests concern the borders of a check.
"""

import dataclasses
import math
import re
from collections import Counter
from fractions import Fraction

import pytest

from rora_theory.errors import InputError
from rora_theory.paper import audit, published
from rora_theory.paper.published import PublishedRow

ROWS = published.published_rows()
PAPER = published.published_rows("RoRA paper")
ANCHORS = published.published_rows("DoRA repository")
EARLIER = [row for row in ROWS if row.source != "RoRA paper"]


def _row(model: str, method: str, rank: int | None = None, source: str = "RoRA paper") -> PublishedRow:
    (row,) = [r for r in ROWS if (r.model, r.method, r.rank, r.source) == (model, method, rank, source)]
    return row


def test_every_printed_row_is_stored() -> None:
    by_table = {table: [r for r in PAPER if r.table == table] for table in ("I", "II")}
    assert [r.method for r in by_table["I"]] == (
        ["Prefix", "Series", "Parallel", "LoRA", "DoRA", "RoRA"] * 2 + ["LoRA", "DoRA", "RoRA"] * 2
    )
    assert [(r.rank, r.method) for r in by_table["II"]] == [
        (rank, method) for rank in (8, 16, 32, 64, 128) for method in ("LoRA", "DoRA", "RoRA")
    ]
    assert len(ANCHORS) == 16
    # The sum of the paper's 8 x 33 entries, taken from its text: a changed digit shows.
    assert sum(round(10 * score) for row in PAPER for score in row.scores) == 173228


def test_anchors_are_the_averages_quoted_by_rank() -> None:
    """The anchors by rank, as they are usually quoted."""
    lora = [_row("LLaMA-7B", "LoRA", rank, "DoRA repository").average for rank in (4, 8, 16, 32, 64)]
    dora = [_row("LLaMA-7B", "DoRA", rank, "DoRA repository").average for rank in (4, 8, 16, 32, 64)]
    assert lora == [39.5, 40.7, 70.9, 76.3, 65.8]
    assert dora == [61.9, 77.9, 77.5, 78.4, 76.8]


def test_every_anchor_names_the_file_that_prints_it() -> None:
    counts = Counter((row.source, row.address.rpartition("/blob/")[0]) for row in EARLIER)
    assert counts == {
        ("LLM-Adapters repository", "https://github.com/AGI-Edgerunners/LLM-Adapters"): 8,
        ("DoRA repository (first version)", "https://github.com/NVlabs/DoRA"): 12,
        ("DoRA repository", "https://github.com/NVlabs/DoRA"): 16,
    }
    assert all(re.search(r"/blob/[0-9a-f]{40}/.*README\.md$", row.address) for row in EARLIER)
    # The sums of their 8 x 36 entries, taken from those files: a changed digit shows.
    sums = Counter()
    for row in EARLIER:
        sums[row.source] += sum(round(10 * score) for score in row.scores)
    assert list(sums.values()) == [47372, 72804, 92367]


def test_the_bounds_of_a_mean_hold_every_count() -> None:
    """They hold for all counts that print as the entries, with decimal rounding and exact ends."""
    row = _row("LLaMA-13B", "Parallel")
    ends = []
    for score, size in zip(row.scores, audit.SIZES, strict=True):
        fits = [k for k in range(size + 1) if abs(Fraction(100 * k, size) - Fraction(str(score))) <= Fraction(1, 20)]
        assert list(audit.possible_counts(score, size)) == fits
        ends.append((Fraction(100 * fits[0], size), Fraction(100 * fits[-1], size)))
    low, high = (sum(pair[end] for pair in ends) / 8 for end in (0, 1))
    assert audit.mean_bounds(row) == (low, high)
    assert not audit.find_wrong_averages([dataclasses.replace(row, average=81.5)])
    assert [len(audit.find_wrong_averages([dataclasses.replace(row, average=average)])) for average in (1.0, 99.0)] == [
        1,
        1,
    ]


def test_an_impossible_entry_contributes_its_rounding_to_the_mean() -> None:
    row = _row("LLaMA-7B", "RoRA")
    bounds = [
        audit.mean_bounds(dataclasses.replace(row, scores=(*row.scores[:-1], score))) for score in (44.9, 44.8)
    ]  # 44.9 is no k/500, 44.8 is 224/500 alone
    assert [a - b for a, b in zip(*bounds, strict=True)] == [Fraction(5, 800), Fraction(15, 800)]


@pytest.mark.parametrize(("gap", "count"), [(1.14, 0), (1.16, 1), (0.86, 0), (0.84, 1)])
def test_a_quoted_difference_is_the_entries_to_three_roundings(gap: float, count: int) -> None:
    """A quote of 1.0, the difference of the printed averages: two means and the quote are each off by up to 0.05."""
    claim = published.claims()[0]
    ours, theirs = audit.claimed_rows(PAPER, claim)
    scores = tuple(score + gap for score in theirs.scores)
    rows = [dataclasses.replace(ours, scores=scores, average=theirs.average + 1), theirs]
    assert len(audit.find_wrong_differences(rows, [dataclasses.replace(claim, printed=1.0)])) == count


def test_a_claim_without_a_row_is_refused() -> None:
    claim = dataclasses.replace(published.claims()[0], rank=7)
    with pytest.raises(InputError, match=r"rows.*LLaMA-7B RoRA rank 7.* 0"):
        audit.find_wrong_differences(PAPER, [claim])


def test_rows_marked_best_are_best() -> None:
    assert audit.find_wrong_best_marks(PAPER) == []
    moved = [dataclasses.replace(row, marked_best=row.table == "II" and row.rank == 16) for row in PAPER]
    texts = {f.where.removeprefix("Table II, Sheared-LLaMA-1.3B "): f.text for f in audit.find_wrong_best_marks(moved)}
    assert len(texts) == 6
    assert texts["RoRA r=16"].startswith("is marked best at ")
    assert texts["RoRA r=128"].startswith("is not marked best at ")


def test_rows_of_two_models_do_not_count_as_repeated() -> None:
    rows = [dataclasses.replace(PAPER[0], model=model) for model in ("LLaMA-7B", "LLaMA-13B")]
    assert not audit.find_repeated_rows(rows)
    assert len(audit.find_repeated_rows([rows[0], rows[0]])) == 1


def test_few_equal_entries_do_not_count_as_a_copy() -> None:
    row, anchor = _row("LLaMA-7B", "DoRA"), _row("LLaMA-7B", "DoRA", 32, "DoRA repository")
    changed = [dataclasses.replace(row, scores=(0.0,) * n + row.scores[n:]) for n in range(9)]
    assert [f.printed for f in audit.find_copied_rows(changed, [anchor])] == [8, 7, 6, 5, 4]
    assert not audit.find_copied_rows([dataclasses.replace(row, model="LLaMA2-7B")], [anchor])


def test_possible_counts() -> None:
    assert [len(audit.possible_counts(*printed)) for printed in ((44.8, 500), (44.9, 500), (33.3, 3))] == [1, 0, 1]
    assert audit.possible_counts(0.0, 10042) == range(6), "no count is below 0"
    assert audit.possible_counts(100.0, 10042) == range(10037, 10043), "or above the items"
    assert all(k in audit.possible_counts(round(100 * k / 1172, 1), 1172) for k in range(1173))


def test_standard_errors() -> None:
    assert audit.score_error(50.0, 2500) == pytest.approx(1.0)
    # Eight equal tasks: the average's error is one task's over sqrt(8).
    assert audit.average_error([50.0] * 8, [2500] * 8) == pytest.approx(1 / math.sqrt(8))
    assert audit.average_error(_row("LLaMA-7B", "LoRA").scores) == pytest.approx(0.40, abs=0.005)


def with_boolq(row: PublishedRow, score: float) -> PublishedRow:
    return dataclasses.replace(row, scores=(score, *row.scores[1:]))


TWO_ERRORS = 2 * math.hypot(audit.score_error(80.0, 3270), audit.score_error(79.0, 3270))


@pytest.mark.parametrize(
    ("score", "other", "is_flagged"),
    [
        (79 + 0.95 * TWO_ERRORS, 79.0, True),
        (79 + 1.05 * TWO_ERRORS, 79.0, False),
        (79 - 0.95 * TWO_ERRORS, 79.0, True),
        (79 - 1.05 * TWO_ERRORS, 79.0, False),
        # Rows without a sampling error differ where they are not equal.
        (100.0, 100.0, True),
        (0.0, 100.0, False),
    ],
)
def test_a_gap_of_two_standard_errors_is_the_border(score: float, other: float, is_flagged: bool) -> None:
    rows = [with_boolq(_row("LLaMA-7B", "RoRA"), score), with_boolq(_row("LLaMA-7B", "DoRA"), other)]
    assert any(finding.text.startswith("BoolQ:") for finding in audit.find_differences_within_noise(rows)) is is_flagged


@pytest.mark.parametrize(
    ("model", "percent"), [("LLaMA-7B", 0.83), ("LLaMA-13B", 0.67), ("LLaMA2-7B", 0.83), ("LLaMA3-8B", 0.70)]
)
def test_printed_shares_of_lora_are_rank_32s(model: str, percent: float) -> None:
    assert audit.lora_percent(model, 32) == pytest.approx(percent, abs=0.005)
    assert _row(model, "LoRA").params_percent == percent


@pytest.mark.parametrize(("share", "count"), [(3.21, 1), (3.22, 0), (3.23, 1)])
def test_a_parameter_share_is_compared_to_its_printed_digits(share: float, count: int) -> None:
    """Rank 128 of LLaMA-7B trains 3.2228%, which two decimals print as 3.22."""
    row = dataclasses.replace(_row("LLaMA-7B", "RoRA"), params_percent=share)
    assert len(audit.find_wrong_parameter_shares([row])) == count
