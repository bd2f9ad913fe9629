r"""The eight tasks in one table, and their records.

Data are folders in the LLM-Adapters schema: ``TASK/test.json`` (and ``TASK/train.json``), a JSON list of
records with the keys ``instruction``, ``input``, ``output`` and ``answer``. Question and choices are
recovered from the instruction by the task's template and put back together as a check, so that no second file
is needed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.data.prompts import ANSWER_PREFIX
from rora_theory.errors import InputError
from rora_theory.io import files


@dataclass(frozen=True)
class Task:
    """One of the eight tasks.

    Attributes:
      key: its folder, and its name on command lines.
      name: its column in the papers' tables.
      labels: every label the published parser accepts, in order.
      opening: the instruction's text before the question.
      word: what a choice is announced by, ``Solution`` in ``Solution1: ...``; empty where choices are not listed.
      between: the text between two choices.
      before_format: the text between the last choice and ``Answer format:``.
      harness: its name in lm-evaluation-harness.
      harness_norm: whether that harness reports ``acc_norm`` for it.
      full_size: items of the full evaluation set, the n behind published accuracies.
      full_choices: choices an item has (nearly always) in that set.
    """

    key: str
    name: str
    labels: tuple[str, ...]
    opening: str
    word: str
    between: str
    before_format: str
    harness: str
    harness_norm: bool
    full_size: int
    full_choices: int

    @property
    def pattern(self) -> str:
        """The published parser's regular expression: the labels in order, case-sensitive."""
        return "|".join(self.labels)


def _labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


_TRUE = "Please answer the following question with true or false, question: "
_SOLUTION = "Please choose the correct solution to the question: "
_ANSWER = "Please choose the correct answer to the question: "
_ENDING = "Please choose the correct ending to complete the given sentence: "
_OPTION = "Please choose the correct answer to fill in the blank to complete the given sentence: "
_SOLUTIONS, _ENDINGS, _OPTIONS = _labels("solution", 2), _labels("ending", 4), _labels("option", 2)
_ANSWERS = _labels("answer", 5)

# fmt: off
_ROWS = (
    Task("boolq", "BoolQ", ("true", "false"), _TRUE, "", "", "\n\n", "boolq", False, 3270, 2),
    Task("piqa", "PIQA", _SOLUTIONS, _SOLUTION, "Solution", "\n\n", "\n\n", "piqa", True, 1838, 2),
    Task("social_i_qa", "SIQA", _ANSWERS, _ANSWER, "Answer", " ", "\n\n", "social_iqa", False, 1954, 3),
    Task("hellaswag", "HellaS", _ENDINGS, _ENDING, "Ending", " ", "\n\n", "hellaswag", True, 10042, 4),
    Task("winogrande", "WinoG", _OPTIONS, _OPTION, "Option", " ", " ", "winogrande", False, 1267, 2),
    Task("ARC-Easy", "ARC-e", _ANSWERS, _ANSWER, "Answer", " ", "\n\n", "arc_easy", True, 2376, 4),
    Task("ARC-Challenge", "ARC-c", _ANSWERS, _ANSWER, "Answer", " ", "\n\n", "arc_challenge", True, 1172, 4),
    Task("openbookqa", "OBQA", _ANSWERS, _ANSWER, "Answer", " ", "\n\n", "openbookqa", True, 500, 4),
)
# fmt: on

TASKS: dict[str, Task] = {task.key: task for task in _ROWS}
"""The eight tasks by key, in the order of the papers' tables."""


@dataclass(frozen=True)
class TaskRecord:
    """One item of a task.

    Attributes:
      task: key of its task.
      index: position in its file, from 0.
      instruction: the text put into a prompt.
      question: the part between the template's opening and its choices.
      choices: the choices as written; ``("true", "false")`` in boolq.
      labels: the label of each choice (``answer1``, ...).
      gold: index of the right choice.
    """

    task: str
    index: int
    instruction: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int

    @property
    def answer(self) -> str:
        """The gold label."""
        return self.labels[self.gold]


