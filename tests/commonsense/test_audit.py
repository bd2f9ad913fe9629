"""The stored tables against the paper's print, and the audit of what they say."""

import dataclasses
import math

import pytest

from rora_theory.commonsense import audit, published
from rora_theory.commonsense.published import Row
from rora_theory.errors import InputError

ROWS = published.rows()
PAPER = published.rows("RoRA paper")
ANCHORS = published.rows("DoRA repository")


def _row(model: str, method: str, rank: int | None = None, source: str = "RoRA paper") -> Row:
    (found,) = [r for r in ROWS if (r.model, r.method, r.rank, r.source) == (model, method, rank, source)]
    return found


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


def test_one_printed_average_is_not_the_mean_of_its_entries() -> None:
    (finding,) = audit.averages(ROWS)
    assert finding.where == "Table II, Sheared-LLaMA-1.3B DoRA r=32"
    assert finding.expected == pytest.approx(53.2)
    assert finding.printed == 53.0


def test_a_wrong_average_is_found_and_rounding_is_not() -> None:
    row = _row("LLaMA-7B", "RoRA")
    assert not audit.averages([dataclasses.replace(row, average=81.4)])  # 81.325: entries are rounded too
    assert audit.averages([dataclasses.replace(row, average=81.5)])


def test_quoted_differences() -> None:
    """6.5 is printed for 81.3 - 74.7; 3.9 follows from a printed average that its own entries contradict."""
    found = audit.differences(PAPER, published.claims())
    assert [(f.printed, round(f.expected or 0, 2)) for f in found] == [(6.5, 6.6), (6.5, 6.6), (3.9, 3.71)]
    right = [dataclasses.replace(claim, printed=6.6) for claim in published.claims()[:1]]
    assert not audit.differences(PAPER, right)


def test_a_claim_about_no_row_is_refused() -> None:
    claim = dataclasses.replace(published.claims()[0], rank=7)
    with pytest.raises(InputError, match="0 rows are LLaMA-7B RoRA rank 7"):
        audit.differences(PAPER, [claim])


def test_rows_marked_best_are_best() -> None:
    assert audit.best_marks(PAPER) == []
    moved = [dataclasses.replace(row, marked_best=row.table == "II" and row.rank == 16) for row in PAPER]
    assert len(audit.best_marks(moved)) == 6


def test_entries_below_chance() -> None:
    found = [(f.where.split()[-2:], f.text.split()[0]) for f in audit.below_chance(PAPER)]
    assert found == [
        (["LoRA", "r=8"], "SIQA"), (["LoRA", "r=8"], "WinoG"),
        (["DoRA", "r=8"], "SIQA"), (["DoRA", "r=8"], "WinoG"),
        (["RoRA", "r=8"], "SIQA"), (["RoRA", "r=8"], "WinoG"),
        (["LoRA", "r=128"], "WinoG"), (["DoRA", "r=128"], "WinoG"),
    ]  # fmt: skip
    worst = min(audit.below_chance(ANCHORS), key=lambda f: f.z or 0)
    assert (worst.where, worst.printed) == ("DoRA repository, LLaMA-7B LoRA r=4", 2.3)


def test_repeated_rows() -> None:
    found = {(f.where.replace("Table II, Sheared-LLaMA-1.3B ", ""), f.printed) for f in audit.repeated(ROWS)}
    assert found == {
        ("DoRA r=16 = DoRA r=64", 7.0),
        ("DoRA r=16 = RoRA r=32", 6.0),
        ("RoRA r=32 = DoRA r=64", 5.0),
    }


def test_rows_taken_over_from_the_earlier_publication() -> None:
    """Those rows are rank 32's, so Table I does not compare methods at one rank."""
    found = [f.where for f in audit.taken_over(PAPER, ANCHORS)]
    assert found == [
        "Table I, LLaMA-7B DoRA", "Table I, LLaMA2-7B LoRA", "Table I, LLaMA2-7B DoRA",
        "Table I, LLaMA3-8B LoRA", "Table I, LLaMA3-8B DoRA",
    ]  # fmt: skip


def test_accuracies_that_no_count_of_items_gives() -> None:
    found = audit.impossible(PAPER)
    assert [f.printed for f in found] == [85.3, 44.9, 62.1, 62.7, 61.7, 64.3, 63.1, 64.3]
    assert all(f.text.startswith("OBQA") for f in found)


@pytest.mark.parametrize(("percent", "size", "fits"), [(44.8, 500, True), (44.9, 500, False), (33.3, 3, True)])
def test_possible(percent: float, size: int, fits: bool) -> None:
    assert audit.possible(percent, size) is fits


def test_every_count_is_possible() -> None:
    assert all(audit.possible(round(100 * k / 1172, 1), 1172) for k in range(1173))


def test_standard_errors() -> None:
    assert audit.score_error(50.0, 2500) == pytest.approx(1.0)
    # Eight equal tasks: the average's error is one task's over sqrt(8).
    assert audit.average_error([50.0] * 8, [2500] * 8) == pytest.approx(1 / math.sqrt(8))
    assert audit.average_error(_row("LLaMA-7B", "LoRA").scores) == pytest.approx(0.40, abs=0.005)


def test_gaps_within_sampling_error() -> None:
    found = {(f.where, f.text.split(":")[0]) for f in audit.within_noise(PAPER)}
    assert ("Table I, LLaMA-7B RoRA", "OBQA") in found
    assert ("Table I, LLaMA-7B RoRA", "average") not in found
    assert ("Table I, LLaMA-7B RoRA", "SIQA") not in found  # 86.9 against 78.6
    averages = [where for where, name in found if name == "average"]
    assert averages == ["Table II, Sheared-LLaMA-1.3B RoRA r=16"]


def test_a_gap_of_two_standard_errors_is_the_border() -> None:
    row, other = _row("LLaMA-7B", "RoRA"), _row("LLaMA-7B", "DoRA")
    spread = math.hypot(audit.score_error(80.0, 3270), audit.score_error(79.0, 3270))
    for z, flagged in ((1.9, True), (2.1, False), (-1.9, True), (-2.1, False)):
        near = dataclasses.replace(row, scores=(79.0 + z * spread, *row.scores[1:]))
        base = dataclasses.replace(other, scores=(79.0, *other.scores[1:]))
        names = {f.text.split(":")[0] for f in audit.within_noise([near, base])}
        assert ("BoolQ" in names) is flagged


@pytest.mark.parametrize(
    ("model", "percent"), [("LLaMA-7B", 0.83), ("LLaMA-13B", 0.67), ("LLaMA2-7B", 0.83), ("LLaMA3-8B", 0.70)]
)
def test_printed_shares_of_lora_are_rank_32s(model: str, percent: float) -> None:
    assert audit.lora_percent(model, 32) == pytest.approx(percent, abs=0.005)
    assert _row(model, "LoRA").params_percent == percent


def test_the_share_printed_for_rora_is_not_its_stated_ranks() -> None:
    found = audit.parameter_shares(PAPER)
    assert [f.where for f in found] == [f"Table I, {model} RoRA" for model in audit.MODELS]
    implied = [int(f.text.rsplit("rank ", 1)[1].removesuffix("'s")) for f in found]
    assert implied == [32, 32, 33, 32]  # 0.84% is printed where rank 32 trains 0.83%
    assert not audit.parameter_shares(PAPER, stated_rank=32)


def test_audit_runs_every_check() -> None:
    kinds = {finding.kind for finding in audit.audit(ROWS, published.claims())}
    assert kinds == {
        "average", "difference", "below chance", "repeated", "taken over", "impossible", "within noise",
        "parameter share",
    }  # fmt: skip
