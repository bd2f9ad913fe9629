"""Render chats with a model's own chat template, and locate the assistant's turns in the text.

A template is Jinja source that comes with a checkpoint, so it runs in Jinja's sandbox. For training data it also runs
in a child process with limits, see `texts.render_records`. It sees the names that transformers gives to templates:
``messages``, ``tools``, ``documents``, ``add_generation_prompt``, the special tokens, the functions ``raise_exception``
and ``strftime_now``, the filter ``tojson``, and the block ``{% generation %}`` around the assistant's output. If a
template has no such block, a turn is located by rendering the chat up to that turn.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import Any, NamedTuple, NoReturn

from rora_theory import extras
from rora_theory.errors import InputError, first_line, shown
from rora_theory.lab.data.formats import ASSISTANT, Chat, Record
from rora_theory.runs import digests, files

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
"""OpenAI's ChatML, for models without a template. Most tokenizers have no tokens for its markers."""

TEMPLATE_ADVICE = (
    "Pass --chat-template FILE (a Jinja file) or --chat-template chatml, or, for one question and its answer, "
    "--template clean or plain."
)
"""Advice in the errors about a missing or invalid template."""

MAX_SOURCE_LENGTH = 1 << 20
"""Maximum length of a template's source. The longest of released models have some 20,000 characters."""

PLACEHOLDER = "another9"
"""Content that replaces a turn's own content to find where the template puts it."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets keep an assistant's reasoning. Templates read the first two."""


class RenderedText(NamedTuple):
    """Rendered text and its parts that are in the loss.

    Attributes:
      text: Rendered text.
      spans: Begin and end of each part in the loss, as indices into the text, ascending.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


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


def template_digest(source: str) -> str:
    """Return the SHA-256 of a template's source."""
    return digests.of_json([source])


def load_chat_template(tokenizer: Any, name: str | None = None, now: datetime | None = None) -> "ChatTemplate":
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
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    tokens = {
        f"{key}_token": tokenizer.backend.id_to_token(token_id) for key, token_id in ids.items() if token_id is not None
    }
    return ChatTemplate(source, tokens=tokens, where=where, now=now)


