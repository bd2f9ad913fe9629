"""Accuracies, their standard errors, and the unweighted average."""

import math
import statistics

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.data.tasks import TASKS, TaskRecord
from rora_theory.lab.evaluate.accuracies import TaskAccuracy, accuracies
from rora_theory.lab.evaluate.scoring import Sample

Scored = list[tuple[TaskRecord, Sample]]


def _record(task: str, index: int, gold: str, count: int = 2) -> TaskRecord:
    labels = TASKS[task].labels[:count]
    return TaskRecord(task, index, "", "", ("a",) * count, labels, labels.index(gold))


def _sample(record: TaskRecord, prediction: str | None, norm: str | None = None) -> Sample:
    correct_norm = None if norm is None else norm == record.answer
    return Sample(record.task, record.index, record.answer, prediction, prediction == record.answer, norm, correct_norm)


def _scored(task: str, *items: tuple[str | None, ...], count: int = 2) -> Scored:
    """Return records of ``count`` choices with their samples, given (gold, prediction[, prediction_norm])."""
    records = [_record(task, index, str(gold), count) for index, (gold, *_) in enumerate(items)]
    return [(record, _sample(record, *predictions)) for record, (_, *predictions) in zip(records, items, strict=True)]


def _accuracies(scored: Scored) -> list[TaskAccuracy]:
    return accuracies([sample for _, sample in scored], [record for record, _ in scored])


BOOLQ = _scored("boolq", ("true", "true"), ("true", "false"), ("true", None), ("false", "false"))
PIQA = _scored(
    "piqa",
    ("solution1", "solution1", "solution2"),
    ("solution2", "solution2", "solution2"),
    ("solution1", "solution2", "solution2"),
)


def test_levels_and_their_unweighted_average() -> None:
    boolq, piqa, average = _accuracies([*BOOLQ, *PIQA])
    assert (boolq.task, piqa.task, average.task) == ("boolq", "piqa", "average")
    assert (boolq.n, piqa.n, average.n) == (4, 3, 7)
    assert (boolq.accuracy, piqa.accuracy) == pytest.approx((1 / 2, 2 / 3))
    # lm-evaluation-harness's error: sample standard deviation over the root of n.
    assert boolq.error == pytest.approx(statistics.stdev([1, 0, 0, 1]) / math.sqrt(4))
    assert (boolq.unparsed, piqa.unparsed) == (0.25, 0.0)
    assert (boolq.majority, boolq.chance) == (0.75, 0.5)
    assert (boolq.accuracy_norm, piqa.accuracy_norm) == (None, pytest.approx(1 / 3))
    assert average.accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)  # not 4/7
    assert average.error == pytest.approx(math.hypot(boolq.error, piqa.error) / 2)
    assert average.accuracy_norm == pytest.approx((1 / 2 + 1 / 3) / 2)  # boolq enters with its accuracy
    assert average.unparsed == 1 / 8
    assert average.chance == 1 / 2  # not the majority's
    assert average.majority == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_one_task_has_no_average_and_few_or_equal_items_have_an_error() -> None:
    (level,) = _accuracies(BOOLQ[:1])
    assert (level.accuracy, level.error) == (1.0, 1 / 4)
    for prediction, accuracy in (("false", 0.0), ("true", 1.0)):
        (level,) = _accuracies(_scored("boolq", *[("true", prediction)] * 8))
        assert (level.accuracy, level.error) == (accuracy, pytest.approx(1 / 18))


def test_no_norm_anywhere_is_none() -> None:
    levels = _accuracies([*BOOLQ, *_scored("piqa", ("solution1", None))])
    assert [level.accuracy_norm for level in levels] == [None, None, None]


def test_chance_follows_each_items_choices() -> None:
    four, five = (_record("ARC-Easy", index, "answer1", count) for index, count in enumerate((4, 5)))
    (level,) = accuracies([_sample(record, "answer1") for record in (four, five)], [four, five])
    assert level.chance == pytest.approx((1 / 4 + 1 / 5) / 2)


def test_errors_by_norm_are_their_own_and_chance_is_that_of_the_task_s_choices() -> None:
    """Two of four are right on BoolQ; on ARC two of four by likelihood and one by likelihood per character."""
    boolq = _scored("boolq", *[("true", "true")] * 2, *[("true", "false")] * 2)
    predictions, norms = ("answer1", "answer1", "answer2", "answer2"), ("answer1", *["answer2"] * 3)
    arc = _scored("ARC-Easy", *(("answer1", predictions[index], norms[index]) for index in range(4)), count=4)
    first, second, average = _accuracies([*boolq, *arc])
    assert second.error_norm == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert average.error_norm == pytest.approx(math.hypot(first.error, second.error_norm) / 2)
    assert (first.chance, second.chance, average.chance) == (0.5, 0.25, 0.375)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([], "boolq: .*3 samples of 4 records"),
        ([_sample(_record("boolq", 9, "true"), "true")], "boolq: .*samples and records differ at index 0"),
        ([BOOLQ[1][1]], "boolq: .*samples and records differ at index 0"),
    ],
    ids=["missing", "of another record", "twice of one"],
)
def test_samples_of_other_records_are_refused(first: list[Sample], message: str) -> None:
    records, samples = zip(*BOOLQ, *PIQA, strict=True)
    with pytest.raises(InputError, match=message):
        accuracies([*first, *samples[1:]], records)
