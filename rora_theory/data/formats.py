"""Training records: a prompt and the response to learn, a chat, or plain text; and the ways in which files write them.

A way to write records, a format, is a name and the keys that an object must have. The first object of a source tells
the format where none is named; every object that is not as its format says is refused by its place and key.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from rora_theory.errors import InputError, shown
from rora_theory.io import digests, files

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-response", "prompt-completion", "conversational", "text"]
TrainTemplate = Literal["train", "clean", "chat", "plain"]
TRAIN_TEMPLATES: tuple[str, ...] = get_args(TrainTemplate)

ASSISTANT = "assistant"
"""The role whose turns are learned."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of who speaks, and the roles of chat templates."""

LONGEST_TEXT = 1 << 24
"""Maximum length of a string of a record: many times what any model reads."""

TEXTS = ("text", "input_text", "output_text")
"""Types of a part of a message that are text, in OpenAI's two interfaces."""

MAX_LISTED = 10
"""Maximum number of bad records that an error lists."""


class Record(NamedTuple):
    """One instruction and the response to learn."""

    instruction: str
    output: str
    input: str = ""


class Exchange(Record):
    """A record of the format prompt-response: a user's turn and the assistant's, where no template is named."""

    __slots__ = ()


class Completion(Record):
    """A record of the format prompt-completion: a text that goes on, where no template is named."""

    __slots__ = ()


class Text(NamedTuple):
    """A text to learn as it is."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
      messages: objects with ``role`` and ``content``, and what else a chat template may read of them; a turn with the
        ``weight`` 0 is not learned.
      tools: descriptions of tools that a chat template may list; none is the usual.
      context: how many of the messages are given: of these the assistant's turns are not learned either.
      where: the file and the place in it, for messages; no part of what the chat is.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    context: int = 0
    where: str = field(default="a chat", compare=False)

    def as_record(self) -> Record:
        """The one question and its answer.

        Raises:
          InputError: other turns than one of a user and one of the assistant.
        """
        if [one["role"] for one in self.messages] != ["user", ASSISTANT]:
            roles = ", ".join(one["role"] for one in self.messages)
            raise InputError(
                f"{self.where} has the turns {roles}; accepted for a template that is not chat are user, {ASSISTANT}"
            )
        return Record(*(one["content"] for one in self.messages))


AnyRecord = Record | Text | Chat

OWN_TEMPLATES: dict[type[AnyRecord], TrainTemplate] = {
    Record: "train",
    Exchange: "chat",
    Completion: "plain",
    Text: "plain",
    Chat: "chat",
}
"""What makes a text of a record where no template is named."""


def records_digest(records: Sequence[AnyRecord]) -> str:
    """SHA-256 of what records hold, wherever they were read from."""
    return digests.of_json([_held(one) if isinstance(one, Chat) else one for one in records])


def _held(chat: Chat) -> dict[str, Any]:
    given = {"context": chat.context} if chat.context else {}
    return {"messages": chat.messages, "tools": chat.tools} | given


@dataclass
class BadRecords:
    """Bad records of several that are read or rendered.

    Attributes:
      messages: What is wrong with each of the first `MAX_LISTED`.
      count: Number of all.
    """

    messages: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, message: str) -> None:
        """Count a bad record, and keep the message if it is one of the first."""
        self.count += 1
        if self.count <= MAX_LISTED:
            self.messages.append(message)

    def check(self, total: int) -> None:
        """Raise `InputError` if there are any of ``total`` records, good and bad.

        Equal messages are about what all records share, such as the template: one stands for all.
        """
        if len(set(self.messages)) == 1:
            raise InputError(self.messages[0])
        if self.messages:
            listed = " ".join(f"({number}) {message}" for number, message in enumerate(self.messages, start=1))
            more = f"; the first {MAX_LISTED}" if self.count > MAX_LISTED else ""
            raise InputError(f"{self.count:,} of {total:,} records can't be used{more}: {listed}")


def question(record: AnyRecord) -> str:
    """What two records have in common that ask the same: the instruction and its input, the turns before the last of
    the assistant's, or the text."""
    if isinstance(record, Record):
        return digests.of_json([record.instruction, record.input]) if record.input else record.instruction
    if isinstance(record, Text):
        return record.text
    last = max(i for i, one in enumerate(record.messages) if one["role"] == ASSISTANT)
    return digests.of_json(record.messages[:last])


