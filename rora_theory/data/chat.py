"""Chats as a model's own template writes them, and which letters of the text are the assistant's.

The template is Jinja source that came with a checkpoint, so it runs in Jinja's sandbox (and, for training data, in a
child process with limits, see `texts.write_all`), with the names that
transformers gives templates: ``messages``, ``tools``, ``documents``, ``add_generation_prompt``, the special tokens, the
functions ``raise_exception`` and ``strftime_now``, the filter ``tojson``, and the block ``{% generation %}`` around
what the assistant says. Where a template has no such block, what it writes for a turn is found by writing the chat up
to it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import Any, NamedTuple, NoReturn

from rora_theory import extras
from rora_theory.data.formats import ASSISTANT, Chat, Record
from rora_theory.errors import InputError, first_line, shown
from rora_theory.io import digests, files

try:
    import jinja2
    from jinja2 import ext, nodes, parser, sandbox
    from jinja2.utils import Namespace
except ImportError as error:
    jinja2 = ext = nodes = parser = sandbox = Namespace = extras.missing(error)  # type: ignore[misc]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The turns of OpenAI's ChatML, for a model that brings no template; most tokenizers have no tokens for its marks."""

CHOICES = (
    "accepted are --chat-template FILE (a Jinja file), --chat-template chatml, or, for one question and its answer, "
    "--template clean or plain"
)
"""What to do where a model has no template."""

LONGEST_SOURCE = 1 << 20
"""Maximum length of a template's source; the longest of released models have some 20,000 characters."""

OTHER = "another9"
"""Stands in a turn's place where its own content is sought."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which data keep what an assistant thought; templates read the first two."""


class Written(NamedTuple):
    """A rendered text and its parts that are in the loss.

    Attributes:
      text: Rendered text.
      spans: Begin and end of each part in the loss, as indices into the text, ascending.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def source_of(name: str) -> str:
    """The source of a template that is named: ``chatml``, or a file of Jinja source.

    Raises:
      InputError: no such file, or no Jinja in it.
    """
    if name == "chatml":
        return CHATML
    source = files.read_text(name, accepted="a file of Jinja source, or chatml")
    ChatTemplate(source, where=name)
    return source


def digest_of(source: str) -> str:
    """SHA-256 of a template's source."""
    return digests.of_json([source])


def chat_template_of(tokenizer: Any, name: str | None = None, now: datetime | None = None) -> "ChatTemplate":
    """The chat template that is named, or the tokenizer's own, with the tokenizer's special tokens.

    Args:
      tokenizer: a `rora_theory.llama.tokenizer.Tokenizer`.
      name: as of `source_of`; None is the tokenizer's own.
      now: the time that a template is told; None is the present.

    Raises:
      InputError: the tokenizer has none, or it is no Jinja.
    """
    where = tokenizer.where if name is None else name
    source = tokenizer.chat_template if name is None else source_of(name)
    if source is None:
        raise InputError(f"{where}: the model has no chat template; {CHOICES}")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    tokens = {f"{key}_token": tokenizer.backend.id_to_token(one) for key, one in ids.items() if one is not None}
    return ChatTemplate(source, tokens=tokens, where=where, now=now)


