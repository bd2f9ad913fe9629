"""Accuracies, their standard errors, and the unweighted average."""

import math
import statistics

import pytest

from rora_theory.data.tasks import TASKS, TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate.accuracies import accuracies
from rora_theory.evaluate.scoring import Sample


def _record(task: str, index: int, gold: int, count: int = 2) -> TaskRecord:
    labels = TASKS[task].labels[:count]
    return TaskRecord(task, index, "", "", ("a",) * count, labels, gold)


def _sample(record: TaskRecord, prediction: str | None, norm: str | None = None) -> Sample:
    return Sample(
        record.task,
        record.index,
        record.answer,
        prediction,
        prediction == record.answer,
        norm,
        None if norm is None else norm == record.answer,
    )


RECORDS = [_record("boolq", n, gold) for n, gold in enumerate((0, 0, 0, 1))] + [
    _record("piqa", 0, 0),
    _record("piqa", 1, 1),
    _record("piqa", 2, 0),
]
SAMPLES = [
    _sample(RECORDS[0], "true"),
    _sample(RECORDS[1], "false"),
    _sample(RECORDS[2], None),
    _sample(RECORDS[3], "false"),
    _sample(RECORDS[4], "solution1", "solution2"),
    _sample(RECORDS[5], "solution2", "solution2"),
    _sample(RECORDS[6], "solution2", "solution2"),
]


def test_levels() -> None:
    boolq, piqa, average = accuracies(SAMPLES, RECORDS)
    assert (boolq.task, piqa.task, average.task) == ("boolq", "piqa", "average")
    assert (boolq.n, piqa.n, average.n) == (4, 3, 7)
    assert boolq.accuracy == 0.5
    # lm-evaluation-harness's error: sample standard deviation over the root of n.
    assert boolq.error == pytest.approx(statistics.stdev([1, 0, 0, 1]) / math.sqrt(4))
    assert (boolq.unparsed, piqa.unparsed) == (0.25, 0.0)
    assert (boolq.majority, boolq.chance) == (0.75, 0.5)
    assert piqa.accuracy == 2 / 3
    assert (boolq.accuracy_norm, piqa.accuracy_norm) == (None, 1 / 3)


def test_average_is_unweighted() -> None:
    boolq, piqa, average = accuracies(SAMPLES, RECORDS)
    assert average.accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)  # not 4/7
    assert average.error == pytest.approx(math.hypot(boolq.error, piqa.error) / 2)
    assert average.accuracy_norm == pytest.approx((1 / 2 + 1 / 3) / 2)  # boolq enters with its accuracy
    assert average.unparsed == 1 / 8
    assert average.chance == 1 / 2  # not the majority's
    assert average.majority == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_one_task_has_no_average_and_one_item_an_error() -> None:
    (level,) = accuracies(SAMPLES[:1], RECORDS[:1])
    assert level.accuracy == 1.0
    assert level.error == 1 / 4


def test_none_or_all_right_is_not_certain() -> None:
    records = [_record("boolq", n, 0) for n in range(8)]
    none, every = (accuracies([_sample(record, text) for record in records], records)[0] for text in ("false", "true"))
    assert (none.accuracy, every.accuracy) == (0.0, 1.0)
    assert none.error == every.error == pytest.approx(1 / 18)


def test_no_norm_anywhere_is_none() -> None:
    found = accuracies([*SAMPLES[:4], *(_sample(record, None) for record in RECORDS[4:])], RECORDS)
    assert [level.accuracy_norm for level in found] == [None, None, None]


def test_chance_follows_each_items_choices() -> None:
    records = [_record("ARC-Easy", 0, 0, 4), _record("ARC-Easy", 1, 0, 5)]
    (level,) = accuracies([_sample(record, "answer1") for record in records], records)
    assert level.chance == pytest.approx((1 / 4 + 1 / 5) / 2)


def test_a_missing_sample_is_refused() -> None:
    with pytest.raises(InputError, match=r"boolq: .*3 samples of 4 records"):
        accuracies(SAMPLES[1:], RECORDS)


@pytest.mark.parametrize("other", [_sample(_record("boolq", 9, 0), "true"), SAMPLES[1]])
def test_samples_of_other_records_are_refused(other: Sample) -> None:
    """As many as there are records, one of them of another record or twice of one."""
    with pytest.raises(InputError, match=r"boolq: .*samples and records differ at index 0"):
        accuracies([other, *SAMPLES[1:]], RECORDS)


def test_errors_by_norm_are_their_own_and_chance_is_that_of_the_task_s_choices() -> None:
    """Two of four right on BoolQ; on ARC two of four by likelihood and one by likelihood per character."""
    boolq, arc = ([_record(task, n, 0, count) for n in range(4)] for task, count in (("boolq", 2), ("ARC-Easy", 4)))
    samples = [_sample(record, ("true", "false")[record.index // 2]) for record in boolq]
    names = [f"answer{each}" for each in (1, 1, 2, 2)], [f"answer{each}" for each in (1, 2, 2, 2)]
    samples += map(_sample, arc, *names)
    first, second, average = accuracies(samples, [*boolq, *arc])
    assert second.error_norm == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert average.error_norm == pytest.approx(math.hypot(first.error, second.error_norm) / 2)
    assert (first.chance, second.chance, average.chance) == (0.5, 0.25, 0.375)
