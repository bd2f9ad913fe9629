r"""Prompts of the commonsense benchmark: the two published ones, byte for byte, and a clean one.

The published code indents its f-string by 16 spaces and leaves that indentation in the text. Its training and
evaluation prompts differ in two places (DoRA `commonsense_reasoning/finetune.py` and `commonsense_evaluate.py`, equal
in LLM-Adapters). A comparison with published numbers needs exactly these bytes. ``"clean"`` has neither flaw and is the
same text in training and evaluation. Every result names its template.

======== ================================== =========================== ==============================
template after the opening sentence         line before ``### Response:`` last bytes of the prompt
======== ================================== =========================== ==============================
train    two spaces, ``\n\n``               16 spaces                   ``### Response:\n`` + 16 spaces
eval     one space, ``\n\n``                empty                       ``### Response:\n`` + 16 spaces
clean    ``\n\n``                           empty                       ``### Response:\n``
======== ================================== =========================== ==============================
"""

from typing import Literal, NamedTuple, get_args

from rora_theory.scaling import check_choice

Template = Literal["train", "eval", "clean"]
TEMPLATES: tuple[str, ...] = get_args(Template)

RESPONSE_HEADING = "### Response:"
"""Heading of the response, at which the published evaluation splits the generated text."""

ANSWER_PREFIX = "the correct answer is "
"""Beginning of every ``output`` of the data; the label follows."""

_REQUEST = "Write a response that appropriately completes the request."
_OPENING = f"Below is an instruction that describes a task. {_REQUEST}"
_OPENING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. " + _REQUEST
)
_INDENT = " " * 16


class _Layout(NamedTuple):
    """White space of a template.

    Attributes:
      after_opening: Spaces after the opening without an input.
      after_opening_with_input: Spaces after the opening with an input.
      indent: Indentation of every line.
      empty_line: Content of the lines that look empty.
    """

    after_opening: str
    after_opening_with_input: str
    indent: str
    empty_line: str


_LAYOUTS = {
    "train": _Layout("  ", " ", _INDENT, _INDENT),
    "eval": _Layout(" ", "", _INDENT, ""),
    "clean": _Layout("", "", "", ""),
}


def prompt(instruction: str, template: str = "eval", *, input: str = "") -> str:  # noqa: A002 (the data's own key)
    r"""Return the text up to the beginning of the response.

    Args:
      template: ``"train"``, ``"eval"`` or ``"clean"``, see the module's table.
      input: Input of the record, which is empty in all eight tasks.

    Raises:
      InputError: The template does not exist.

    Examples:
      >>> prompt("Say true.", "clean")[-42:]
      '### Instruction:\nSay true.\n\n### Response:\n'
    """
    check_choice("template", template, TEMPLATES)
    layout = _LAYOUTS[template]
    opening = _OPENING_WITH_INPUT + layout.after_opening_with_input if input else _OPENING + layout.after_opening
    sections = [("### Instruction:", instruction)] + ([("### Input:", input)] if input else [])
    indent = layout.indent
    body = "".join(f"{indent}{heading}\n{indent}{text}\n{layout.empty_line}\n" for heading, text in sections)
    return f"{opening}\n\n{body}{indent}{RESPONSE_HEADING}\n{indent}"
