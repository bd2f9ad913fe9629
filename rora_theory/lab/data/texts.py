"""Render training records with a template, and locate the parts of the text that are in the loss."""

import math
import operator
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from rora_theory.errors import InputError, shown
from rora_theory.lab.data import chat as chats
from rora_theory.lab.data import limited_process, prompts
from rora_theory.lab.data.chat import ChatTemplate, RenderedText
from rora_theory.lab.data.formats import (
    DEFAULT_TEMPLATES,
    TRAIN_TEMPLATES,
    AnyRecord,
    Chat,
    Record,
    RecordErrors,
    Text,
)
from rora_theory.scaling import check_choice


def default_template(records: Sequence[AnyRecord]) -> str:
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


RENDER_SECONDS = 30
"""Maximum processor time to render chats of any size. The next two limits are added to it."""

RENDER_SECONDS_PER_BYTE = 1e-5
"""Maximum processor time per byte of the chats."""

RENDER_SECONDS_PER_BYTE_AND_TURN = 1e-6
"""Maximum processor time per byte of a chat, times the number of its turns."""

MAX_COUNTED_TURNS = 1000
"""Maximum number of turns of a chat that its time limit counts. Locating a turn may take renderings of the chat."""

RENDER_MEMORY = 1 << 30
"""Maximum memory in bytes to render chats of any size. The next limit is added to it."""

RENDER_MEMORY_PER_BYTE = 16
"""Maximum memory in bytes per byte of the chats."""


def render_records(
    records: Sequence[AnyRecord],
    template: str,
    chat: ChatTemplate | None = None,
    *,
    answer_only: bool = True,
    max_characters: int | None = None,
) -> list[RenderedText]:
    """Render many records, see `render_record`.

    A chat template is untrusted code, so chats are rendered in a child process with limits, see `limited_process`.

    Args:
      records: Records to render.
      template: Name of the template.
      chat: Chat template, if ``template`` is ``chat``.
      answer_only: Whether only the answer is in the loss, see `render_record`.
      max_characters: Maximum length of a text. Longer texts are cut at the end, and so are their parts in the loss.
        None sets no limit.

    Returns:
      The text of each record, and its parts in the loss.

    Raises:
      InputError: Records cannot be rendered, of which the message lists the first ten and the number; or a chat
        template takes too much time or memory, or writes too much, which stops the work at once.
    """
    if template != "chat" or chat is None:
        rendered: list[Any] = list(_render_each(records, template, chat, answer_only, max_characters))
    else:
        rendered = _render_in_child(records, chat, answer_only, max_characters)
    # A string stands for a record that could not be rendered: it is the message of the error.
    errors = RecordErrors()
    for result in rendered:
        if isinstance(result, str):
            errors.add(result)
    errors.raise_if_any(len(records))
    # JSON from the child has lists in place of tuples.
    return [RenderedText(text, tuple(map(tuple, spans))) for text, spans in rendered]


def _render_in_child(
    records: Sequence[AnyRecord], chat: ChatTemplate, answer_only: bool, max_characters: int | None
) -> list[Any]:
    """Render chats in a child process; the result of a chat that the template rejects is the error's message."""
    # Limits grow with the data. Honest templates stay far below them.
    sizes = [len(pickle.dumps(record)) for record in records]
    turns = [min(len(record.messages), MAX_COUNTED_TURNS) if isinstance(record, Chat) else 1 for record in records]
    seconds = (
        RENDER_SECONDS
        + RENDER_SECONDS_PER_BYTE * sum(sizes)
        + RENDER_SECONDS_PER_BYTE_AND_TURN * sum(map(operator.mul, sizes, turns))
    )
    memory = RENDER_MEMORY + RENDER_MEMORY_PER_BYTE * sum(sizes)
    arguments = records, "chat", chat, answer_only, max_characters, memory // 4
    try:
        return limited_process.run(_render_each, *arguments, seconds=seconds, memory=memory)
    except limited_process.LimitError as error:
        # The record after the last result is the one that reached the limit.
        where = _record_name(records[min(len(error.results), len(records) - 1)])
        raise InputError(f"{where}: {chat.where}: the chat template {error}. Use a template that takes less.") from None


def _render_each(
    records: Sequence[AnyRecord],
    template: str,
    chat: ChatTemplate | None,
    answer_only: bool,
    max_characters: int | None,
    max_total: float = math.inf,
) -> Iterator[RenderedText | str]:
    """Render records one by one, and yield the error's message for one that cannot be rendered.

    Args:
      records: Records to render.
      template: Name of the template.
      chat: Chat template, if ``template`` is ``chat``.
      answer_only: Whether only the answer is in the loss.
      max_characters: Maximum length of a text, see `render_records`.
      max_total: Maximum length of all texts together.

    Raises:
      InputError: The texts together are longer.
    """
    remaining = max_total
    for record in records:
        result: RenderedText | str
        try:
            rendered = render_record(record, template, chat, answer_only=answer_only, max_characters=max_characters)
            result = _truncate(rendered, max_characters)
        except InputError as error:
            result = str(error)
        # Limit the total length: a template may write far more text than the record has.
        remaining -= len(result if isinstance(result, str) else result.text)
        if remaining < 0:
            raise InputError(
                f"{_record_name(record)}: the chat template writes much more text than the data have. Use a template "
                "that writes less."
            )
        yield result


def _truncate(rendered: RenderedText, max_characters: int | None) -> RenderedText:
    if max_characters is None:
        return rendered
    spans = tuple((min(begin, max_characters), min(end, max_characters)) for begin, end in rendered.spans)
    return RenderedText(rendered.text[:max_characters], spans)


def _record_name(record: AnyRecord) -> str:
    """Return the name of a record in errors."""
    return record.where if isinstance(record, Chat) else shown(record[0])


def render_record(
    record: AnyRecord,
    template: str,
    chat: ChatTemplate | None = None,
    *,
    answer_only: bool = True,
    max_characters: int | None = None,
) -> RenderedText:
    r"""Render a record and locate the parts of its text that are in the loss.

    Args:
      record: Record to render.
      template: ``train``, ``eval`` or ``clean`` (see `prompts`); ``chat``, the turns of a chat; or ``plain``, the
        prompt followed immediately by the response, or a text unchanged. In ``plain``, an input stands below its
        instruction, separated by an empty line.
      chat: Chat template that renders the template ``chat``.
      answer_only: Whether only the answer is in the loss, instead of the whole text. In a chat, turns with weight 0
        are not in the loss in either case.
      max_characters: Number of characters of the text for which the parts have to be right, see
        `ChatTemplate.render_with_spans`.

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
            raise InputError(f"template is 'chat', but there is no chat template. {chats.TEMPLATE_ADVICE}")
        conversation = chats.chat_from_record(record) if isinstance(record, Record) else record
        try:
            return chat.render_with_spans(
                conversation.messages,
                conversation.tools,
                context=conversation.context,
                answer_only=answer_only,
                max_characters=max_characters,
            )
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
