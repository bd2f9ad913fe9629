"""Training records, and the formats in which files write them.

A training record is a prompt and the response to learn, a chat, or plain text. A format is a name and the keys that an
object must have. If no format is named, the keys of a source's first object select it. Every object that does not
follow its format is refused, and the error names its place and key.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from rora_theory.chat_templates import ASSISTANT
from rora_theory.errors import InputError, shown
from rora_theory.runs import digests, files

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
TrainTemplate = Literal["train", "clean", "chat", "plain"]
TRAIN_TEMPLATES: tuple[str, ...] = get_args(TrainTemplate)

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles of chat templates by ShareGPT's names of the speakers."""

TEXT_PART_TYPES = ("text", "input_text", "output_text")
"""Types of the parts of a message that are text, in OpenAI's two interfaces."""

MAX_LISTED_ERRORS = 10
"""Maximum number of bad records that an error lists."""


class Record(NamedTuple):
    """Instruction and the response to learn.

    Attributes:
      instruction: Instruction or question.
      output: Response to learn.
      input: Further input of the instruction, if any.
    """

    instruction: str
    output: str
    input: str = ""


class Completion(Record):
    """Record of the format prompt-completion, which defaults to plain text."""

    __slots__ = ()


class Text(NamedTuple):
    """Plain text to learn.

    Attributes:
      text: Text to learn.
    """

    text: str


@dataclass(frozen=True)
class Chat:
    """Conversation.

    Attributes:
      messages: Objects with ``role``, ``content`` and whatever else a chat template may read. A turn with a ``weight``
        of 0 is not learned.
      tools: Descriptions of tools that a chat template may list.
      where: File and place of the chat, for the errors. Not part of the chat's value.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    where: str = field(default="a chat", compare=False)

    def as_record(self) -> Record:
        """Return a chat of one question and its answer as a record.

        Raises:
          InputError: The turns are not one of a user and one of the assistant.
        """
        roles = [message["role"] for message in self.messages]
        if roles != ["user", ASSISTANT]:
            raise InputError(
                f"{self.where}: turns must be user, {ASSISTANT} in every template but chat, got {', '.join(roles)}"
            )
        question, answer = self.messages
        return Record(question["content"], answer["content"])


AnyRecord = Record | Text | Chat

DEFAULT_TEMPLATES: dict[type[AnyRecord], TrainTemplate] = {
    Record: "train",
    Completion: "plain",
    Text: "plain",
    Chat: "chat",
}
"""Template that renders each kind of record if none is named."""


def records_digest(records: Sequence[AnyRecord]) -> str:
    """Return the SHA-256 of the records' content, which does not depend on where they were read from."""
    return digests.of_json([_chat_content(record) if isinstance(record, Chat) else record for record in records])


def _chat_content(chat: Chat) -> dict[str, Any]:
    return {"messages": chat.messages, "tools": chat.tools}


@dataclass
class RecordErrors:
    """Errors of several records, collected while they are read or rendered.

    Attributes:
      messages: Messages of the first `MAX_LISTED_ERRORS` errors.
      count: Number of all errors.
    """

    messages: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, message: str) -> None:
        """Count an error, and keep its message if it is one of the first."""
        self.count += 1
        if self.count <= MAX_LISTED_ERRORS:
            self.messages.append(message)

    def raise_if_any(self, total: int) -> None:
        """Raise `InputError` if there are any errors.

        Equal messages concern something that all records share, such as the template, so the error has only one.
        """
        if len(set(self.messages)) == 1:
            raise InputError(self.messages[0])
        if self.messages:
            numbered = " ".join(f"({number}) {message}" for number, message in enumerate(self.messages, start=1))
            shown_count = f"; the first {MAX_LISTED_ERRORS}" if self.count > MAX_LISTED_ERRORS else ""
            raise InputError(f"{self.count:,} of {total:,} records cannot be used{shown_count}: {numbered}")


def question_key(record: AnyRecord) -> str:
    """Return a key that is equal for records with the same question.

    The question is the instruction with its input, the turns before the assistant's last turn, or the text.
    """
    if isinstance(record, Record):
        return digests.of_json([record.instruction, record.input]) if record.input else record.instruction
    if isinstance(record, Text):
        return record.text
    last = max(index for index, message in enumerate(record.messages) if message["role"] == ASSISTANT)
    return digests.of_json(record.messages[:last])


