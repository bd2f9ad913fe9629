"""Names and sizes of the eight commonsense tasks in the papers' tables."""

from typing import NamedTuple


class PublishedTask(NamedTuple):
    """Task on which the papers report an accuracy.

    Attributes:
      name: Column of the task in the papers' tables.
      size: Number of items in the full evaluation set, on which published accuracies are measured.
      choices: Number of choices of (nearly) every item in that set.
    """

    name: str
    size: int
    choices: int


PUBLISHED_TASKS: dict[str, PublishedTask] = {
    "boolq": PublishedTask("BoolQ", 3270, 2),
    "piqa": PublishedTask("PIQA", 1838, 2),
    "social_i_qa": PublishedTask("SIQA", 1954, 3),
    "hellaswag": PublishedTask("HellaS", 10042, 4),
    "winogrande": PublishedTask("WinoG", 1267, 2),
    "ARC-Easy": PublishedTask("ARC-e", 2376, 4),
    "ARC-Challenge": PublishedTask("ARC-c", 1172, 4),
    "openbookqa": PublishedTask("OBQA", 500, 4),
}
"""The eight tasks by the name of their folder in the LLM-Adapters schema, in the order of the papers' tables."""
