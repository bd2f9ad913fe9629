"""Prompts equal the published ones byte for byte."""

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.data import prompts

SPACES = " " * 16
REQUEST = "Write a response that appropriately completes the request."
ALONE = "Below is an instruction that describes a task. " + REQUEST
PAIRED = "Below is an instruction that describes a task, paired with an input that provides further context. " + REQUEST
ASK, INPUT, ANSWER = "### Instruction:", "### Input:", "### Response:"

# Written out line by line, as `cat -A` shows the published code's f-strings.
BYTES = {
    ("train", ""): [ALONE + "  ", "", SPACES + ASK, SPACES + "Q?", SPACES, SPACES + ANSWER, SPACES],
    ("eval", ""): [ALONE + " ", "", SPACES + ASK, SPACES + "Q?", "", SPACES + ANSWER, SPACES],
    ("clean", ""): [ALONE, "", ASK, "Q?", "", ANSWER, ""],
    ("train", "I"): [
        PAIRED + " ", "", SPACES + ASK, SPACES + "Q?", SPACES, SPACES + INPUT, SPACES + "I", SPACES,
        SPACES + ANSWER, SPACES,
    ],
    ("eval", "I"): [
        PAIRED, "", SPACES + ASK, SPACES + "Q?", "", SPACES + INPUT, SPACES + "I", "",
        SPACES + ANSWER, SPACES,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("template", "extra"), BYTES)
def test_prompt_bytes(template: str, extra: str) -> None:
    assert prompts.prompt("Q?", template, input=extra).split("\n") == BYTES[template, extra]


def test_a_multi_line_instruction_is_not_indented_again() -> None:
    assert f"{SPACES}a\n\nb\n{SPACES}\n" in prompts.prompt("a\n\nb", "train")


def test_unknown_template_is_refused() -> None:
    with pytest.raises(InputError, match=r"template .*train, eval, clean, got 'Train'"):
        prompts.prompt("Q?", "Train")
