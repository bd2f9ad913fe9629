"""The published parser of answers: the first of the task's labels in the generated text."""

import re

from rora_theory.lab.data.prompts import RESPONSE_HEADING
from rora_theory.lab.data.tasks import Task


def response(generated: str) -> str:
    """Return the part of the generated text that the published evaluation parses.

    The published evaluation splits prompt and continuation at ``### Response:`` and parses the text after the last
    one. The prompt ends with ``### Response:``, so this only matters if the continuation repeats it.
    """
    return generated.split(RESPONSE_HEADING)[-1].strip()


def parse_answer(task: Task, text: str) -> str | None:
    """Return the first label of the task in the text, or None.

    The search is case-sensitive. None counts as wrong, as published, and its fraction is reported as ``unparsed``. The
    parser accepts every label of the task, including ``answer5`` for an item with four choices, and a label inside a
    word (``untrue``).

    Args:
      task: Task with the pattern of its labels.
      text: Text to search, see `response`.

    Examples:
      >>> from rora_theory.lab.data.tasks import TASKS
      >>> parse_answer(TASKS["piqa"], "the correct answer is solution2, not solution1")
      'solution2'
    """
    match = re.search(task.pattern, text)
    return match.group() if match else None
