"""Render chats with a model's own chat template, and locate the assistant's turns in the text.

A template is Jinja source that comes with a checkpoint. It runs in transformers' sandbox and sees what transformers
gives to templates. If the template marks the assistant's output by blocks ``{% generation %}``, these locate the turns.
Otherwise a turn is located by rendering the chat up to that turn.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rora_theory import extras
from rora_theory.errors import InputError, first_line

ASSISTANT = "assistant"
"""Role whose turns are learned."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""OpenAI's ChatML, for models without a template. Most tokenizers have no tokens for its markers."""

TEMPLATE_ADVICE = (
    "Pass chat_template FILE (a Jinja file) or chat_template chatml, or, for one question and its answer, "
    "template clean or plain."
)
"""Advice in the errors about a missing or invalid template."""

PLACEHOLDER = "another9"
"""Content that replaces a turn's own content to find where the template puts it."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class RenderedText(NamedTuple):
    """Rendered text and its parts that are in the loss.

    Attributes:
      text: Rendered text.
      spans: Begin and end of each part in the loss, as indices into the text, ascending.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def template_digest(source: str) -> str:
    """Return the SHA-256 of a template's source."""
    return hashlib.sha256(json.dumps([source]).encode()).hexdigest()


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
        self.source, self.where, self._tokens, self._now = source, where, dict(tokens or {}), now
        self.uses_date = "strftime_now" in source
        self.has_generation_blocks = _GENERATION_BLOCK.search(source) is not None
        # transformers' own function returns today. Every released template calls it with a literal format.
        self._dated_source = source
        if now is not None:
            self._dated_source = _DATE_CALL.sub(lambda call: f"'{now.strftime(call[2])}'", source)
        try:
            _import_renderer()([], chat_template=self._dated_source)
        except InputError:
            raise
        except Exception as error:  # compiling evaluates the template's constant expressions, which may raise anything
            raise InputError(
                f"{where}: the chat template is not Jinja ({first_line(error)}). {TEMPLATE_ADVICE}"
            ) from None

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
          add_generation_prompt: Whether to append the beginning of an assistant turn.

        Raises:
          InputError: The template rejects the chat or fails on it.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt).text

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        *,
        answer_only: bool = True,
    ) -> RenderedText:
        """Render a chat and locate the parts of its text that are in the loss.

        If the template marks the assistant's turns, the marks decide. Otherwise a turn begins where the generation
        prompt ends, because a model is given that prompt and never has to produce it, and ends with the turn's end
        token and whatever the template writes after it. A template may write a turn differently once others follow (it
        leaves out an earlier thought); such a turn is located by its content and by the parts of the text around it.

        Args:
          messages: Turns with ``role``, ``content`` and whatever else the template reads. An assistant turn with a
            ``weight`` of 0 is not in the loss.
          answer_only: Whether only the assistant's turns are in the loss, instead of the whole text.

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
            learned = [index for index in turns if index not in ignored]
            return self._locate_turns(messages, tools, turns, learned)
        # Loss on the whole text: only the assistant's turns can be located, and so left out.
        if other_roles := ignored.difference(turns):
            index = min(other_roles)
            raise InputError(
                f"messages {index}: weight must not be 0 in a turn of {messages[index].get('role')}, as the loss is on "
                f"all turns. Set it to 0 only in turns of {ASSISTANT}, or set loss_on to answer."
            )
        text, spans = self._locate_turns(messages, tools, turns, sorted(ignored))
        # The complement: the parts between the turns that are left out.
        begins, ends = [0, *(end for _, end in spans)], [*(begin for begin, _ in spans), len(text)]
        return RenderedText(text, tuple((begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end))

    def _locate_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        turns: Sequence[int],
        selected: Sequence[int],
    ) -> RenderedText:
        """Render a chat and locate some of the assistant's turns."""
        if not self.has_generation_blocks:
            # Locate the turns in order, each after the end of the one before.
            text = self.render(messages, tools)
            spans: list[tuple[int, int]] = []
            for index in selected:
                spans.append(self._locate_turn(text, messages, tools, index, spans[-1][1] if spans else 0))
            return RenderedText(text, tuple(spans))
        # The template marks the turns while it renders them.
        text, marked = self._render(messages, tools, with_marks=True)
        # With all turns or none, the marks need not correspond to the turns.
        if len(selected) in (0, len(turns)):
            return RenderedText(text, marked if selected else ())
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
            "cannot be located. Pass a template with {% generation %} blocks (chat_template), or set loss_on to all."
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
                "has {% generation %} blocks (chat_template), or set loss_on to all."
            )
        return prompt_text.removeprefix(chat_text)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        with_marks: bool = False,
    ) -> RenderedText:
        """Render a chat, with the parts that the template marks."""
        try:
            texts, marks = _import_renderer()(
                [list(messages)],
                list(tools) or None,
                chat_template=self._dated_source,
                return_assistant_tokens_mask=with_marks,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template's own code may raise anything
            raise InputError(f"{self.where}: the chat template rejects the chat ({first_line(error)})") from None
        return RenderedText(texts[0], tuple(marks[0]) if with_marks else ())


def mark_tokens(offsets: Int[np.ndarray, "n 2"], spans: Sequence[tuple[int, int]]) -> Bool[np.ndarray, " n"]:
    """Mark the tokens that overlap a part of a text."""
    token_begins, token_ends = offsets.T
    is_marked = np.zeros(len(offsets), bool)
    for begin, end in spans:
        is_marked |= (token_begins < end) & (token_ends > begin)
    return is_marked


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


def _import_renderer() -> Any:
    return extras.import_extra("transformers.utils.chat_template_utils").render_jinja_template