@dataclass(frozen=True)
class RawRecord:
    """Object of a source, before it is parsed. Its methods validate the fields that they return.

    Attributes:
      where: Source and place in it, for the errors.
      value: The object.
      field_names: The source's own names of fields, by the names used here.
    """

    where: str
    value: dict[str, Any]
    field_names: Mapping[str, str]

    def name(self, key: str) -> str:
        """Return the source's name of a field."""
        return self.field_names.get(key, key)

    def require(self, *keys: str) -> None:
        """Raise `InputError` unless all fields are present."""
        for key in keys:
            if self.name(key) not in self.value:
                present = ", ".join(map(repr, self.value)) or "none"
                raise InputError(f"{self.where} has no {self.name(key)!r}; its keys are {present}")

    def text(self, key: str, *, optional: bool = False) -> str:
        """Return the string of a field.

        Args:
          key: Name of the field.
          optional: Whether the field may be missing or empty.

        Raises:
          InputError: The value is not a string or is empty.
        """
        name = self.name(key)
        value = self.value.get(name, "") if optional else self.value[name]
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {name!r} must be a string, got {json_type(value)}")
        if not value and not optional:
            raise InputError(f"{self.where}: {name!r} must not be empty")
        return value

    def objects(self, key: str, *, optional: bool = False) -> list[dict[str, Any]]:
        """Return the list of objects of a field.

        Raises:
          InputError: The value is not a list of objects.
        """
        name = self.name(key)
        value = self.value.get(name, []) if optional else self.value[name]
        if not isinstance(value, list):
            raise InputError(f"{self.where}: {name!r} must be a list of objects, got {json_type(value)}")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise InputError(f"{self.where}: {name!r} must hold objects, got {json_type(item)} at {index}")
        return value

    def turns(self, key: str) -> list["RawRecord"]:
        """Return the turns of a conversation.

        Keys with null values are removed, because chat templates test whether a key is present.
        """
        return [
            RawRecord(
                f"{self.where}: {self.name(key)} {index}",
                {name: value for name, value in turn.items() if value is not None},
                self.field_names,
            )
            for index, turn in enumerate(self.objects(key))
        ]


def _pair_parser(
    prompt: str, response: str, optional_input: str | None = None, *, record_type: type[Record] = Record
) -> Callable[[RawRecord], Record]:
    """Return the parser of a format with a prompt and a response."""

    def parse(raw: RawRecord) -> Record:
        raw.require(prompt, response)
        extra_input = raw.text(optional_input, optional=True) if optional_input else ""
        return record_type(raw.text(prompt), raw.text(response), extra_input)

    return parse


def _parse_text(raw: RawRecord) -> Text:
    raw.require("text")
    return Text(raw.text("text"))


def _parse_messages(raw: RawRecord) -> Chat:
    raw.require("messages")
    return _make_chat(raw, "messages", [_parse_message(turn) for turn in raw.turns("messages")])


def _parse_message(turn: RawRecord) -> dict[str, Any]:
    """Parse a message in OpenAI's form."""
    turn.require("role")
    # A message with tool calls may lack content.
    if "tool_calls" not in turn.value:
        turn.require("content")
    # Other keys are kept as they are: chat templates may read them.
    parsed_keys = (turn.name("role"), turn.name("content"), turn.name("weight"))
    other_fields = {key: value for key, value in turn.value.items() if key not in parsed_keys}
    if isinstance(other_fields.get("tool_calls"), list):
        other_fields["tool_calls"] = [
            _parse_arguments(turn, index, call) for index, call in enumerate(other_fields["tool_calls"])
        ]
    return {"role": turn.text("role"), "content": _parse_content(turn)} | other_fields | _parse_weight(turn)


def _parse_arguments(turn: RawRecord, index: int, call: Any) -> Any:
    """Replace a tool call's arguments by the object that they encode.

    OpenAI's interface writes them as a JSON string. Chat templates expect an object, and those that apply ``tojson``
    would encode the string a second time.
    """
    if not isinstance(call, dict):
        return call
    # OpenAI's interface nests the name and the arguments in ``function``.
    if "function" in call:
        return call | {"function": _parse_arguments(turn, index, call["function"])}
    if not isinstance(text := call.get("arguments"), str):
        return call
    where = f"{turn.where}: arguments of tool_calls {index}"
    # A call without arguments may have an empty string.
    arguments = files.parse_json(text, where=where, accepted="a JSON object") if text.strip() else {}
    if not isinstance(arguments, dict):
        raise InputError(f"{where} must be a JSON object, got {json_type(arguments)}")
    return call | {"arguments": arguments}


def _parse_weight(turn: RawRecord) -> dict[str, int]:
    """Return the weight of a turn if it is 0 (OpenAI: not in the loss); 1 is the default and left out."""
    name = turn.name("weight")
    weight = turn.value.get(name, 1)
    if weight not in (0, 1):
        raise InputError(f"{turn.where}: {name!r} must be 0 (not in the loss) or 1, got {shown(weight)}")
    return {"weight": 0} if weight == 0 else {}


