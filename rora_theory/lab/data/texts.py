"""Render training records with a template, and locate the parts of the text that are in the loss."""

from collections.abc import Sequence

from rora_theory.chat_templates import TEMPLATE_ADVICE, ChatTemplate, RenderedText
from rora_theory.errors import InputError
from rora_theory.lab.data import prompts
from rora_theory.lab.data.chat import chat_from_record
from rora_theory.lab.data.formats import (
    DEFAULT_TEMPLATES,
    TRAIN_TEMPLATES,
    AnyRecord,
    Chat,
    Record,
    RecordErrors,
    Text,
    TrainTemplate,
)
from rora_theory.scaling import check_choice


def default_template(records: Sequence[AnyRecord]) -> TrainTemplate:
    """Return the template of records for which none is named.

    Raises:
      InputError: The records are of kinds with different defaults.
    """
    defaults = list(dict.fromkeys(DEFAULT_TEMPLATES[type(record)] for record in records))
    if len(defaults) > 1:
        raise InputError(
            f"template must be given for records with different defaults, got None for {', '.join(defaults)}"
        )
    return defaults[0] if defaults else "train"


def render_records(
    records: Sequence[AnyRecord], template: str, chat: ChatTemplate | None = None, *, answer_only: bool = True
) -> list[RenderedText]:
    """Render many records, see `render_record`.

    Args:
      chat: Chat template, if ``template`` is ``chat``.
      answer_only: Whether only the answer is in the loss, see `render_record`.

    Returns:
      The text of each record, and its parts in the loss.

    Raises:
      InputError: Records cannot be rendered, of which the message lists the first ten and the number.
    """
    rendered, errors = [], RecordErrors()
    for record in records:
        try:
            rendered.append(render_record(record, template, chat, answer_only=answer_only))
        except InputError as error:
            errors.add(str(error))
    errors.raise_if_any(len(records))
    return rendered


def render_record(
    record: AnyRecord,
    template: str,
    chat: ChatTemplate | None = None,
    *,
    answer_only: bool = True,
) -> RenderedText:
    r"""Render a record and locate the parts of its text that are in the loss.

    Args:
      template: ``train``, ``eval`` or ``clean`` (see `prompts`); ``chat``, the turns of a chat; or ``plain``, the
        prompt followed immediately by the response, or a text unchanged. In ``plain``, an input stands below its
        instruction, separated by an empty line.
      chat: Chat template that renders the template ``chat``.
      answer_only: Whether only the answer is in the loss, instead of the whole text. In a chat, turns with weight 0
        are not in the loss in either case.

    Raises:
      InputError: The template does not exist or cannot render the record, or the chat template rejects it. The message
        of a chat names the record.

    Examples:
      >>> render_record(Record("2 + 2 = ", "4"), "plain")
      RenderedText(text='2 + 2 = 4', spans=((8, 9),))
    """
    if isinstance(record, Text):
        if template != "plain":
            raise InputError(f"template must be plain for texts, which have no prompt and response, got {template!r}")
        return RenderedText(record.text, () if answer_only else ((0, len(record.text)),))
    # The template `chat`: the model's own code locates the turns.
    if template == "chat":
        if chat is None:
            raise InputError(f"template is 'chat', but there is no chat template. {TEMPLATE_ADVICE}")
        conversation = chat_from_record(record) if isinstance(record, Record) else record
        try:
            return chat.render_with_spans(conversation.messages, conversation.tools, answer_only=answer_only)
        except InputError as error:
            raise InputError(f"{conversation.where}: {error}") from None
    # All others: the answer is the end of the text.
    if template not in prompts.TEMPLATES:
        check_choice("template", template, TRAIN_TEMPLATES)
    record = record.as_record() if isinstance(record, Chat) else record
    if template == "plain":
        prompt = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    else:
        prompt = prompts.prompt(record.instruction, template, input=record.input)
    text = prompt + record.output
    return RenderedText(text, ((len(prompt) if answer_only else 0, len(text)),))
