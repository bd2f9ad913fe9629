"""The published answer parser, including its quirks."""

import pytest

from rora_theory.lab.data.tasks import TASKS
from rora_theory.lab.evaluate.answers import parse_answer, response


@pytest.mark.parametrize(
    ("key", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", None),  # case-sensitive
        ("boolq", "untrue", "true"),  # no word boundaries
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "Solution2", None),
        ("piqa", "solution 2", None),
        ("social_i_qa", "answer3", "answer3"),
        ("openbookqa", "answer5", "answer5"),  # a label the item does not have still parses
        ("ARC-Easy", "answer12", "answer1"),
        ("hellaswag", "ending4 ending1", "ending4"),  # the first in the text, not in the table
        ("winogrande", "option2", "option2"),
        ("winogrande", "", None),
    ],
)
def test_the_first_label_is_the_answer(key: str, text: str, answer: str | None) -> None:
    assert parse_answer(TASKS[key], text) == answer


def test_the_response_follows_the_last_marker() -> None:
    assert response("  the correct answer is true\n") == "the correct answer is true"
    assert response("true\n\n### Response:\n  false ") == "false"