@dataclass(frozen=True)
class Item:
    """An object of a source, and where it stands.

    Attributes:
      where: source and place, for messages.
      value: the object.
      names: what the source calls the fields that it has other names for.
      counts: Number of conversions of each kind that reading made, counted over all items of a source.
    """

    where: str
    value: dict[str, Any]
    names: Mapping[str, str]
    counts: Counter[str] = field(default_factory=Counter)

    def name(self, key: str) -> str:
        """The source's name of a field."""
        return self.names.get(key, key)

    def need(self, *keys: str) -> None:
        """Raise `InputError` unless all fields are there."""
        for key in keys:
            if self.name(key) not in self.value:
                listed = ", ".join(map(repr, self.value)) or "none"
                raise InputError(f"{self.where} has no {self.name(key)!r}; its keys are {listed}")

    def text(self, key: str, *, empty: bool = False) -> str:
        """The string of a field; ``empty`` if it may be empty, and then if it may be missing."""
        name = self.name(key)
        value = self.value.get(name, "") if empty else self.value[name]
        if not isinstance(value, str):
            raise InputError(f"{self.where} has {kind_of(value)} as {name!r}; accepted is a string")
        if not value and not empty:
            raise InputError(f"{self.where} has an empty {name!r}; accepted is a string that is not empty")
        self.check_text(name, value)
        return value

    def check_text(self, name: str, value: Any) -> None:
        """Raise `InputError` where a value is none of JSON, or a string in it none that can be written."""
        if isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise InputError(
                    f"{self.where} has {len(value):,} characters in {name!r}; accepted are at most {LONGEST_TEXT:,}"
                )
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{self.where} has half a surrogate pair in {name!r}; accepted is Unicode text"
                ) from None
        elif isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                self.check_text(name, one)
        elif not isinstance(value, int | float | None):
            raise InputError(f"{self.where} has {kind_of(value)} in {name!r}; accepted are values that JSON has")

    def objects(self, key: str, *, optional: bool = False) -> list[dict[str, Any]]:
        """The list of objects of a field; one that is ``optional`` may be missing."""
        name = self.name(key)
        value = self.value.get(name, []) if optional else self.value[name]
        if not isinstance(value, list):
            raise InputError(f"{self.where} has {kind_of(value)} as {name!r}; accepted is a list of objects")
        for index, one in enumerate(value):
            if not isinstance(one, dict):
                raise InputError(f"{self.where} has {kind_of(one)} in {name!r} at {index}; accepted is an object")
        return value

    def turns(self, key: str) -> list["Item"]:
        """The turns of a conversation.

        Keys that are null are left out: chat templates ask whether a key is there.
        """
        return [
            Item(
                f"{self.where}: {self.name(key)} {index}",
                {name: value for name, value in one.items() if value is not None},
                self.names,
                self.counts,
            )
            for index, one in enumerate(self.objects(key))
        ]


def _pair(
    prompt: str, response: str, more: str | None = None, *, kind: type[Record] = Record
) -> Callable[[Item], Record]:
    def make(item: Item) -> Record:
        item.need(prompt, response)
        return kind(item.text(prompt), item.text(response), item.text(more, empty=True) if more else "")

    return make


def _text(item: Item) -> Text:
    item.need("text")
    return Text(item.text("text"))


def _messages(item: Item) -> Chat:
    item.need("messages")
    return _chat(item, "messages", [_message(turn) for turn in item.turns("messages")])


def _conversational(item: Item) -> Chat:
    """TRL's prompt and completion, each a list of messages: of the completion alone the turns are learned."""
    item.need("prompt", "completion")
    given, learned = ([_message(turn) for turn in item.turns(key)] for key in ("prompt", "completion"))
    return _chat(item, "completion", learned, given)


def _message(turn: Item) -> dict[str, Any]:
    turn.need("role")
    if "tool_calls" not in turn.value:
        turn.need("content")
    handled = (turn.name("role"), turn.name("content"), turn.name("weight"))
    rest = {key: value for key, value in turn.value.items() if key not in handled}
    if isinstance(rest.get("tool_calls"), list):
        rest["tool_calls"] = [_parse_arguments(turn, index, call) for index, call in enumerate(rest["tool_calls"])]
    for name, value in rest.items():
        turn.check_text(name, value)
    return {"role": turn.text("role"), "content": _content(turn)} | rest | _weight(turn)


def _parse_arguments(turn: Item, index: int, call: Any) -> Any:
    """Replace a tool call's arguments by the object that they encode.

    OpenAI's interface writes them as a JSON string. Chat templates expect an object, and those that apply ``tojson``
    would encode the string a second time.
    """
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return call | {"function": _parse_arguments(turn, index, call["function"])}
    if not isinstance(text := call.get("arguments"), str):
        return call
    where = f"{turn.where}: arguments of tool_calls {index}"
    arguments = files.parse_json(text, where=where, accepted="a JSON object") if text.strip() else {}
    if not isinstance(arguments, dict):
        raise InputError(f"{where}: holds {kind_of(arguments)}; accepted is a JSON object")
    turn.counts["arguments"] += 1
    return call | {"arguments": arguments}