def task_named(key: str) -> Task:
    """The task of that key.

    Raises:
      InputError: there is none.
    """
    if key not in TASKS:
        raise InputError(f"task is {key!r}; accepted are {', '.join(TASKS)}")
    return TASKS[key]


def render(task: Task, question: str, choices: Sequence[str]) -> str:
    """The instruction of a question and its choices, as LLM-Adapters writes it."""
    listed = task.between.join(f"{task.word}{number}: {text}" for number, text in enumerate(choices, start=1))
    listed = f"\n\n{listed}" if task.word else ""
    labels = "/".join(task.labels[: len(choices)])
    return f"{task.opening}{question}{listed}{task.before_format}Answer format: {labels}"


def parse(task: Task, instruction: str) -> tuple[str, tuple[str, ...]]:
    """Question and choices of an instruction: the inverse of `render`.

    Raises:
      InputError: the instruction does not follow the task's template.
    """
    head, found, listed_labels = instruction.rpartition(f"{task.before_format}Answer format: ")
    count = len(listed_labels.split("/"))
    if not found or not head.startswith(task.opening):
        raise InputError(f"instruction {instruction[:60]!r}... does not follow the template of {task.key}")
    body = head.removeprefix(task.opening)
    parts = []
    if task.word:
        for number in range(1, count + 1):
            before = "\n\n" if number == 1 else task.between
            part, _, body = body.partition(f"{before}{task.word}{number}: ")
            parts.append(part)
    question, choices = (parts[0], (*parts[1:], body)) if parts else (body, task.labels)
    if render(task, question, choices) != instruction:
        raise InputError(f"instruction {instruction[:60]!r}... does not follow the template of {task.key}")
    return question, choices


def read_task(path: Path, task: Task) -> list[TaskRecord]:
    """All records of a task's file, in its order.

    Raises:
      InputError: no such file, or a record that is not of the schema: names the file and the record.
    """
    return [_record(task, index, row, path) for index, row in enumerate(_read_list(path))]


def _read_list(path: Path) -> list[Any]:
    value = files.read_json(path, accepted="a JSON list of records")
    if not isinstance(value, list) or not value:
        raise InputError(f"{path}: holds {type(value).__name__}; accepted is a non-empty JSON list of records")
    return value


KEYS = ("instruction", "input", "output", "answer")


def _record(task: Task, index: int, row: Any, path: Path) -> TaskRecord:
    where = f"{path}: record {index}"
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}; accepted is an object with the keys {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(row.get(key), str):
            raise InputError(f"{where}: {key} is {row.get(key)!r}; accepted is a string")
    if row["input"]:
        raise InputError(f"{where}: input is {row['input'][:40]!r}; accepted is the empty string")
    try:
        question, choices = parse(task, row["instruction"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    labels = task.labels[: len(choices)]
    if row["answer"] not in labels:
        raise InputError(f"{where}: answer is {row['answer']!r}; accepted are {', '.join(labels)}")
    if row["output"] != ANSWER_PREFIX + row["answer"]:
        raise InputError(f"{where}: output is {row['output']!r}; accepted is {ANSWER_PREFIX + row['answer']!r}")
    if task.key == "winogrande" and question.count("_") != 1:
        raise InputError(f"{where}: the sentence has {question.count('_')} blanks '_'; accepted is one")
    return TaskRecord(task.key, index, row["instruction"], question, choices, labels, labels.index(row["answer"]))


def chance(records: Sequence[TaskRecord]) -> float:
    """Accuracy of guessing evenly among each item's own choices: the mean of 1/choices."""
    return math.fsum(1.0 / len(record.choices) for record in records) / len(records)


def majority(records: Sequence[TaskRecord]) -> float:
    """Accuracy of always giving the most frequent label of these records."""
    return Counter(record.answer for record in records).most_common(1)[0][1] / len(records)
