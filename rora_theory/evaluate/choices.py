"""What the two log-likelihood protocols ask: a context and a continuation for each choice, as text and as tokens.

``harness`` follows lm-evaluation-harness 0.4 task by task, on the text these data have. BoolQ comes without its
passage: the template is filled with an empty one, so that its accuracy is not the one that harness publishes.
HellaSwag's contexts come in one piece: `hellaswag_parts` finds the fragment that the harness capitalises.
``label`` is this package's own: the label strings after the published prompt and ``the correct answer is``,
which asks for the knowledge whatever the format of a free answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rora_theory.data.prompts import ANSWER_PREFIX, prompt
from rora_theory.data.tasks import TaskRecord
from rora_theory.errors import InputError
from rora_theory.llama.tokenizer import Tokenizer

TEXTS = "2"
"""Version of the texts that the protocols ask, in every run's identity: raised whenever one of them changes.
2 capitalises HellaSwag's last fragment and keeps BoolQ's empty passage."""


@dataclass(frozen=True)
class Choice:
    """One choice of an item.

    Attributes:
      label: its label in the data (``answer1``).
      context, continuation: the text given and the text scored.
      length: what ``acc_norm`` divides by: characters of the choice without the space before it.
    """

    label: str
    context: str
    continuation: str
    length: int


@dataclass(frozen=True)
class Scored:
    """Tokens of a context and a continuation; the last ``count`` of them are scored."""

    tokens: tuple[int, ...]
    count: int


def harness_choices(record: TaskRecord) -> tuple[Choice, ...]:
    """The choices of an item as lm-evaluation-harness asks about them, in its order."""
    question, texts = record.question, record.choices
    if record.task == "boolq":
        # The template's passage, empty here, and its own question mark.
        context = f"\nQuestion: {question.removesuffix('?')}?\nAnswer:"
        return tuple(
            Choice(label, context, f" {word}", len(word)) for word, label in (("no", "false"), ("yes", "true"))
        )
    if record.task == "winogrande":
        before, _, after = question.partition("_")
        contexts = [before + text for text in texts]
        pairs = zip(record.labels, contexts, strict=True)
        return tuple(Choice(label, context, " " + after.strip(), len(context)) for label, context in pairs)
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
    return tuple(
        Choice(label, context, f" {text}", len(text)) for label, text in zip(record.labels, texts, strict=True)
    )


def label_choices(record: TaskRecord, template: str) -> tuple[Choice, ...]:
    """The label strings of an item after the prompt and ``the correct answer is``; ``template`` as in
    `prompt`."""
    context = prompt(record.instruction, template) + ANSWER_PREFIX
    return tuple(Choice(label, context, label, len(label)) for label in record.labels)


def hellaswag_parts(context: str) -> tuple[str, str, str]:
    """The dataset's ``activity_label``, ``ctx_a`` and ``ctx_b`` of a context in one piece, ``ACTIVITY: TEXT``.

    ``ctx_b`` is the fragment of a sentence on which ActivityNet's contexts end (``he``), ``ctx_a`` the whole sentences
    before it. WikiHow's contexts end with a sentence and have no fragment.

    Examples:
      >>> hellaswag_parts("Baking: A man bakes bread. he")
      ('Baking', 'A man bakes bread.', 'he')
    """
    activity, _, text = context.partition(": ")
    *_, end = (0, *(found.end() for found in re.finditer(r"[.!?][\"')]*(?:\s+|$)", text)))
    return activity, text[:end].rstrip(), text[end:]


def _clean(text: str) -> str:
    """WikiHow's bracketed marks removed, as the harness does before HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_choices(tokenizer: Tokenizer, items: Sequence[Sequence[Choice]], *, max_length: int) -> list[list[Scored]]:
    """Tokens of every choice of every item, cut as lm-evaluation-harness cuts them.

    Spaces at the end of the context move to the continuation; context and whole text are encoded separately,
    and the continuation is what the whole has beyond the context's length, so a token that straddles the
    border belongs to the continuation or is lost with it, never to both. An empty context is one BOS token
    (EOS where there is none). A text that already begins with that token gets no second one. Sequences are
    cut on the left to ``max_length + 1`` tokens, the last of which is only scored.

    Raises:
      InputError: a continuation without a token, or of more than ``max_length``.
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    marker = tokenizer.decode([first], skip_special=False) if first is not None else ""
    moved = [[_move_spaces(choice.context, choice.continuation) for choice in item] for item in items]
    flat = [pair for item in moved for pair in item]
    contexts = _encode(tokenizer, [context for context, _ in flat], marker)
    wholes = _encode(tokenizer, [context + continuation for context, continuation in flat], marker)
    rest = zip(flat, contexts, wholes, strict=True)
    found = []
    for number, item in enumerate(items):
        rows = []
        for choice in item:
            (context, continuation), context_ids, whole = next(rest)
            if context:
                scored = whole[len(context_ids) :]
            elif first is None:
                raise InputError("an item has an empty context and the tokenizer neither BOS nor EOS to put there")
            else:
                scored = tokenizer.encode(continuation, add_bos=False)
                context_ids = [first]
                if scored[:1] == [first]:
                    scored = scored[1:]
            if not 0 < len(scored) <= max_length:
                raise InputError(
                    f"item {number}: choice {choice.label} has {len(scored)} tokens beyond its context; "
                    f"accepted are 1 to {max_length}"
                )
            rows.append(Scored(tuple((context_ids + scored)[-(max_length + 1) :]), len(scored)))
        found.append(rows)
    return found


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _encode(tokenizer: Tokenizer, texts: Sequence[str], marker: str) -> list[list[int]]:
    """Each text's tokens, equal texts encoded once; no further BOS where the text begins with ``marker``."""
    distinct = list(dict.fromkeys(texts))
    marked = [bool(marker) and text.startswith(marker) for text in distinct]
    plain = tokenizer.encode_batch([text for text, has in zip(distinct, marked, strict=True) if not has])
    bare = tokenizer.encode_batch([text for text, has in zip(distinct, marked, strict=True) if has], False)
    rows = {False: iter(plain), True: iter(bare)}
    ids = {text: next(rows[has]) for text, has in zip(distinct, marked, strict=True)}
    return [ids[text] for text in texts]