def _weight(turn: Item) -> dict[str, int]:
    """Return the weight of a turn if it is 0 (OpenAI: not in the loss); 1 is the default and left out."""
    name = turn.name("weight")
    weight = turn.value.get(name, 1)
    if weight not in (0, 1):
        raise InputError(f"{turn.where} has {shown(weight)} as {name!r}; accepted are 0 (not in the loss) and 1")
    if weight == 1:
        return {}
    turn.counts["weight"] += 1
    return {"weight": 0}


def _content(turn: Item) -> str:
    """What a message says: a string, or parts, the texts of which follow one another."""
    name = turn.name("content")
    if not isinstance(turn.value.get(name), list):
        return turn.text("content", empty=True)
    texts = []
    for index, part in enumerate(turn.objects("content")):
        if part.get("type") not in TEXTS or not isinstance(part.get("text"), str):
            kind = shown(part.get("type"))
            raise InputError(
                f"{turn.where} has a part of type {kind} in {name!r} at {index}; accepted are parts of text"
            )
        texts.append(part["text"])
    turn.check_text(name, texts)
    return "".join(texts)


def _sharegpt(item: Item) -> Chat:
    item.need("conversations")
    found: list[dict[str, Any]] = []
    if system := item.text("system", empty=True):
        found.append({"role": "system", "content": system})
    for turn in item.turns("conversations"):
        turn.need("from", "value")
        speaker = turn.text("from")
        if speaker not in ROLES:
            raise InputError(
                f"{turn.where} has {shown(speaker)} as {turn.name('from')!r}; accepted are {', '.join(ROLES)}"
            )
        found.append({"role": ROLES[speaker], "content": turn.text("value", empty=True)} | _weight(turn))
    return _chat(item, "conversations", found)


def _chat(item: Item, key: str, messages: list[dict[str, Any]], given: Sequence[dict[str, Any]] = ()) -> Chat:
    if not any(one["role"] == ASSISTANT for one in messages):
        raise InputError(
            f"{item.where} has no turn of the assistant in {item.name(key)!r}; accepted is one or more to learn"
        )
    if not any(one["role"] == ASSISTANT and one.get("weight") != 0 for one in messages):
        raise InputError(
            f"{item.where} has weight 0 in all turns of the assistant in {item.name(key)!r}; accepted is one or more "
            "to learn"
        )
    tools = [] if key == "conversations" else item.objects("tools", optional=True)
    for tool in tools:
        item.check_text(item.name("tools"), tool)
    return Chat((*given, *messages), tuple(tools), len(given), item.where)


@dataclass(frozen=True)
class Format:
    """A way to write records.

    Attributes:
      keys: what an object must have.
      kind: of its records.
      make: the record of an object.
      more: what an object may have besides.
      listed: whether the first of the keys has a list; None is any value.
    """

    keys: tuple[str, ...]
    kind: type[AnyRecord]
    make: Callable[[Item], AnyRecord]
    more: tuple[str, ...] = ()
    listed: bool | None = None

    @property
    def template(self) -> TrainTemplate:
        """What makes a text of its records where no template is named."""
        return OWN_TEMPLATES[self.kind]


FORMATS: dict[FormatName, Format] = {
    "messages": Format(("messages",), Chat, _messages, ("role", "content", "weight", "tools")),
    "sharegpt": Format(("conversations",), Chat, _sharegpt, ("from", "value", "weight", "system")),
    "alpaca": Format(("instruction", "output"), Record, _pair("instruction", "output", "input"), ("input",)),
    "prompt-response": Format(("prompt", "response"), Exchange, _pair("prompt", "response", kind=Exchange)),
    "prompt-completion": Format(
        ("prompt", "completion"), Completion, _pair("prompt", "completion", kind=Completion), listed=False
    ),
    "conversational": Format(
        ("prompt", "completion"), Chat, _conversational, ("role", "content", "weight", "tools"), listed=True
    ),
    "text": Format(("text",), Text, _text),
}
"""All formats; of several that an object fits, the first is taken."""

FIELDS = tuple(dict.fromkeys(key for one in FORMATS.values() for key in (*one.keys, *one.more)))
"""Fields that a source may have other names for."""


def fitting(value: dict[str, Any], names: Mapping[str, str]) -> list[FormatName]:
    """The formats whose keys an object has, the first to be taken first.

    A field that the source has another name for is there under that name alone; formats of all named fields go first.
    """

    def fits(one: Format) -> bool:
        first = value.get(names.get(one.keys[0], one.keys[0]))
        return all(names.get(key, key) in value for key in one.keys) and one.listed in (None, isinstance(first, list))

    found = [name for name, one in FORMATS.items() if fits(one)]
    return sorted(found, key=lambda name: -len(set(names) & {*FORMATS[name].keys, *FORMATS[name].more}))


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
