"""The text of a training record under a template, and its parts that are in the loss."""

import math
import operator
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from rora_theory.data import chat as chats
from rora_theory.data import limited, prompts
from rora_theory.data.chat import ChatTemplate, Written
from rora_theory.data.formats import OWN_TEMPLATES, TRAIN_TEMPLATES, AnyRecord, BadRecords, Chat, Record, Text
from rora_theory.errors import InputError, shown


def default_template(records: Sequence[AnyRecord]) -> str:
    """The template of records where none is named: that of their kind.

    Raises:
      InputError: kinds with different ones.
    """
    own = list(dict.fromkeys(OWN_TEMPLATES[type(record)] for record in records))
    if len(own) > 1:
        raise InputError(
            f"template is not given, and the records' kinds have their own: {', '.join(own)}; accepted is one"
        )
    return own[0] if own else "train"


SECONDS, SECONDS_PER_BYTE, SECONDS_PER_TURN = 30, 1e-5, 1e-6
"""Maximum processor time to render chats: a constant, for each byte, and for each byte times the turns of its chat."""

COUNTED_TURNS = 1000
"""Maximum number of a chat's turns that its time counts; each may take renderings of the chat to be located."""

MEMORY, MEMORY_PER_BYTE = 1 << 30, 16
"""Maximum memory to render chats: a constant, and for each byte of data."""


def write_all(
    records: Sequence[AnyRecord],
    template: str,
    chat: ChatTemplate | None = None,
    *,
    answer_only: bool = True,
    letters: int | None = None,
) -> list[Written]:
    """Write many records, see `write`.

    A chat template is code from anyone, so chats are rendered in one child process with limits, see `limited`.

    Args:
      records: Records to write.
      template: Name of the template.
      chat: Chat template, where ``template`` is ``chat``.
      answer_only: Whether only the answer is in the loss, see `write`.
      letters: Maximum length of a text: longer ones are cut at the end, and their parts in the loss with them. None is
        no limit.

    Returns:
      The text of each record, and its parts in the loss.

    Raises:
      InputError: Records can't be written, of which the message lists the first ten and the number; or a chat template
        takes too much time or memory, or writes too much, which ends the work at once.
    """
    if template != "chat" or chat is None:
        written: list[Any] = list(_write_each(records, template, chat, answer_only, letters))
    else:
        written = _write_in_child(records, chat, answer_only, letters)
    bad = BadRecords()
    for message in written:
        if isinstance(message, str):
            bad.add(message)
    bad.check(len(records))
    return [Written(text, tuple(map(tuple, spans))) for text, spans in written]


def _write_in_child(
    records: Sequence[AnyRecord], chat: ChatTemplate, answer_only: bool, letters: int | None
) -> list[Any]:
    """Render chats in a child process; of one that its template refuses, the result is the error's message."""
    sizes = [len(pickle.dumps(record)) for record in records]
    turns = [min(len(record.messages), COUNTED_TURNS) if isinstance(record, Chat) else 1 for record in records]
    seconds = SECONDS + SECONDS_PER_BYTE * sum(sizes) + SECONDS_PER_TURN * sum(map(operator.mul, sizes, turns))
    memory = MEMORY + MEMORY_PER_BYTE * sum(sizes)
    arguments = records, "chat", chat, answer_only, letters, memory // 4
    try:
        return limited.run(_write_each, *arguments, seconds=seconds, memory=memory)
    except limited.LimitError as error:
        where = _place(records[min(len(error.done), len(records) - 1)])
        raise InputError(f"{where}: {chat.where}: the chat template {error}; accepted is one that takes less") from None


def _write_each(
    records: Sequence[AnyRecord],
    template: str,
    chat: ChatTemplate | None,
    answer_only: bool,
    letters: int | None,
    most: float = math.inf,
) -> Iterator[Written | str]:
    """Write records of at most ``most`` letters in all; for one that can't be written, yield the error's message."""
    for record in records:
        written: Written | str
        try:
            written = _cut(write(record, template, chat, answer_only=answer_only, letters=letters), letters)
        except InputError as error:
            written = str(error)
        most -= len(written if isinstance(written, str) else written.text)
        if most < 0:
            raise InputError(
                f"{_place(record)}: the chat template writes much more in all than the data have; accepted is less"
            )
        yield written


def _cut(written: Written, letters: int | None) -> Written:
    if letters is None:
        return written
    spans = tuple((min(begin, letters), min(end, letters)) for begin, end in written.spans)
    return Written(written.text[:letters], spans)


def _place(record: AnyRecord) -> str:
    """Return how errors name a record."""
    return record.where if isinstance(record, Chat) else shown(record[0])


def write(
    record: AnyRecord,
    template: str,
    chat: ChatTemplate | None = None,
    *,
    answer_only: bool = True,
    letters: int | None = None,
) -> Written:
    r"""Render a record and locate the parts of its text that are in the loss.

    Args:
      record: Record to render.
      template: ``train``, ``eval`` or ``clean`` (see `prompts`); ``chat``, the turns of a chat; or ``plain``, the
        prompt followed immediately by the response, or a text as it is. In ``plain``, an input stands below its
        instruction, separated by an empty line.
      chat: Chat template that renders the template ``chat``.
      answer_only: Whether only the answer is in the loss, instead of the whole text. In a chat, turns with weight 0
        are not in the loss in either case.
      letters: Number of letters of the text for which the parts have to be right, see `ChatTemplate.write`.

    Raises:
      InputError: an unknown template, one that the record can't be written in, or a chat template that refuses it;
        names the record.

    Examples:
      >>> write(Record("2 + 2 = ", "4"), "plain")
      Written(text='2 + 2 = 4', spans=((8, 9),))
    """
    if isinstance(record, Text):
        if template != "plain":
            raise InputError(f"template is {template} with a text, which has no prompt and response; accepted is plain")
        return Written(record.text, () if answer_only else ((0, len(record.text)),))
    if template == "chat":
        if chat is None:
            raise InputError(f"template is chat and there is no chat template; {chats.CHOICES}")
        whole = chats.of_record(record) if isinstance(record, Record) else record
        try:
            return chat.write(
                whole.messages, whole.tools, context=whole.context, answer_only=answer_only, letters=letters
            )
        except InputError as error:
            raise InputError(f"{whole.where}: {error}") from None
    if template not in {*TRAIN_TEMPLATES, *prompts.TEMPLATES}:
        raise InputError(f"template is {template!r}; accepted are {', '.join(TRAIN_TEMPLATES)}")
    record = record.as_record() if isinstance(record, Chat) else record
    if template == "plain":
        head = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    else:
        head = prompts.prompt(record.instruction, template, input=record.input)
    text = head + record.output
    return Written(text, ((len(head) if answer_only else 0, len(text)),))
