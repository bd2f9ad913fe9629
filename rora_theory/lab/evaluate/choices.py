"""Contexts and continuations of the two log-likelihood protocols, as text and as tokens.

``harness`` follows lm-evaluation-harness 0.4 task by task, on the text of this data set. BoolQ lacks its passage here,
so the template has an empty one, and the accuracy is not comparable with the harness's. HellaSwag's contexts are single
strings: `hellaswag_parts` finds the fragment that the harness capitalises. ``label`` is specific to this package: it
scores the label strings after the published prompt and ``the correct answer is``, which does not depend on the format
of a free answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rora_theory.errors import InputError
from rora_theory.lab.data.prompts import ANSWER_PREFIX, prompt
from rora_theory.lab.data.tasks import TaskRecord
from rora_theory.lab.llama.tokenizer import Tokenizer

TEXTS = "2"
"""Version of the protocols' texts, part of every run's identity and increased with every change. Version 2 capitalises
HellaSwag's last fragment and keeps BoolQ's empty passage."""


@dataclass(frozen=True)
class Choice:
    """Text of one choice of an item.

    Attributes:
      label: Label of the choice in the data, such as ``answer1``.
      context: Text that the model is conditioned on.
      continuation: Text that is scored.
      length: Divisor of ``acc_norm``: number of characters of the choice, without the space before it.
    """

    label: str
    context: str
    continuation: str
    length: int


@dataclass(frozen=True)
class EncodedChoice:
    """Tokens of one choice of an item.

    Attributes:
      tokens: Tokens of the context and the continuation.
      count: Number of scored tokens at the end.
    """

    tokens: tuple[int, ...]
    count: int


def harness_choices(record: TaskRecord) -> tuple[Choice, ...]:
    """Return the choices of an item with the texts and the order of lm-evaluation-harness."""
    question, texts = record.question, record.choices
    if record.task == "boolq":
        # The template has a passage, empty here, and a question mark of its own.
        context = f"\nQuestion: {question.removesuffix('?')}?\nAnswer:"
        return tuple(
            Choice(label, context, f" {word}", len(word)) for word, label in (("no", "false"), ("yes", "true"))
        )
    if record.task == "winogrande":
        # Partial scoring: the choice fills the gap in the context, and the text after the gap is scored.
        before, _, after = question.partition("_")
        contexts = [before + text for text in texts]
        pairs = zip(record.labels, contexts, strict=True)
        return tuple(Choice(label, context, " " + after.strip(), len(context)) for label, context in pairs)
    # The context of HellaSwag names the activity, and both texts contain WikiHow's markers.
    if record.task == "hellaswag":
        activity, sentences, fragment = hellaswag_parts(question)
        question = _clean(f"{activity}: {sentences} {fragment.capitalize()}")
        texts = tuple(_clean(text) for text in texts)
    context = {
        "piqa": f"Question: {question}\nAnswer:",
        "social_i_qa": f"Q: {question}\nA:",
        "hellaswag": question,
        "ARC-Easy": f"Question: {question}\nAnswer:",
        "ARC-Challenge": f"Question: {question}\nAnswer:",
        "openbookqa": question,
    }[record.task]
    # The length divides the log-likelihood. The space before the text does not count.
    return tuple(
        Choice(label, context, f" {text}", len(text)) for label, text in zip(record.labels, texts, strict=True)
    )


def label_choices(record: TaskRecord, template: str) -> tuple[Choice, ...]:
    """Return the label strings of an item as continuations of the prompt and ``the correct answer is``.

    Args:
      template: Name of the prompt template, see `prompt`.
    """
    context = prompt(record.instruction, template) + ANSWER_PREFIX
    return tuple(Choice(label, context, label, len(label)) for label in record.labels)


def hellaswag_parts(context: str) -> tuple[str, str, str]:
    """Split a context ``ACTIVITY: TEXT`` into the data set's ``activity_label``, ``ctx_a`` and ``ctx_b``.

    ``ctx_b`` is the sentence fragment at the end of ActivityNet's contexts (``he``), and ``ctx_a`` the complete
    sentences before it. WikiHow's contexts end with a complete sentence and have an empty fragment.

    Examples:
      >>> hellaswag_parts("Baking: A man bakes bread. he")
      ('Baking', 'A man bakes bread.', 'he')
    """
    activity, _, text = context.partition(": ")
    *_, end = (0, *(match.end() for match in re.finditer(r"[.!?][\"')]*(?:\s+|$)", text)))
    return activity, text[:end].rstrip(), text[end:]


def _clean(text: str) -> str:
    """Remove WikiHow's bracketed markers, as the harness does for HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_choices(
    tokenizer: Tokenizer, items: Sequence[Sequence[Choice]], *, max_length: int
) -> list[list[EncodedChoice]]:
    """Tokenize every choice of every item as lm-evaluation-harness does.

    Spaces at the end of the context move to the continuation. The context and the entire text are encoded separately,
    and the continuation has the tokens of the text beyond the context's length. A token across the border thus belongs
    to one of them, never to both. An empty context becomes one BOS token, or EOS if there is no BOS. A text that
    already begins with this token gets no second one. Sequences are truncated on the left to ``max_length + 1`` tokens,
    because the last token is scored and not read.

    Raises:
      InputError: If a continuation has no token, or more than ``max_length``.
    """
    start_id = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    start_text = tokenizer.decode([start_id], skip_special=False) if start_id is not None else ""
    # Encode all contexts and all texts in two batches.
    pairs = [_move_spaces(choice.context, choice.continuation) for item in items for choice in item]
    contexts = _encode(tokenizer, [context for context, _ in pairs], start_text)
    texts = _encode(tokenizer, [context + continuation for context, continuation in pairs], start_text)
    encoded = zip(pairs, contexts, texts, strict=True)
    tokens_by_item = []
    for number, item in enumerate(items):
        choices = []
        for choice in item:
            (context, continuation), context_ids, text_ids = next(encoded)
            # The tokens beyond the context's are scored. Without a context, the start token stands in for it.
            if context:
                scored = text_ids[len(context_ids) :]
            elif start_id is None:
                raise InputError(f"item {number} has an empty context, but the tokenizer has neither BOS nor EOS")
            else:
                scored = tokenizer.encode(continuation, add_bos=False)
                context_ids = [start_id]
                if scored[:1] == [start_id]:
                    scored = scored[1:]
            if not 0 < len(scored) <= max_length:
                raise InputError(
                    f"item {number}: choice {choice.label} must have 1 to {max_length} tokens after its context, "
                    f"got {len(scored)}"
                )
            # Truncation on the left removes context only: the scored tokens are the last ones.
            choices.append(EncodedChoice(tuple((context_ids + scored)[-(max_length + 1) :]), len(scored)))
        tokens_by_item.append(choices)
    return tokens_by_item


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _encode(tokenizer: Tokenizer, texts: Sequence[str], start_text: str) -> list[list[int]]:
    """Encode texts, equal ones only once, and without a second BOS token if a text begins with ``start_text``."""
    distinct = list(dict.fromkeys(texts))

    def has_start(text: str) -> bool:
        return bool(start_text) and text.startswith(start_text)

    # Encode both kinds in one batch each, then restore the order of the texts.
    with_bos = tokenizer.encode_batch([text for text in distinct if not has_start(text)], add_end=False)
    without_bos = tokenizer.encode_batch([text for text in distinct if has_start(text)], False)
    encoded = {False: iter(with_bos), True: iter(without_bos)}
    ids = {text: next(encoded[has_start(text)]) for text in distinct}
    return [ids[text] for text in texts]
