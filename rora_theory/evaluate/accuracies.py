r"""From samples to accuracies with standard errors, beside the levels of chance and of the most frequent label.

An accuracy over n items has the standard error :math:`s/\sqrt n`, s the items' sample standard deviation (as
lm-evaluation-harness reports it), and where none or all are right that of `estimate.proportion`. The average
over tasks is unweighted, as published, with the error :math:`\sqrt{\sum_t \mathrm{se}_t^2}` over their number. Both
speak of drawing other items, not of training again.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rora_theory.data.tasks import TASKS, TaskRecord, chance, majority
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Sample
from rora_theory.stats.estimate import proportion


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on one task, or the average of several.

    Attributes:
      task: its key, or ``average``.
      n: items.
      accuracy, error: share of right answers and its standard error (`rora_theory.stats.estimate.proportion`).
      accuracy_norm, error_norm: by log-likelihood per character, None where not reported. In the average,
        tasks without it enter with ``accuracy``; None where no task has it.
      unparsed: share of generated texts without a label; 0 for the log-likelihood protocols.
      chance: accuracy of guessing evenly among an item's choices.
      majority: accuracy of always giving these items' most frequent label.
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
        """Its entries with shares in per cent, and the task's printed ``name``.

        Examples:
          >>> row = TaskAccuracy("boolq", 4, 0.5, 0.25, None, None, 0.0, 0.5, 0.75).in_percent()
          >>> row["name"], row["n"], row["accuracy"], row["accuracy_norm"]
          ('BoolQ', 4, 50.0, None)
        """
        percent = {name: 100 * value for name, value in vars(self).items() if isinstance(value, float)}
        return vars(self) | percent | {"name": TASKS[self.task].name if self.task in TASKS else self.task}


ACCURACY_COLUMNS = ("protocol", "template", *(field.name for field in fields(TaskAccuracy)))
ACCURACY_UNITS = "accuracies are shares of 1; error is one standard error"
"""Of a run's `results.csv`."""


def accuracies(samples: Iterable[Sample], records: Sequence[TaskRecord]) -> list[TaskAccuracy]:
    """One level a task that has records, in the order of `TASKS`, and the average last where there are several.

    Args:
      samples: of all of ``records``.
      records: the items scored, whose choices and labels give chance and majority.

    Raises:
      InputError: a task whose samples are not one of each of its records.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    found = []
    for key in TASKS:
        items = [record for record in records if record.task == key]
        if not items:
            continue
        scored = by_task.get(key, [])
        if len(scored) != len(items):
            raise InputError(f"{key}: {len(scored)} samples of {len(items)} records; accepted is one a record")
        wrong = {sample.index for sample in scored} ^ {record.index for record in items}
        if wrong:
            raise InputError(
                f"{key}: samples and records differ at index {min(wrong)}; accepted is one sample a record"
            )
        right = proportion(sum(sample.correct for sample in scored), len(scored))
        norms = [sample.correct_norm for sample in scored if sample.correct_norm is not None]
        right_norm = proportion(sum(norms), len(norms)) if norms else None
        unparsed = sum(sample.prediction is None for sample in scored) / len(scored)
        found.append(
            TaskAccuracy(
                key,
                len(items),
                right.value,
                right.error,
                right_norm.value if right_norm else None,
                right_norm.error if right_norm else None,
                unparsed,
                chance(items),
                majority(items),
            )
        )
    return [*found, average(found)] if len(found) > 1 else found


def average(tasks: Sequence[TaskAccuracy]) -> TaskAccuracy:
    """The unweighted average over tasks."""
    count = len(tasks)

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / count

    def error(values: Iterable[float]) -> float:
        return math.sqrt(math.fsum(value**2 for value in values)) / count

    normed = any(level.accuracy_norm is not None for level in tasks)
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
        mean(value for value, _ in norms) if normed else None,
        error(value for _, value in norms) if normed else None,
        mean(level.unparsed for level in tasks),
        mean(level.chance for level in tasks),
        mean(level.majority for level in tasks),
    )


def accuracies_in_words(found: Sequence[TaskAccuracy], protocol: str) -> str:
    """The last level, the average where there are several, beside chance."""
    last, named = found[-1], [level for level in found if level.task in TASKS]
    where = f"on average over {len(named)} tasks" if last.task not in TASKS else f"on {TASKS[last.task].name}"
    return (
        f"{100 * last.accuracy:.1f} ± {100 * last.error:.1f} % of the answers are right {where}, by the protocol "
        f"{protocol}; chance is {100 * last.chance:.1f} %."
    )