def _parse_content(turn: RawRecord) -> str:
    """Return the content of a message, which is a string or a list of text parts to concatenate."""
    name = turn.name("content")
    if not isinstance(turn.value.get(name), list):
        return turn.text("content", optional=True)
    texts = []
    # Parts of other types, such as images, cannot be trained on.
    for index, part in enumerate(turn.objects("content")):
        if part.get("type") not in TEXT_PART_TYPES or not isinstance(part.get("text"), str):
            part_type = shown(part.get("type"))
            raise InputError(f"{turn.where}: {name!r} must hold parts of text, got type {part_type} at {index}")
        texts.append(part["text"])
    return "".join(texts)


def _parse_sharegpt(raw: RawRecord) -> Chat:
    """Parse a conversation in ShareGPT's form, with an optional system prompt beside it."""
    raw.require("conversations")
    messages: list[dict[str, Any]] = []
    # A system prompt beside the conversation becomes its first message.
    if system := raw.text("system", optional=True):
        messages.append({"role": "system", "content": system})
    for turn in raw.turns("conversations"):
        turn.require("from", "value")
        speaker = turn.text("from")
        if speaker not in SHAREGPT_ROLES:
            raise InputError(
                f"{turn.where}: {turn.name('from')!r} must be one of {', '.join(SHAREGPT_ROLES)}, got {shown(speaker)}"
            )
        content = turn.text("value", optional=True)
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": content} | _parse_weight(turn))
    return _make_chat(raw, "conversations", messages)


def _make_chat(raw: RawRecord, key: str, messages: list[dict[str, Any]]) -> Chat:
    """Return a chat, and raise `InputError` if it has no assistant turn to learn."""
    # A turn without a weight is learned.
    weights = [message.get("weight") for message in messages if message["role"] == ASSISTANT]
    if not weights:
        raise InputError(f"{raw.where}: {raw.name(key)!r} must have an assistant turn to learn, got none")
    if all(weight == 0 for weight in weights):
        raise InputError(
            f"{raw.where}: {raw.name(key)!r} must have an assistant turn to learn, got weight 0 in all of them"
        )
    # ShareGPT's form has no field for tools; files that have one write it in several ways, so it is not read.
    tools = [] if key == "conversations" else raw.objects("tools", optional=True)
    # Parquet and the arguments of a tool call may hold values that a template cannot write, such as a date.
    try:
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{raw.where}: {raw.name(key)!r} and tools must hold JSON values in valid Unicode ({error})"
        ) from None
    return Chat(tuple(messages), tuple(tools), raw.where)


@dataclass(frozen=True)
class Format:
    """Format in which files write records.

    Attributes:
      required_keys: Keys that an object must have.
      parse: Function that makes a record of an object.
      optional_keys: Further keys that an object, or a turn in it, may have.
    """

    required_keys: tuple[str, ...]
    parse: Callable[[RawRecord], AnyRecord]
    optional_keys: tuple[str, ...] = ()


FORMATS: dict[FormatName, Format] = {
    "messages": Format(("messages",), _parse_messages, ("role", "content", "weight", "tools")),
    "sharegpt": Format(("conversations",), _parse_sharegpt, ("from", "value", "weight", "system")),
    "alpaca": Format(("instruction", "output"), _pair_parser("instruction", "output", "input"), ("input",)),
    "prompt-completion": Format(("prompt", "completion"), _pair_parser("prompt", "completion", record_type=Completion)),
    "text": Format(("text",), _parse_text),
}
"""All formats. If an object matches several, the first one is used."""

FIELD_NAMES = tuple(
    dict.fromkeys(key for form in FORMATS.values() for key in (*form.required_keys, *form.optional_keys))
)
"""Fields that a source may have other names for."""


def matching_format(value: dict[str, Any], field_names: Mapping[str, str]) -> FormatName | None:
    """Return the first format of `FORMATS` that an object matches; None if it matches none.

    A field that the source has another name for counts as present only under that name. A format that uses more of the
    renamed fields comes first.
    """

    def matches(form: Format) -> bool:
        return all(field_names.get(key, key) in value for key in form.required_keys)

    def renamed_count(name: FormatName) -> int:
        return len(set(field_names) & {*FORMATS[name].required_keys, *FORMATS[name].optional_keys})

    return max((name for name, form in FORMATS.items() if matches(form)), key=renamed_count, default=None)


def json_type(value: Any) -> str:
    """Return the type of a JSON value with its article, for the errors.

    Examples:
      >>> json_type({}), json_type(None), json_type(0.5)
      ('an object', 'null', 'a number')
    """
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
