"""The text of a training record under a template, and which letters of it are the answer's."""

import pickle
from collections.abc import Iterator, Sequence

from rora_theory.data import chat as chats
from rora_theory.data import limited, prompts
from rora_theory.data.chat import ChatTemplate, Written
from rora_theory.data.formats import OWN_TEMPLATES, TRAIN_TEMPLATES, AnyRecord, Chat, Record, Text
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


SECONDS, SECONDS_PER_BYTE = 30, 1e-5
"""Maximum processor time to render chats: a constant, and for each byte of data."""

MEMORY, MEMORY_PER_BYTE = 1 << 30, 16
"""Maximum memory to render chats: a constant, and for each byte of data."""


def write_all(
    records: Sequence[AnyRecord], template: str, chat: ChatTemplate | None = None, *, letters: int | None = None
) -> list[Written]:
    """Write many records, see `write`.

    A chat template is code from anyone, so chats are rendered in one child process with limits, see `limited`.

    Args:
      records: Records to write.
      template: Name of the template.
      chat: Chat template, where ``template`` is ``chat``.
      letters: Maximum length of a text: longer ones are cut at the end. None is no limit.

    Returns:
      The text of each record.

    Raises:
      InputError: As `write`, or a chat template that takes too much time or memory.
    """
    if template != "chat" or chat is None:
        return [_cut(write(record, template, chat), letters) for record in records]
    size = len(pickle.dumps(records))
    seconds, memory = SECONDS + SECONDS_PER_BYTE * size, MEMORY + MEMORY_PER_BYTE * size
    try:
        written = limited.run(_write_chats, records, chat, letters, memory // 4, seconds=seconds, memory=memory)
    except limited.LimitError as error:
        record = records[min(len(error.done), len(records) - 1)]
        where = record.where if isinstance(record, Chat) else shown(record[0])
        raise InputError(f"{where}: {chat.where}: the chat template {error}; accepted is one that takes less") from None
    return [Written(text, tuple(map(tuple, spans))) for text, spans in written]


def _write_chats(records: Sequence[AnyRecord], chat: ChatTemplate, letters: int | None, most: int) -> Iterator[Written]:
    """Write chats of at most ``most`` letters in all."""
    for record in records:
        written = _cut(write(record, "chat", chat, letters=letters), letters)
        most -= len(written.text)
        if most < 0:
            raise InputError(f"{chat.where}: the chat template writes much more than the data have; accepted is less")
        yield written


def _cut(written: Written, letters: int | None) -> Written:
    return written if letters is None else Written(written.text[:letters], written.spans)


def write(record: AnyRecord, template: str, chat: ChatTemplate | None = None, *, letters: int | None = None) -> Written:
    r"""The text of a record.

    Args:
      record: what to write.
      template: ``train``, ``eval`` or ``clean``, see `prompts`; ``chat``: as the turns of a chat; ``plain``: the prompt
        and at once the response, with nothing between them, or a text as it is. Plain, an input stands below its
        instruction, an empty line between.
      chat: the chat template where ``template`` is ``chat``.
      letters: see `ChatTemplate.write`.

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
        return Written(record.text, ())
    if template == "chat":
        if chat is None:
            raise InputError(f"template is chat and there is no chat template; {chats.CHOICES}")
        whole = chats.of_record(record) if isinstance(record, Record) else record
        try:
            return chat.write(whole.messages, whole.tools, context=whole.context, letters=letters)
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
    return Written(text, ((len(head), len(text)),))
