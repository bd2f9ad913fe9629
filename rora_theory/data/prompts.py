r"""The prompts of the commonsense benchmark: the two published ones, byte for byte, and a clean one.

The published code indents its f-string by 16 spaces and leaves that indentation in the text, and its training
and evaluation prompts differ in two places (DoRA `commonsense_reasoning/finetune.py` and
`commonsense_evaluate.py`, equal in LLM-Adapters). Whoever compares with published numbers needs those bytes;
``"clean"`` has neither flaw and is the same text in training and evaluation. The name of the template is
written beside every result.

======== ================================== =========================== ==============================
template after the opening sentence         line before ``### Response:`` last bytes of the prompt
======== ================================== =========================== ==============================
train    two spaces, ``\n\n``               16 spaces                   ``### Response:\n`` + 16 spaces
eval     one space, ``\n\n``                empty                       ``### Response:\n`` + 16 spaces
clean    ``\n\n``                           empty                       ``### Response:\n``
======== ================================== =========================== ==============================
"""

from typing import Literal, get_args

from rora_theory.errors import InputError

Template = Literal["train", "eval", "clean"]
TEMPLATES: tuple[str, ...] = get_args(Template)

RESPONSE = "### Response:"
"""What the published evaluation splits the generated text at."""

ANSWER_PREFIX = "the correct answer is "
"""What every ``output`` of the data begins with; the label follows."""

_REQUEST = "Write a response that appropriately completes the request."
_ALONE = f"Below is an instruction that describes a task. {_REQUEST}"
_PAIRED = "Below is an instruction that describes a task, paired with an input that provides further context."
_INDENT = " " * 16

# What differs between the templates: the spaces after the opening without and with an input, the indentation
# of every line, and the text of the lines that look empty.
_LAYOUT = {"train": ("  ", " ", _INDENT, _INDENT), "eval": (" ", "", _INDENT, ""), "clean": ("", "", "", "")}


def prompt(instruction: str, template: str = "eval", *, input: str = "") -> str:  # noqa: A002 (the data's own key)
    r"""The text up to where the response begins.

    Args:
      instruction: the record's ``instruction``.
      template: ``"train"``, ``"eval"`` or ``"clean"``, see the module's table.
      input: the record's ``input``; empty in all eight tasks.

    Raises:
      InputError: an unknown template.

    Examples:
      >>> prompt("Say true.", "clean")[-42:]
      '### Instruction:\nSay true.\n\n### Response:\n'
    """
    if template not in _LAYOUT:
        raise InputError(f"template is {template!r}; accepted are {', '.join(TEMPLATES)}")
    after_alone, after_with_input, indent, empty = _LAYOUT[template]
    opening = f"{_PAIRED} {_REQUEST}" + after_with_input if input else _ALONE + after_alone
    sections = [("### Instruction:", instruction)] + ([("### Input:", input)] if input else [])
    body = "".join(f"{indent}{title}\n{indent}{text}\n{empty}\n" for title, text in sections)
    return f"{opening}\n\n{body}{indent}{RESPONSE}\n{indent}"


def training_text(
    instruction: str,
    output: str,
    template: str = "train",
    *,
    input: str = "",  # noqa: A002
) -> str:
    """The whole training example, prompt and response, as the published code tokenizes it (without the end token)."""
    return prompt(instruction, template, input=input) + output
