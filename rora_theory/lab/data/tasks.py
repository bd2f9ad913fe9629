r"""The eight commonsense tasks and their records.

Data are folders in the LLM-Adapters schema: ``TASK/test.json`` (and ``TASK/train.json``), a JSON list of records with
the keys ``instruction``, ``input``, ``output`` and ``answer``. Question and choices are parsed from the instruction by
the task's template. Rendering them again checks the result, so no second file is needed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError, shown
from rora_theory.lab.data.formats import json_type
from rora_theory.lab.data.prompts import ANSWER_PREFIX
from rora_theory.paper.tasks import PUBLISHED_TASKS
from rora_theory.runs import files
from rora_theory.scaling import check_choice


@dataclass(frozen=True)
class Task:
    """One of the eight tasks.

    Attributes:
      key: Name of the task's folder, and its name on command lines.
      labels: All labels that the published parser accepts, in order.
      opening: Text of the instruction before the question.
      choice_heading: Heading of a choice before its number, ``Solution`` in ``Solution1: ...``; empty if choices are
        not listed.
      choice_separator: Text between two choices.
      format_separator: Text between the last choice and ``Answer format:``.
      harness: Name of the task in lm-evaluation-harness.
      harness_norm: Whether that harness reports ``acc_norm`` for the task.
    """

    key: str
    labels: tuple[str, ...]
    opening: str
    choice_heading: str
    choice_separator: str
    format_separator: str
    harness: str
    harness_norm: bool

    @property
    def name(self) -> str:
        """Column of the task in the papers' tables."""
        return PUBLISHED_TASKS[self.key].name

    @property
    def pattern(self) -> str:
        """Return the regular expression of the published parser: the labels in order, case-sensitive."""
        return "|".join(self.labels)


def _numbered_labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


_TRUE_FALSE_OPENING = "Please answer the following question with true or false, question: "
_SOLUTION_OPENING = "Please choose the correct solution to the question: "
_ANSWER_OPENING = "Please choose the correct answer to the question: "
_ENDING_OPENING = "Please choose the correct ending to complete the given sentence: "
_OPTION_OPENING = "Please choose the correct answer to fill in the blank to complete the given sentence: "
_SOLUTION_LABELS, _ENDING_LABELS, _OPTION_LABELS = (
    _numbered_labels("solution", 2),
    _numbered_labels("ending", 4),
    _numbered_labels("option", 2),
)
_ANSWER_LABELS = _numbered_labels("answer", 5)

# Columns: key, labels, opening, heading of a choice, text between choices, text before "Answer format:", the harness's
# name and whether it reports acc_norm.
# fmt: off
_TASK_TABLE = (
    Task("boolq", ("true", "false"), _TRUE_FALSE_OPENING, "", "", "\n\n", "boolq", False),
    Task("piqa", _SOLUTION_LABELS, _SOLUTION_OPENING, "Solution", "\n\n", "\n\n", "piqa", True),
    Task("social_i_qa", _ANSWER_LABELS, _ANSWER_OPENING, "Answer", " ", "\n\n", "social_iqa", False),
    Task("hellaswag", _ENDING_LABELS, _ENDING_OPENING, "Ending", " ", "\n\n", "hellaswag", True),
    Task("winogrande", _OPTION_LABELS, _OPTION_OPENING, "Option", " ", " ", "winogrande", False),
    Task("ARC-Easy", _ANSWER_LABELS, _ANSWER_OPENING, "Answer", " ", "\n\n", "arc_easy", True),
    Task("ARC-Challenge", _ANSWER_LABELS, _ANSWER_OPENING, "Answer", " ", "\n\n", "arc_challenge", True),
    Task("openbookqa", _ANSWER_LABELS, _ANSWER_OPENING, "Answer", " ", "\n\n", "openbookqa", True),
)
# fmt: on

TASKS: dict[str, Task] = {task.key: task for task in _TASK_TABLE}
"""The eight tasks by key, in the order of the papers' tables."""


