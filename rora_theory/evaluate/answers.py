"""From generated text to an answer: the published parser, first hit of the task's labels."""

import re

from rora_theory.data.prompts import RESPONSE
from rora_theory.data.tasks import Task


def response(generated: str) -> str:
    """The part of the generated text that the published evaluation keeps.

    It splits prompt and continuation together at ``### Response:`` and keeps what follows the last one; the
    prompt ends just after one, so only a repetition inside the continuation cuts anything.
    """
    return generated.split(RESPONSE)[-1].strip()


def parse_answer(task: Task, text: str) -> str | None:
    """The first label of the task found in ``text``, case-sensitive; None where there is none.

    None counts as wrong, as published, and its share is reported as ``unparsed``. The parser accepts every
    label of the task, ``answer5`` of a four-choice item too, and a label inside a word (``untrue``).

    Examples:
      >>> from rora_theory.data.tasks import TASKS
      >>> parse_answer(TASKS["piqa"], "the correct answer is solution2, not solution1")
      'solution2'
    """
    found = re.search(task.pattern, text)
    return found.group() if found else None
