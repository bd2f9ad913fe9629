"""The three protocols: an iterator of scored items each, and what a protocol's name fixes.

============ ================================================================= ==========================
protocol     an item is right when                                             whose
============ ================================================================= ==========================
``generate`` the first label found in the text generated after the prompt      the papers' (LLM-Adapters,
             (4 beams, 32 new tokens) is the gold label                        DoRA, RoRA)
``label``    the gold label string is the likeliest after the prompt and       this package's
             ``the correct answer is``
``harness``  the gold choice's text is the likeliest after the question        lm-evaluation-harness 0.4
============ ================================================================= ==========================

Their numbers are not comparable with each other. Results of ``label`` and ``harness`` depend on the batch
size, and on a run's having been interrupted, in no bit. ``generate`` computes the same beams for every batch
size up to float rounding, so that only a near tie between two beams could turn out otherwise.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rora_theory.data.prompts import TEMPLATES, prompt
from rora_theory.data.tasks import TASKS, TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate.answers import parse_answer, response
from rora_theory.evaluate.choices import TEXTS, Choice, encode_choices, harness_choices, label_choices
from rora_theory.evaluate.likelihood import log_likelihoods
from rora_theory.llama import shared_prompt
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.generate import beam
from rora_theory.llama.loading import Model
from rora_theory.llama.model import Adapter
from rora_theory.llama.tokenizer import Tokenizer
from rora_theory.scaling import check_integer
from rora_theory.validation.ranges import Count, check_ranges

Protocol = Literal["generate", "label", "harness"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Scoring:
    """A protocol with its settings: all that, with model, data and precision, determines the results.

    Attributes:
      protocol: see the module's table.
      template: of the prompt, for ``generate`` (the published evaluation prompt unless said otherwise) and
        ``label`` (the published training prompt unless said otherwise, so that the label strings stand where
        fine-tuning put them); None under ``harness``, which has its own text.
      num_beams, max_new_tokens: of ``generate``.
      texts: version of what the protocols ask; not chosen, but part of what determines the results.
    """

    protocol: str
    template: str | None = None
    num_beams: Count = 4
    max_new_tokens: Count = 32
    texts: str = field(default=TEXTS, init=False)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol is {self.protocol!r}; accepted are {', '.join(PROTOCOLS)}")
        if self.protocol == "harness":
            if self.template is not None:
                raise InputError(f"template is {self.template!r}; accepted is none under protocol harness")
        elif self.template is None:
            object.__setattr__(self, "template", {"generate": "eval", "label": "train"}[self.protocol])
        elif self.template not in TEMPLATES:
            raise InputError(f"template is {self.template!r}; accepted are {', '.join(TEMPLATES)}")
        check_ranges(self, str)


@dataclass(frozen=True)
class Sample:
    """One scored item.

    Attributes:
      task, index: which record.
      gold: the right label.
      prediction: the label given; None where the text held none (``generate``).
      correct: whether they agree.
      prediction_norm, correct_norm: likewise by log-likelihood per character (``harness``, tasks where that
        harness reports ``acc_norm``); None elsewhere.
      log_likelihoods: of each label in the protocol's order; empty under ``generate``.
      text: the generated text that was parsed; None under the other two.
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
    batch_size: int = 8,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[Sample]:
    """Scores records, long ones first, a batch of samples at a time.

    Args:
      params, config, tokenizer: the model.
      records: items, of one task or several.
      scoring: the protocol.
      adapter: run beside the weights; None is the model alone. Merged weights score the same up to rounding, faster.
      batch_size: items generated together (``generate``), or device calls in flight (the other two), >= 1.
      done: ``(task, index)`` of the records that need no result. Give the same ``records`` as before, so that
        what is left is computed in the same company.

    Raises:
      InputError: before work starts: a batch size below 1, or a prompt longer than the model reads. Later: a
        log-likelihood that is not finite.
    """
    check_integer("batch_size", batch_size)
    known = set(done)
    skip = {number for number, record in enumerate(records) if (record.task, record.index) in known}
    if scoring.protocol == "generate":
        return _generated(params, config, tokenizer, records, scoring, adapter, batch_size, skip)
    if scoring.protocol == "harness":
        asked = [harness_choices(record) for record in records]
    else:
        asked = [label_choices(record, str(scoring.template)) for record in records]
    items = encode_choices(tokenizer, asked, max_length=config.max_position_embeddings)
    found = log_likelihoods(params, config, items, adapter=adapter, batch_size=batch_size, done=skip)
    norm = scoring.protocol == "harness"
    return (_chosen(records[number], asked[number], totals, norm=norm) for number, totals in found)


def score_tasks(
    model: Model,
    tasks: Mapping[str, Sequence[TaskRecord]],
    scoring: Scoring,
    *,
    adapter: Adapter | None = None,
    batch_size: int = 8,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[Sample]:
    """`score` of one task after another: its own items share calls, so that no other task changes a bit of them."""
    for records in tasks.values():
        yield from score(
            model.params,
            model.config,
            model.tokenizer,
            records,
            scoring,
            adapter=adapter,
            batch_size=batch_size,
            done=done,
        )


def in_order(samples: Iterable[Sample]) -> list[Sample]:
    """Samples by task, in the order of `TASKS`, and index."""
    return sorted(samples, key=lambda sample: (list(TASKS).index(sample.task), sample.index))


def _chosen(record: TaskRecord, choices: Sequence[Choice], totals: Sequence[float], *, norm: bool) -> Sample:
    """The likeliest choice, the first of equals; per character of the choice too where the harness reports it."""
    if not np.isfinite(totals).all():
        raise InputError(
            f"{record.task} record {record.index}: log-likelihoods are {list(totals)}; accepted are finite ones, as of "
            "sound weights in a precision that holds them"
        )
    labels = [choice.label for choice in choices]
    best = labels[int(np.argmax(totals))]
    best_norm = None
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
    """Beam search after every prompt, in groups of like length that do not depend on ``skip``; what all prompts begin
    with is read once a group."""
    prompts = tokenizer.encode_batch([prompt(record.instruction, str(scoring.template)) for record in records])
    room = config.max_position_embeddings - scoring.max_new_tokens
    for record, tokens in zip(records, prompts, strict=True):
        if len(tokens) > room:
            raise InputError(
                f"{record.task} record {record.index} has {len(tokens)} tokens of prompt; accepted are at "
                f"most {room}, max_position_embeddings less max_new_tokens"
            )
    shared = shared_prompt.shared_length(prompts, spare=1) if len(prompts) > 1 else 0
    order = sorted(range(len(records)), key=lambda number: (-len(prompts[number]), number))
    groups = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    waiting = (group for group in groups if not set(group) <= set(skip))

    def run() -> Iterator[Sample]:
        for group in waiting:
            answers = beam(
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

    return run()


def _parsed(record: TaskRecord, text: str) -> Sample:
    """The first label in the text."""
    label = parse_answer(TASKS[record.task], text)
    return Sample(record.task, record.index, record.answer, label, label == record.answer, text=text)