class ChatTemplate:
    r"""Compiled chat template.

    Args:
      source: Jinja source.
      tokens: Special tokens by their names in templates, such as ``bos_token``.
      where: Origin of the source, for the errors.
      now: Time that ``strftime_now`` formats; None is the present.

    Attributes:
      has_generation_blocks: Whether the template marks the assistant's output with ``{% generation %}``.
      uses_date: Whether the template asks for the time.

    Raises:
      InputError: The source is not Jinja.

    Examples:
      >>> template = ChatTemplate(CHATML)
      >>> chat = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
      >>> text, spans = template.render_with_spans(chat)
      >>> [text[begin:end] for begin, end in spans]
      ['Ho<|im_end|>\n']
    """

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
        now: datetime | None = None,
    ) -> None:
        """Parse the source."""
        self.source, self.where, self._tokens, self._now = source, where, dict(tokens or {}), now
        if len(source) > MAX_SOURCE_LENGTH:
            raise InputError(
                f"{where}: the chat template must have at most {MAX_SOURCE_LENGTH:,} characters, got {len(source):,}"
            )
        self._environment = _sandbox(lambda form: (self._now or datetime.now()).strftime(form))
        try:
            # Parse only: compiling evaluates the template's constant expressions, which may take any amount of time.
            tree = self._environment.parse(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise self._syntax_error(error) from None
        self.uses_date = "strftime_now" in source
        self.has_generation_blocks = any(tree.find_all(nodes.ExtensionAttribute))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the template as its arguments, because a compiled one holds functions."""
        return partial(ChatTemplate, tokens=self._tokens, where=self.where, now=self._now), (self.source,)

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return self._environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise self._syntax_error(error) from None

    def _syntax_error(self, error: Exception) -> InputError:
        return InputError(f"{self.where}: the chat template is not Jinja ({first_line(error)}). {TEMPLATE_ADVICE}")

    def identity(self) -> dict[str, str]:
        """Return what prompts depend on: the digest of the source, and the date if the template uses it."""
        settings = {"chat_template_sha256": template_digest(self.source)}
        if self.uses_date:
            settings["chat_date"] = f"{self._now or datetime.now():%Y-%m-%d}"
        return settings

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """Render a chat like transformers' ``apply_chat_template(..., tokenize=False)``.

        Args:
          messages: Turns with ``role``, ``content`` and whatever else the template reads.
          tools: Descriptions of tools.
          add_generation_prompt: Whether to append the beginning of an assistant turn.

        Raises:
          InputError: The template rejects the chat or fails on it.
        """
        return "".join(self._render_blocks(messages, tools, add_generation_prompt, []))

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        *,
        context: int = 0,
        answer_only: bool = True,
        max_characters: int | None = None,
    ) -> RenderedText:
        """Render a chat and locate the parts of its text that are in the loss.

        If the template marks the assistant's turns, the marks decide. Otherwise a turn begins where the generation
        prompt ends, because a model is given that prompt and never has to produce it, and ends with the turn's end
        token and whatever the template writes after it. A template may write a turn differently once others follow (it
        leaves out an earlier thought); such a turn is located by its content and by the parts of the text around it.

        Args:
          messages: Turns with ``role``, ``content`` and whatever else the template reads. An assistant turn with a
            ``weight`` of 0 is not in the loss.
          tools: Descriptions of tools.
          context: Number of leading messages whose turns are not learned (with ``answer_only``).
          answer_only: Whether only the assistant's turns are in the loss, instead of the whole text.
          max_characters: Number of characters of the text for which the parts have to be right; None is all. Turns that
            begin beyond them are not located unless the template marks them, as each takes several renderings of the
            chat.

        Returns:
          The whole text and its parts in the loss.

        Raises:
          InputError: The template rejects the chat, a turn cannot be located, or a turn of another role has weight 0
            although the whole text is in the loss.
        """
        turns = [index for index, message in enumerate(messages) if message.get("role") == ASSISTANT]
        ignored = {index for index, message in enumerate(messages) if message.get("weight") == 0}
        # Loss on the answers: locate the assistant's turns that are learned.
        if answer_only:
            learned = [index for index in turns if index >= context and index not in ignored]
            return self._locate_turns(messages, tools, turns, learned, max_characters)
        # Loss on the whole text: only the assistant's turns can be located, and so left out.
        if other_roles := ignored.difference(turns):
            index = min(other_roles)
            raise InputError(
                f"messages {index}: weight must not be 0 in a turn of {messages[index].get('role')}, as the loss is on "
                f"all turns. Set it to 0 only in turns of {ASSISTANT}, or pass --loss-on answer."
            )
        text, spans = self._locate_turns(messages, tools, turns, sorted(ignored), max_characters)
        # The complement: the parts between the turns that are left out.
        begins, ends = [0, *(end for _, end in spans)], [*(begin for begin, _ in spans), len(text)]
        return RenderedText(text, tuple((begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end))

    def _locate_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        turns: Sequence[int],
        selected: Sequence[int],
        max_characters: int | None,
    ) -> RenderedText:
        """Render a chat and locate some of the assistant's turns.

        Args:
          messages: Turns of the chat.
          tools: Descriptions of tools.
          turns: Indices of all assistant messages.
          selected: Indices of those to locate.
          max_characters: Number of characters after which no turn is located, see `render_with_spans`.
        """
        if not self.has_generation_blocks:
            # Locate the turns in order, each after the end of the one before.
            text = self.render(messages, tools)
            spans: list[tuple[int, int]] = []
            for index in selected:
                if max_characters is not None and spans and spans[-1][1] >= max_characters:
                    break
                spans.append(self._locate_turn(text, messages, tools, index, spans[-1][1] if spans else 0))
            return RenderedText(text, tuple(spans))
        # The template marks the turns while it renders them.
        marked: list[tuple[int, int]] = []
        text = "".join(self._render_blocks(messages, tools, False, marked))
        # With all turns or none, the marks need not correspond to the turns.
        if len(selected) in (0, len(turns)):
            return RenderedText(text, tuple(marked) if selected else ())
        # To select some of the turns, marks and turns must correspond.
        if len(marked) != len(turns):
            raise InputError(
                f"{self.where}: the template must mark each of the {len(turns)} assistant turns once to leave some of "
                f"them out of the loss, got {len(marked)} marks"
            )
        return RenderedText(text, tuple(span for index, span in zip(turns, marked, strict=True) if index in selected))

    def _locate_turn(
        self, text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], index: int, min_begin: int
    ) -> tuple[int, int]:
        """Locate one turn in a chat's text.

        Args:
          text: Rendered chat.
          messages: Turns of the chat.
          tools: Descriptions of tools.
          index: Index of the turn's message.
          min_begin: Index into the text before which the turn cannot begin.
        """
        # Text before the turn, with the generation prompt, and text up to the end of the turn.
        prompt_text = self.render(messages[:index], tools, add_generation_prompt=True) if index else ""
        text_with_turn = text if index + 1 == len(messages) else self.render(messages[: index + 1], tools)
        is_prefix = text.startswith(prompt_text) and len(prompt_text) >= min_begin
        # The usual case: both are rendered alike whether or not other turns follow.
        if index and is_prefix and text.startswith(text_with_turn) and len(text_with_turn) > len(prompt_text):
            return len(prompt_text), len(text_with_turn)
        # Otherwise, put a placeholder in the turn's place and find the text on both sides of it.
        min_begin = len(prompt_text) if is_prefix else min_begin
        for placeholder in _placeholder_turns(messages[index], text):
            sides = self._split_at_content([*messages[:index], placeholder, *messages[index + 1 :]], tools, placeholder)
            # In a chat that ends with the turn, the text after its content is the rest of the turn.
            last_sides = self._split_at_content([*messages[:index], placeholder], tools, placeholder)
            if sides is None or last_sides is None:
                continue
            (before, after), (last_before, turn_end) = sides, last_sides
            begin, end = len(before), len(text) - len(after)
            # Both sides must be those of the actual text, and the turn must end as it does when it is the last.
            matches_text = text.startswith(before) and text.endswith(after) and after.startswith(turn_end)
            if not matches_text or not min_begin <= begin <= end:
                continue
            if is_prefix and index:
                begin = min_begin
            elif prompt := self._generation_prompt(prompt_text, messages[:index], tools):
                # Reasoning stands between the generation prompt, which ends `prompt_text`, and the content.
                reasoning = last_before[len(prompt_text) :]
                begin -= len(reasoning) if before.endswith(prompt + reasoning) else 0
            return begin, end + len(turn_end)
        raise InputError(
            f"messages {index}: the chat template writes this turn differently when other turns follow, so its tokens "
            "cannot be located. Pass a template with {% generation %} blocks (--chat-template), or --loss-on all."
        )

    def _split_at_content(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], turn: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        """Return the text of a chat before and after one turn's content, which occurs nowhere else.

        Returns None if the template rejects the chat, or does not write the content exactly once.
        """
        try:
            before, *after = self.render(messages, tools).split(turn["content"])
        except InputError:
            return None
        return (before, after[0]) if len(after) == 1 else None

    def _generation_prompt(self, prompt_text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
        """Return the generation prompt that ends ``prompt_text``.

        Args:
          prompt_text: Text of the messages, rendered with the generation prompt.
          messages: Turns before the one that the model is prompted for.
          tools: Descriptions of tools.

        Raises:
          InputError: The template does not append the generation prompt to the text of the messages.
        """
        if not messages:
            return ""
        chat_text = self.render(messages, tools)
        # Otherwise the difference between both texts is not a prompt, and the turn would begin at a wrong place.
        if not prompt_text.startswith(chat_text):
            raise InputError(
                f"messages {len(messages)}: the chat template changes the earlier turns if add_generation_prompt is "
                "true, so this turn's tokens cannot be located. Pass a template that appends the generation prompt or "
                "has {% generation %} blocks (--chat-template), or --loss-on all."
            )
        return prompt_text.removeprefix(chat_text)

    def _render_blocks(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        add_generation_prompt: bool,
        spans: list[tuple[int, int]],
    ) -> list[str]:
        """Render a chat in the pieces that Jinja yields, and append the parts that the template marks to ``spans``."""
        blocks: list[str] = []
        # The extension of {% generation %} reads both: the position of a mark is the length of the blocks so far.
        self._environment.marking = blocks, spans
        context = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            for block in self._template.generate(context | self._tokens):
                blocks.append(block)  # noqa: PERF402 (one at a time, because a mark asks for the length so far)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # a template's own code may raise anything
            raise InputError(f"{self.where}: the chat template rejects the chat ({first_line(error)})") from None
        return blocks


def chat_from_record(record: Record) -> Chat:
    """Return a question and its answer as a chat of two turns, the input below the instruction and an empty line."""
    question = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    turns = {"role": "user", "content": question}, {"role": ASSISTANT, "content": record.output}
    return Chat(turns, where=f"the record {shown(record.instruction)}")


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under both keys that templates read, and without null values."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    present = {key: value for key, value in message.items() if value is not None}
    return present if reasoning is None else {"thinking": reasoning} | present | {"reasoning_content": reasoning}


def _placeholder_turns(message: Mapping[str, Any], text: str) -> Iterator[dict[str, Any]]:
    """Yield turns to render in a turn's place: one with other content, and one without its tool calls too.

    Some templates write a line break between content and tool calls only if there is content.
    """
    placeholder = PLACEHOLDER
    while placeholder in text:
        placeholder += PLACEHOLDER
    yield {**message, "content": placeholder}
    if message.get("tool_calls"):
        yield {key: value for key, value in message.items() if key != "tool_calls"} | {"content": placeholder}


class _GenerationBlock(ext.Extension):
    """Jinja block ``{% generation %}``, which records the position of its text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, source: parser.Parser) -> nodes.Node:
        """Parse the block up to ``{% endgeneration %}``."""
        line = next(source.stream).lineno
        body = source.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record_span"), [], [], body).set_lineno(line)

    def _record_span(self, caller: Callable[[], str]) -> str:
        text = caller()
        blocks, spans = self.environment.marking  # type: ignore[attr-defined]
        begin = sum(map(len, blocks))
        spans.append((begin, begin + len(text)))
        return text


class _SafeNamespace(Namespace):
    """Jinja namespace without names that start with an underscore, which could give access to Python."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *positional = args
        values = dict(*positional, **named)
        for name in values:
            _refuse_private_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private_name(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")


def _sandbox(strftime_now: Callable[[str], str]) -> Any:
    """Return a sandboxed Jinja environment with the settings and functions of transformers."""
    environment: Any = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols]
    )
    environment.marking = [], []
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": strftime_now,
        "namespace": _SafeNamespace,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON. Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