class ChatTemplate:
    """A chat template, compiled.

    Args:
      source: Jinja source.
      tokens: special tokens by the names that templates know them by, ``bos_token`` and the like.
      where: where the source is from, for messages.
      now: the time that ``strftime_now`` tells; None is the present.

    Attributes:
      marks: whether the template marks what the assistant says.
      dated: whether it asks for the time.

    Raises:
      InputError: the source is no Jinja.

    Examples:
      >>> template = ChatTemplate(CHATML)
      >>> chat = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
      >>> text, spans = template.write(chat)
      >>> [text[begin:end] for begin, end in spans]
      ['Ho<|im_end|>\\n']
    """

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
        now: datetime | None = None,
    ) -> None:
        self.source, self.where, self._tokens, self._now = source, where, dict(tokens or {}), now
        if len(source) > LONGEST_SOURCE:
            raise InputError(
                f"{where}: the chat template has {len(source):,} characters; at most {LONGEST_SOURCE:,} are accepted"
            )
        self._environment = _environment(lambda form: (self._now or datetime.now()).strftime(form))
        try:
            # Parsed alone: to compile a template evaluates its constant expressions, which may take any time.
            tree = self._environment.parse(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise InputError(f"{where}: the chat template is no Jinja ({first_line(error)}); {CHOICES}") from None
        self.dated = "strftime_now" in source
        self.marks = any(tree.find_all(nodes.ExtensionAttribute))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a template as its arguments: compiled it has functions."""
        return partial(ChatTemplate, tokens=self._tokens, where=self.where, now=self._now), (self.source,)

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return self._environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"{self.where}: the chat template is no Jinja ({first_line(error)}); {CHOICES}") from None

    def identity(self) -> dict[str, str]:
        """What prompts depend on: the source's digest, and the day where the template asks for it."""
        found = {"chat_template_sha256": digest_of(self.source)}
        if self.dated:
            found["chat_date"] = f"{self._now or datetime.now():%Y-%m-%d}"
        return found

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a chat, as transformers' ``apply_chat_template(..., tokenize=False)`` makes it.

        Args:
          messages: with ``role``, ``content`` and what else the template reads.
          tools: descriptions of tools.
          add_generation_prompt: end with what begins a turn of the assistant's.

        Raises:
          InputError: the template refuses the chat or fails on it.
        """
        return "".join(self._blocks(messages, tools, add_generation_prompt, []))

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        *,
        context: int = 0,
        answer_only: bool = True,
        letters: int | None = None,
    ) -> Written:
        """Render a chat and locate the parts of its text that are in the loss.

        If the template marks the assistant's turns, the marks decide. Otherwise a turn begins where the generation
        prompt ends, because a model is given that prompt and never has to produce it, and ends with the turn's end
        token and whatever the template writes after it. A template may write a turn differently once others follow (it
        leaves out an earlier thought); such a turn is located by its content and by the parts of the text around it.

        Args:
          messages: Turns with ``role``, ``content`` and whatever else the template reads. A turn of the assistant with
            a ``weight`` of 0 is not in the loss.
          tools: Descriptions of tools.
          context: Number of leading messages whose turns are not learned (with ``answer_only``).
          answer_only: Whether only the assistant's turns are in the loss, instead of the whole text.
          letters: Number of letters of the text for which the parts have to be right; None is all. Turns that begin
            beyond them are not located unless the template marks them, as each takes several renderings of the chat.

        Returns:
          The whole text and its parts in the loss.

        Raises:
          InputError: The template refuses the chat, a turn can't be located, or a turn of another role has weight 0
            although the whole text is in the loss.
        """
        turns = [index for index, message in enumerate(messages) if message.get("role") == ASSISTANT]
        ignored = {index for index, message in enumerate(messages) if message.get("weight") == 0}
        if answer_only:
            wanted = [index for index in turns if index >= context and index not in ignored]
            return self._locate(messages, tools, turns, wanted, letters)
        if others := ignored.difference(turns):
            index = min(others)
            raise InputError(
                f"messages {index}: weight is 0 in a turn of {messages[index].get('role')}, and the loss is on all "
                f"turns; accepted is weight 0 in turns of {ASSISTANT}, or --loss-on answer"
            )
        text, spans = self._locate(messages, tools, turns, sorted(ignored), letters)
        # The complement: what lies between the turns that are left out.
        begins, ends = [0, *(end for _, end in spans)], [*(begin for begin, _ in spans), len(text)]
        return Written(text, tuple((begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end))

    def _locate(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        turns: Sequence[int],
        wanted: Sequence[int],
        letters: int | None,
    ) -> Written:
        """Render a chat and locate the turns ``wanted`` among the assistant's ``turns``, both indices of messages.

        Turns that begin after ``letters`` are not located, see `write`.
        """
        if not self.marks:
            text = self.render(messages, tools)
            found: list[tuple[int, int]] = []
            for index in wanted:
                if letters is not None and found and found[-1][1] >= letters:
                    break
                found.append(self._span(text, messages, tools, index, found[-1][1] if found else 0))
            return Written(text, tuple(found))
        marked: list[tuple[int, int]] = []
        text = "".join(self._blocks(messages, tools, False, marked))
        if len(wanted) in (0, len(turns)):
            return Written(text, tuple(marked) if wanted else ())
        if len(marked) != len(turns):
            raise InputError(
                f"{self.where}: the template marks {len(marked)} parts of a chat with {len(turns)} turns of the "
                "assistant, so the turns that are not in the loss can't be told apart; accepted is one mark a turn"
            )
        return Written(text, tuple(span for index, span in zip(turns, marked, strict=True) if index in wanted))

    def _span(
        self, text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], index: int, after: int
    ) -> tuple[int, int]:
        """Locate one turn in a chat's text, not before the index ``after``."""
        head = self.render(messages[:index], tools, add_generation_prompt=True) if index else ""
        whole = text if index + 1 == len(messages) else self.render(messages[: index + 1], tools)
        leads = text.startswith(head) and len(head) >= after
        # The usual case: the text up to the turn, and with it, are rendered alike whether or not other turns follow.
        if index and leads and text.startswith(whole) and len(whole) > len(head):
            return len(head), len(whole)
        least = len(head) if leads else after
        for stand_in in _stand_ins(messages[index], text):
            around = self._around([*messages[:index], stand_in, *messages[index + 1 :]], tools, stand_in)
            # In a chat that ends with the turn, what follows its content is the rest of the turn.
            around_last = self._around([*messages[:index], stand_in], tools, stand_in)
            if around is None or around_last is None:
                continue
            (before, behind), (before_last, rest) = around, around_last
            begin, end = len(before), len(text) - len(behind)
            alike = text.startswith(before) and text.endswith(behind) and behind.startswith(rest)
            if not alike or not least <= begin <= end:
                continue
            if leads and index:
                begin = least
            elif prompt := self._generation_prompt(head, messages[:index], tools):
                # Thoughts stand between the generation prompt, which ``head`` ends in, and the content.
                thoughts = before_last[len(head) :]
                begin -= len(thoughts) if before.endswith(prompt + thoughts) else 0
            return begin, end + len(rest)
        raise InputError(
            f"messages {index}: the chat template writes this turn otherwise where others follow, so its tokens can't "
            "be located; accepted are a template with {% generation %} marks (--chat-template), or --loss-on all"
        )

    def _around(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], stand_in: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        """Return the text of a chat before and after the content of one of its turns; None if the content isn't there.

        The turn has a content that occurs nowhere else, unlike the one that it stands in for.
        """
        try:
            before, *behind = self.render(messages, tools).split(stand_in["content"])
        except InputError:
            return None
        return (before, behind[0]) if len(behind) == 1 else None

    def _generation_prompt(self, head: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
        """Return what the template adds to ``messages`` as generation prompt; ``head`` is the text that ends in it."""
        return head.removeprefix(self.render(messages, tools)) if messages else ""

    def _blocks(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        add_generation_prompt: bool,
        spans: list[tuple[int, int]],
    ) -> list[str]:
        """The text in the pieces that Jinja makes it in; what is marked is noted in ``spans`` meanwhile."""
        blocks: list[str] = []
        self._environment.marking = blocks, spans
        told: dict[str, Any] = {"messages": [_with_reasoning(one) for one in messages], "tools": list(tools) or None}
        told |= {"documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            for block in self._template.generate(told | self._tokens):
                blocks.append(block)  # noqa: PERF402 (one by one: a mark asks how much there is)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # whatever a template's own code may raise
            raise InputError(
                f"{self.where}: the chat template refuses it ({first_line(error)}); accepted is a chat that it takes"
            ) from None
        return blocks


def message_content(message: Mapping[str, Any]) -> Any:
    """What a message says."""
    return message.get("content") or ""


def of_record(record: Record) -> Chat:
    """A question and its answer as a chat of two turns; an input stands below the instruction, a line between."""
    asked = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    turns = {"role": "user", "content": asked}, {"role": ASSISTANT, "content": record.output}
    return Chat(turns, where=f"the record {shown(record.instruction)}")


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
    known = {key: value for key, value in message.items() if value is not None}
    return known if thought is None else {"thinking": thought} | known | {"reasoning_content": thought}


def _stand_ins(message: Mapping[str, Any], text: str) -> Iterator[dict[str, Any]]:
    """Yield turns to render in a turn's place: one with other content, and one without its tool calls too.

    Some templates write a line break between content and tool calls only if there is content.
    """
    other = OTHER
    while other in text:
        other += OTHER
    yield {**message, "content": other}
    if message.get("tool_calls"):
        yield {key: value for key, value in message.items() if key != "tool_calls"} | {"content": other}


class _Generation(ext.Extension):
    """The block ``{% generation %}``, which notes where its text stands."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, source: parser.Parser) -> nodes.Node:
        line = next(source.stream).lineno
        body = source.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        blocks, spans = self.environment.marking  # type: ignore[attr-defined]
        begin = sum(map(len, blocks))
        spans.append((begin, begin + len(text)))
        return text


class _Names(Namespace):
    """What a template keeps between turns; no names through which Python could be reached."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *given = args
        found = dict(*given, **named)
        for name in found:
            _check_name(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")


def _environment(strftime_now: Callable[[str], str]) -> Any:
    made: Any = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    made.marking = [], []
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "strftime_now": strftime_now, "namespace": _Names}
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML needs; a prompt is no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