@dataclass(frozen=True)
class TaskRecord:
    """Item of a task.

    Attributes:
      task: Key of the task.
      index: Position in the task's file, from 0.
      instruction: Text to put into a prompt.
      question: Part of the instruction between the template's opening and the choices.
      choices: Choices as written; ``("true", "false")`` in boolq.
      labels: Label of each choice (``answer1``, ...).
      gold: Index of the correct choice.
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
        """Return the label of the correct choice."""
        return self.labels[self.gold]


def get_task(key: str) -> Task:
    """Return the task with a key.

    Raises:
      InputError: The task does not exist.
    """
    check_choice("task", key, TASKS)
    return TASKS[key]


def render_instruction(task: Task, question: str, choices: Sequence[str]) -> str:
    """Return the instruction of a question and its choices, as LLM-Adapters writes it."""
    numbered = task.choice_separator.join(
        f"{task.choice_heading}{number}: {text}" for number, text in enumerate(choices, start=1)
    )
    listing = f"\n\n{numbered}" if task.choice_heading else ""
    labels = "/".join(task.labels[: len(choices)])
    return f"{task.opening}{question}{listing}{task.format_separator}Answer format: {labels}"


def parse_instruction(task: Task, instruction: str) -> tuple[str, tuple[str, ...]]:
    """Return the question and the choices of an instruction: the inverse of `render_instruction`.

    Raises:
      InputError: The instruction does not follow the task's template.
    """
    # The labels at the end say how many choices there are.
    head, separator, labels = instruction.rpartition(f"{task.format_separator}Answer format: ")
    count = len(labels.split("/"))
    if not separator or not head.startswith(task.opening):
        raise _template_error(task, instruction)
    # Cut at the heading of each choice: the question comes first, and the last choice is what remains.
    question, choices = head.removeprefix(task.opening), task.labels
    if task.choice_heading:
        parts, remaining = [], question
        for number in range(1, count + 1):
            before = "\n\n" if number == 1 else task.choice_separator
            part, _, remaining = remaining.partition(f"{before}{task.choice_heading}{number}: ")
            parts.append(part)
        question, choices = parts[0], (*parts[1:], remaining)
    # Rendering must give the instruction back, so that no deviation from the template goes unnoticed.
    if render_instruction(task, question, choices) != instruction:
        raise _template_error(task, instruction)
    return question, choices


def _template_error(task: Task, instruction: str) -> InputError:
    return InputError(f"instruction must follow the template of {task.key}, got {shown(instruction)}")


def read_task(path: Path, task: Task) -> list[TaskRecord]:
    """Return all records of a task's file in order.

    Raises:
      InputError: The file does not exist, or a record does not follow the schema. The message names the file and the
        record.
    """
    rows = files.read_json(path, accepted="a JSON list of records")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: must hold a list of one or more records, got {shown(rows)}")
    return [_parse_record(task, index, row, f"{path}: record {index}") for index, row in enumerate(rows)]


RECORD_KEYS = ("instruction", "input", "output", "answer")
"""Keys of a record in a task's file."""


def _parse_record(task: Task, index: int, row: Any, where: str) -> TaskRecord:
    """Parse and validate one record of a task's file."""
    # The four keys hold strings, and no task uses the input.
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object with the keys {', '.join(RECORD_KEYS)}, got {json_type(row)}")
    for key in RECORD_KEYS:
        if not isinstance(row.get(key), str):
            raise InputError(f"{where}: {key} must be a string, got {shown(row.get(key))}")
    if row["input"]:
        raise InputError(f"{where}: input must be empty, got {shown(row['input'])}")
    # The instruction follows the template, and answer and output agree with its choices.
    try:
        question, choices = parse_instruction(task, row["instruction"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    labels = task.labels[: len(choices)]
    check_choice(f"{where}: answer", row["answer"], labels)
    expected = ANSWER_PREFIX + row["answer"]
    if row["output"] != expected:
        raise InputError(f"{where}: output must be {expected!r}, got {shown(row['output'])}")
    if task.key == "winogrande" and question.count("_") != 1:
        raise InputError(f"{where}: the sentence must have one blank '_', got {question.count('_')}")
    return TaskRecord(task.key, index, row["instruction"], question, choices, labels, labels.index(row["answer"]))


def chance_accuracy(records: Sequence[TaskRecord]) -> float:
    """Return the expected accuracy of guessing uniformly among each item's choices: the mean of 1/choices."""
    return math.fsum(1.0 / len(record.choices) for record in records) / len(records)


def majority_accuracy(records: Sequence[TaskRecord]) -> float:
    """Return the accuracy of always answering with the most frequent label of the records."""
    return Counter(record.answer for record in records).most_common(1)[0][1] / len(records)
