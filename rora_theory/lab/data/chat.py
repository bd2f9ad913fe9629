"""Choose the chat template of training records: the model's own, ChatML, or a file's."""

from datetime import datetime
from typing import Any

from rora_theory.chat_templates import ASSISTANT, CHATML, TEMPLATE_ADVICE, ChatTemplate
from rora_theory.errors import InputError, shown
from rora_theory.lab.data.formats import Chat, Record
from rora_theory.runs import files


def read_template_source(name: str) -> str:
    """Return the source of a named template.

    Args:
      name: ``chatml``, or the path of a Jinja file.

    Raises:
      InputError: The file does not exist or is not Jinja.
    """
    if name == "chatml":
        return CHATML
    source = files.read_text(name, accepted="a file of Jinja source, or chatml")
    ChatTemplate(source, where=name)
    return source


def load_chat_template(tokenizer: Any, name: str | None = None, now: datetime | None = None) -> ChatTemplate:
    """Load a chat template with the tokenizer's special tokens.

    Args:
      tokenizer: A `rora_theory.lab.llama.tokenizer.Tokenizer`.
      name: Name of the template, see `read_template_source`; None selects the tokenizer's.
      now: Time that the template sees; None is the present.

    Raises:
      InputError: The tokenizer has no template, or the template is not Jinja.
    """
    where = tokenizer.source if name is None else name
    source = tokenizer.chat_template if name is None else read_template_source(name)
    if source is None:
        raise InputError(f"{where}: the model has no chat template. {TEMPLATE_ADVICE}")
    tokens = {key: token for key, token in tokenizer.backend.special_tokens_map.items() if isinstance(token, str)}
    return ChatTemplate(source, tokens=tokens, where=where, now=now)


def chat_from_record(record: Record) -> Chat:
    """Return a question and its answer as a chat of two turns, the input below the instruction and an empty line."""
    question = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    turns = {"role": "user", "content": question}, {"role": ASSISTANT, "content": record.output}
    return Chat(turns, where=f"the record {shown(record.instruction)}")
