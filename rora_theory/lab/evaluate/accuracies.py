r"""Accuracies with standard errors, and the accuracies of guessing and of the most frequent label.

An accuracy over n items has the standard error :math:`s/\sqrt n`, where s is the sample standard deviation of the
items, as in lm-evaluation-harness. If no item or every item is correct, it is that of `estimate.proportion`. The
average over T tasks is unweighted, as published, with the standard error :math:`\sqrt{\sum_t \mathrm{se}_t^2} / T`.
Both refer to sampling other items, not to another training run.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab.data.tasks import TASKS, TaskRecord, chance_accuracy, majority_accuracy
from rora_theory.lab.evaluate.scoring import Sample
from rora_theory.stats.estimate import proportion


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on a task, or its average over several tasks.

    Attributes:
      task: Key of the task, or ``average``.
      n: Number of items.
      accuracy: Fraction of correct answers.
      error: Standard error of ``accuracy`` (`rora_theory.stats.estimate.proportion`).
      accuracy_norm: Accuracy by log-likelihood per character; None if no task reports it. The average uses ``accuracy``
        for tasks that do not report it.
      error_norm: Standard error of ``accuracy_norm``, or None.
      unparsed: Fraction of generated texts without a label; 0 for the log-likelihood protocols.
      chance: Accuracy of guessing uniformly among an item's choices.
      majority: Accuracy of always answering with the most frequent label.
    """

    task: str
    n: int
    accuracy: float
    error: float
    accuracy_norm: float | None
    error_norm: float | None
    unparsed: float
    chance: float
    majority: float

    def in_percent(self) -> dict[str, Any]:
        """Return the attributes with fractions in per cent, and the task's displayed ``name``.

        Examples:
          >>> row = TaskAccuracy("boolq", 4, 0.5, 0.25, None, None, 0.0, 0.5, 0.75).in_percent()
          >>> row["name"], row["n"], row["accuracy"], row["accuracy_norm"]
          ('BoolQ', 4, 50.0, None)
        """
        percent = {name: 100 * value for name, value in vars(self).items() if isinstance(value, float)}
        return vars(self) | percent | {"name": TASKS[self.task].name if self.task in TASKS else self.task}


ACCURACY_COLUMNS = ("protocol", "template", *(field.name for field in fields(TaskAccuracy)))
ACCURACY_UNITS = "accuracies are shares of 1; error is one standard error"
"""Units of the columns of `results.csv`."""


def accuracies(samples: Iterable[Sample], records: Sequence[TaskRecord]) -> list[TaskAccuracy]:
    """Compute the accuracy of each task that has records, and the average if there are several.

    Args:
      samples: One sample of each record.
      records: Scored items, which determine the accuracies of guessing and of the most frequent label.

    Returns:
      Accuracies in the order of `TASKS`, and the average last.

    Raises:
      InputError: If a task does not have exactly one sample of each of its records.
    """
    # Samples of each task, in any order.
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    levels = []
    for key in TASKS:
        items = [record for record in records if record.task == key]
        if not items:
            continue
        scored = by_task.get(key, [])
        # A missing or repeated sample would bias the accuracy without a trace.
        if len(scored) != len(items):
            raise InputError(
                f"{key}: must have one sample per record, got {len(scored)} samples of {len(items)} records"
            )
        unmatched = {sample.index for sample in scored} ^ {record.index for record in items}
        if unmatched:
            raise InputError(
                f"{key}: must have one sample per record, but samples and records differ at index {min(unmatched)}"
            )
        accuracy = proportion(sum(sample.correct for sample in scored), len(scored))
        # The harness reports an accuracy per character for some tasks only.
        norms = [sample.correct_norm for sample in scored if sample.correct_norm is not None]
        accuracy_norm = proportion(sum(norms), len(norms)) if norms else None
        # Answers without a label count as wrong; their share is reported too.
        unparsed = sum(sample.prediction is None for sample in scored) / len(scored)
        levels.append(
            TaskAccuracy(
                key,
                len(items),
                accuracy.value,
                accuracy.error,
                accuracy_norm.value if accuracy_norm else None,
                accuracy_norm.error if accuracy_norm else None,
                unparsed,
                chance_accuracy(items),
                majority_accuracy(items),
            )
        )
    return [*levels, average(levels)] if len(levels) > 1 else levels


def average(tasks: Sequence[TaskAccuracy]) -> TaskAccuracy:
    """Compute the unweighted average over tasks."""
    count = len(tasks)

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / count

    # Tasks have different records, so the squares of their errors add up.
    def error(values: Iterable[float]) -> float:
        return math.sqrt(math.fsum(value**2 for value in values)) / count

    # Tasks without an accuracy per character enter with their plain accuracy.
    has_norm = any(level.accuracy_norm is not None for level in tasks)
    norms = [
        (level.accuracy, level.error)
        if level.accuracy_norm is None or level.error_norm is None
        else (level.accuracy_norm, level.error_norm)
        for level in tasks
    ]
    return TaskAccuracy(
        "average",
        sum(level.n for level in tasks),
        mean(level.accuracy for level in tasks),
        error(level.error for level in tasks),
        mean(value for value, _ in norms) if has_norm else None,
        error(value for _, value in norms) if has_norm else None,
        mean(level.unparsed for level in tasks),
        mean(level.chance for level in tasks),
        mean(level.majority for level in tasks),
    )


def describe_accuracy(levels: Sequence[TaskAccuracy], protocol: str) -> str:
    """Return a sentence with the last accuracy, which is the average of several tasks, and the chance level."""
    last, tasks = levels[-1], [level for level in levels if level.task in TASKS]
    scope = f"on average over {len(tasks)} tasks" if last.task not in TASKS else f"on {TASKS[last.task].name}"
    return (
        f"{100 * last.accuracy:.1f} % of the answers are correct {scope} under the protocol {protocol} (standard error "
        f"{100 * last.error:.1f} points); chance is {100 * last.chance:.1f} %."
    )
