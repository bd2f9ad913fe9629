"""The task table, the instruction templates and their inverse, and messages on invalid records."""

import json
from pathlib import Path

import pytest
from support.record_files import write

from rora_theory.errors import InputError
from rora_theory.lab.data import tasks
from rora_theory.lab.data.tasks import TASKS
from rora_theory.paper.tasks import PUBLISHED_TASKS

SIZES = [3270, 1838, 1954, 10042, 1267, 2376, 1172, 500]

# One instruction of each shape, written out.
INSTRUCTIONS = {
    "boolq": "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
    "piqa": "Please choose the correct solution to the question: dresser"
    "\n\nSolution1: pin \n\nSolution2: wood\n\nAnswer format: solution1/solution2",
    "social_i_qa": "Please choose the correct answer to the question: A. How?"
    "\n\nAnswer1: x Answer2: y Answer3: z\n\nAnswer format: answer1/answer2/answer3",
    "hellaswag": "Please choose the correct ending to complete the given sentence: Act: he"
    "\n\nEnding1: a. Ending2: b. Ending3: c. Ending4: d."
    "\n\nAnswer format: ending1/ending2/ending3/ending4",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: "
    "the _ was.\n\nOption1: blanket Option2: bed Answer format: option1/option2",
    "ARC-Easy": "Please choose the correct answer to the question: Q?"
    "\n\nAnswer1: 1 Answer2: 2 Answer3: 3 Answer4: 4 Answer5: 5"
    "\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
}
PARTS = {
    "boolq": ("is it?", ("true", "false")),
    "piqa": ("dresser", ("pin ", "wood")),
    "social_i_qa": ("A. How?", ("x", "y", "z")),
    "hellaswag": ("Act: he", ("a.", "b.", "c.", "d.")),
    "winogrande": ("the _ was.", ("blanket", "bed")),
    "ARC-Easy": ("Q?", ("1", "2", "3", "4", "5")),
}


def test_table_holds_the_eight_tasks_with_their_published_sizes() -> None:
    assert list(TASKS) == list(PUBLISHED_TASKS)
    assert [task.size for task in PUBLISHED_TASKS.values()] == SIZES
    assert sum(SIZES) == 22419
    assert [task.name for task in TASKS.values()] == [
        "BoolQ", "PIQA", "SIQA", "HellaS", "WinoG", "ARC-e", "ARC-c", "OBQA",
    ]  # fmt: skip


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_parse_inverts_render(key: str) -> None:
    task = TASKS[key]
    assert tasks.parse_instruction(task, INSTRUCTIONS[key]) == PARTS[key]
    assert tasks.render_instruction(task, *PARTS[key]) == INSTRUCTIONS[key]


# Accuracy of guessing and of the most frequent label in per cent, as stated beside the data.
LEVELS = {
    "boolq": (50.00, 60.06),
    "piqa": (50.00, 50.38),
    "social_i_qa": (33.33, 34.29),
    "hellaswag": (25.00, 25.91),
    "winogrande": (50.00, 50.16),
    "ARC-Easy": (25.00, 27.61),
    "ARC-Challenge": (25.00, 29.52),
    "openbookqa": (25.00, 28.40),
}


@pytest.mark.parametrize("key", TASKS)
def test_the_data_s_records_and_levels(key: str, commonsense_dir: Path) -> None:
    """Every record equals the same item as parsed by the authors of the data."""
    records = tasks.read_task(commonsense_dir / key / "test.json", TASKS[key])
    lines = (commonsense_dir / key / "test_mc.jsonl").read_text().splitlines()
    prepared = [json.loads(line) for line in lines]
    assert [(r.question, list(r.choices), r.gold) for r in records] == [
        (p.get("question", p.get("context")), p["choices"], p["label"]) for p in prepared
    ]
    assert [record.index for record in records] == list(range(len(records)))
    levels = 100 * tasks.chance_accuracy(records), 100 * tasks.majority_accuracy(records)
    assert levels == pytest.approx(LEVELS[key], abs=0.005)


def _row(key: str = "piqa", **changes: object) -> dict[str, object]:
    answer = TASKS[key].labels[-1]
    row = {"instruction": INSTRUCTIONS[key], "input": "", "answer": answer}
    return row | {"output": f"the correct answer is {answer}"} | changes


def test_a_valid_record_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "test.json", [_row()])
    (record,) = tasks.read_task(Path(path), TASKS["piqa"])
    assert (record.answer, record.gold, record.labels) == ("solution2", 1, ("solution1", "solution2"))


TWO_BLANKS = INSTRUCTIONS["winogrande"].replace(" _ ", " __ ")


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("piqa", "[{", "is not JSON"),
        ("piqa", [], r"list .* got \[\]"),
        ("piqa", {"a": 1}, "got {'a': 1}"),
        ("piqa", [3], "record 0 .* object .*, got a number"),
        ("piqa", [{"instruction": "x"}], "record 0: input .* string, got None"),
        ("piqa", [_row(), _row(answer="solution3")], "record 1.* answer .* solution1, solution2, got 'solution3'"),
        ("piqa", [_row(), _row(answer=None)], "record 1.* answer .* string, got None"),
        ("piqa", [_row(), _row(output="solution2")], "record 1.* output .* 'the correct answer is solution2', got"),
        ("piqa", [_row(), _row(input="more")], "record 1.* input .* empty, got 'more'"),
        ("piqa", [_row(), _row(instruction="Please choose.")], "record 1.* template of piqa"),
        ("piqa", [_row("boolq")], "record 0.* template of piqa"),
        # A different number of choices listed than shown.
        ("piqa", [_row(instruction=INSTRUCTIONS["piqa"] + "/solution3")], "record 0.* template of piqa"),
        ("winogrande", [_row("winogrande", instruction=TWO_BLANKS)], "record 0: .* one blank .* got 2"),
    ],
)
def test_bad_files_and_records_are_named(key: str, content: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "test.json", content)
    with pytest.raises(InputError, match=message) as caught:
        tasks.read_task(Path(path), TASKS[key])
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_a_missing_task_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"piqa/test.json: no such file"):
        tasks.read_task(tmp_path / "piqa" / "test.json", TASKS["piqa"])
    with pytest.raises(InputError, match=r"task .*boolq, piqa.* got 'arc'"):
        tasks.get_task("arc")
