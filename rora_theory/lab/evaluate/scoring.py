"""The three evaluation protocols, each an iterator of samples.

============ ================================================================= ==========================
protocol     an item is correct if                                             origin
============ ================================================================= ==========================
``generate`` the first label found in the text generated after the prompt      the papers' (LLM-Adapters,
             (4 beams, 32 new tokens) is the gold label                        DoRA, RoRA)
``label``    the gold label string is the likeliest after the prompt and       this package's
             ``the correct answer is``
``harness``  the gold choice's text is the likeliest after the question        lm-evaluation-harness 0.4
============ ================================================================= ==========================

Accuracies of different protocols are not comparable. Results of ``label`` and ``harness`` do not depend on the batch
size or on interruptions, bit for bit. ``generate`` computes the same beams for every batch size up to float rounding,
so only a near tie between two beams can turn out differently.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.prompts import TEMPLATES, prompt
from rora_theory.lab.data.tasks import TASKS, TaskRecord
from rora_theory.lab.evaluate.answers import parse_answer, response
from rora_theory.lab.evaluate.choices import TEXTS, Choice, encode_choices, harness_choices, label_choices
from rora_theory.lab.evaluate.likelihood import log_likelihoods
from rora_theory.lab.llama import shared_prompt
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.generate import beam_search
from rora_theory.lab.llama.loading import Model
from rora_theory.lab.llama.model import Adapter
from rora_theory.lab.llama.tokenizer import Tokenizer
from rora_theory.scaling import check_choice, check_integer
from rora_theory.validation.ranges import Count, check_ranges

Protocol = Literal["generate", "label", "harness"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Scoring:
    """A protocol and its settings. With the model, the data and the precision, they determine the results.

    Attributes:
      protocol: Name of the protocol, see the module's table.
      template: Name of the prompt template. The default is the published evaluation prompt for ``generate``, and the
        published training prompt for ``label``, so that the labels follow the same text as in fine-tuning. It must be
        None for ``harness``, which has texts of its own.
      num_beams: Number of beams of ``generate``.
      max_new_tokens: Maximum number of generated tokens of ``generate``.
      texts: Version of the protocols' texts, which cannot be set.

    Raises:
      InputError: If a value is out of range.
    """

    protocol: str
    template: str | None = None
    num_beams: Count = 4
    max_new_tokens: Count = 32
    texts: str = field(default=TEXTS, init=False)

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        if self.protocol == "harness":
            if self.template is not None:
                raise InputError(f"template must be none with protocol harness, got {self.template!r}")
        elif self.template is None:
            object.__setattr__(self, "template", {"generate": "eval", "label": "train"}[self.protocol])
        else:
            check_choice("template", self.template, TEMPLATES)
        check_ranges(self)


@dataclass(frozen=True)
class Sample:
    """A scored item.

    Attributes:
      task: Key of the record's task.
      index: Index of the record in its task.
      gold: Correct label.
      prediction: Predicted label; None if the generated text has no label.
      correct: Whether the prediction is correct.
      prediction_norm: Label predicted by log-likelihood per character, for ``harness`` and tasks where the harness
        reports ``acc_norm``; otherwise None.
      correct_norm: Whether ``prediction_norm`` is correct, or None.
      log_likelihoods: Labels with their log-likelihoods in the protocol's order; empty for ``generate``.
      text: Generated text that was parsed; None for the other protocols.
    """

    task: str
    index: int
    gold: str
    prediction: str | None
    correct: bool
    prediction_norm: str | None = None
    correct_norm: bool | None = None
    log_likelihoods: tuple[tuple[str, float], ...] = ()
    text: str | None = None


def score(
    params: dict[str, Any],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    records: Sequence[TaskRecord],
    scoring: Scoring,
    *,
    adapter: Adapter | None = None,
    batch_size: int = SCORE_BATCH_SIZE,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[Sample]:
    """Score records, yielding the samples of a batch at a time. Long records come first for ``generate``.

    Args:
      params: Weights of the model.
      config: Configuration of the model.
      tokenizer: Tokenizer of the model.
      records: Items of one or several tasks.
      scoring: Protocol and its settings.
      adapter: Adapter applied to the model, or None. Merged weights are faster, and equal up to rounding.
      batch_size: Number of items generated together (``generate``) or of device calls in flight (other protocols).
      done: Pairs ``(task, index)`` of records that need no result. To resume, pass the same ``records`` as before, so
        that the remaining ones are batched in the same way.

    Raises:
      InputError: If the batch size is below 1 or a prompt is too long, before work starts; or if a log-likelihood is
        not finite.
    """
    check_integer("batch_size", batch_size)
    known = set(done)
    skip = {number for number, record in enumerate(records) if (record.task, record.index) in known}
    if scoring.protocol == "generate":
        return _generated(params, config, tokenizer, records, scoring, adapter, batch_size, skip)
    # Both other protocols compare log-likelihoods of choices. They differ in the texts only.
    if scoring.protocol == "harness":
        choices = [harness_choices(record) for record in records]
    else:
        choices = [label_choices(record, str(scoring.template)) for record in records]
    # The harness truncates long texts on the left. A label is scored after its whole prompt only.
    max_length = config.max_position_embeddings
    items = encode_choices(tokenizer, choices, max_length=max_length if scoring.protocol == "harness" else sys.maxsize)
    for record, item in zip(records, items, strict=True):
        if (length := max(len(choice.tokens) for choice in item)) > max_length + 1:
            raise InputError(
                f"{record.task} record {record.index}: prompt and label must have at most {max_length + 1} tokens "
                f"(max_position_embeddings and the last one, which is not read), got {length}"
            )
    scores = log_likelihoods(params, config, items, adapter=adapter, batch_size=batch_size, done=skip)
    norm = scoring.protocol == "harness"
    return (_likeliest(records[number], choices[number], totals, norm=norm) for number, totals in scores)


def score_tasks(
    model: Model,
    tasks: Mapping[str, Sequence[TaskRecord]],
    scoring: Scoring,
    *,
    adapter: Adapter | None = None,
    batch_size: int = SCORE_BATCH_SIZE,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[Sample]:
    """Score one task after another with `score`.

    Only items of the same task share device calls, so the results of a task do not depend on other tasks. The records
    of all tasks are checked before the first one is scored.

    Args:
      model: Model to evaluate.
      tasks: Records by task.
      scoring: Protocol and its settings.
      adapter: Adapter applied to the model, or None.
      batch_size: See `score`.
      done: Pairs ``(task, index)`` of records that need no result.
    """
    samples = [
        score(
            model.params,
            model.config,
            model.tokenizer,
            records,
            scoring,
            adapter=adapter,
            batch_size=batch_size,
            done=done,
        )
        for records in tasks.values()
    ]
    for task_samples in samples:
        yield from task_samples


def in_order(samples: Iterable[Sample]) -> list[Sample]:
    """Return samples sorted by task, in the order of `TASKS`, and by index."""
    return sorted(samples, key=lambda sample: (list(TASKS).index(sample.task), sample.index))


def _likeliest(record: TaskRecord, choices: Sequence[Choice], totals: Sequence[float], *, norm: bool) -> Sample:
    """Return a sample that predicts the choice with the highest log-likelihood, the first one in a tie.

    With ``norm``, the sample also has the prediction per character if the harness reports it for the task.
    """
    if not np.isfinite(totals).all():
        raise InputError(
            f"{record.task} record {record.index}: log-likelihoods must be finite, got {list(totals)}. Check the "
            "weights, or use a dtype of larger range."
        )
    # argmax returns the first of equal values.
    labels = [choice.label for choice in choices]
    best = labels[int(np.argmax(totals))]
    best_norm = None
    # Log-likelihood per character, so that a long choice is not at a disadvantage.
    if norm and TASKS[record.task].harness_norm:
        lengths = np.array([float(choice.length) for choice in choices])
        best_norm = labels[int(np.argmax(np.array(totals) / lengths))]
    return Sample(
        record.task,
        record.index,
        record.answer,
        best,
        best == record.answer,
        best_norm,
        None if best_norm is None else best_norm == record.answer,
        tuple(zip(labels, totals, strict=True)),
    )


def _generated(
    params: dict[str, Any],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    records: Sequence[TaskRecord],
    scoring: Scoring,
    adapter: Adapter | None,
    batch_size: int,
    skip: Collection[int],
) -> Iterator[Sample]:
    """Generate an answer to every prompt with beam search, and parse it."""
    # The model continues the prompts, so they must not end with the checkpoint's end of a text.
    texts = [prompt(record.instruction, str(scoring.template)) for record in records]
    prompts = tokenizer.encode_batch(texts, add_end=False)
    max_length = config.max_position_embeddings - scoring.max_new_tokens
    for record, tokens in zip(records, prompts, strict=True):
        if len(tokens) > max_length:
            raise InputError(
                f"{record.task} record {record.index}: the prompt must have at most {max_length} tokens "
                f"(max_position_embeddings minus max_new_tokens), got {len(tokens)}"
            )
    # Each group processes the prefix that all prompts share once.
    shared = shared_prompt.shared_length(prompts, spare=1) if len(prompts) > 1 else 0
    # Groups of similar length, which do not depend on the skipped records.
    order = sorted(range(len(records)), key=lambda number: (-len(prompts[number]), number))
    groups = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    remaining = (group for group in groups if not set(group) <= set(skip))

    # A generator of its own, so that the checks above run before the first sample is requested.
    def generate_samples() -> Iterator[Sample]:
        for group in remaining:
            answers = beam_search(
                params,
                config,
                [prompts[number] for number in group],
                max_new_tokens=scoring.max_new_tokens,
                eos_ids=tokenizer.eos_ids,
                num_beams=scoring.num_beams,
                pad_id=tokenizer.pad_id,
                shared=shared,
                adapter=adapter,
            )
            for number, tokens in zip(group, answers, strict=True):
                if number not in skip:
                    yield _parsed(records[number], response(tokenizer.decode(tokens)))

    return generate_samples()


def _parsed(record: TaskRecord, text: str) -> Sample:
    """Return a sample that predicts the first label in the text."""
    label = parse_answer(TASKS[record.task], text)
    return Sample(record.task, record.index, record.answer, label, label == record.answer, text=text)
