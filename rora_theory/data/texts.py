"""The text of a training record under a template, and which letters of it are the answer's."""

from collections.abc import Sequence

from rora_theory.data import chat as chats
from rora_theory.data import prompts
from rora_theory.data.chat import ChatTemplate, Written
from rora_theory.data.formats import OWN_TEMPLATES, TRAIN_TEMPLATES, AnyRecord, Chat, Record, Text
from rora_theory.errors import InputError


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


def write(record: AnyRecord, template: str, chat: ChatTemplate | None = None) -> Written:
    r"""The text of a record.

    Args:
      record: what to write.
      template: ``train``, ``eval`` or ``clean``, see `prompts`; ``chat``: as the turns of a chat; ``plain``: the prompt
        and at once the response, with nothing between them, or a text as it is. Plain, an input stands below its
        instruction, an empty line between.
      chat: the chat template where ``template`` is ``chat``.

    Raises:
      InputError: an unknown template, one that the record can't be written in, or a chat template that refuses it;
        names the record.

    Example:
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
            return chat.write(whole.messages, whole.tools, context=whole.context)
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
