"""Tokenize records, split them, and batch them in a reproducible order.

Every batch holds records of similar length, padded to one of a few widths. A width is a shape, and a shape is compiled
once. The order of the batches depends only on the seed and the epoch, so the step is the position in the data: a run
that resumes at step k requests batch k, and no record is repeated or left out.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int

from rora_theory.chat_templates import ChatTemplate, RenderedText, mark_tokens
from rora_theory.errors import InputError
from rora_theory.lab.data import texts
from rora_theory.lab.data.chat import load_chat_template
from rora_theory.lab.data.formats import AnyRecord, Text
from rora_theory.lab.llama.shared_prompt import common_length

WIDTH_MULTIPLE = 8
"""Every width is a multiple of this number, as in the published code."""

T = TypeVar("T")


@runtime_checkable
class TextEncoder(Protocol):
    """Interface of a tokenizer.

    `rora_theory.lab.llama.tokenizer.Tokenizer` implements it. Chats need that class itself.
    """

    @property
    def eos_id(self) -> int | None:
        """Return the end-of-sequence token, if the tokenizer has one."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""


class Batch(NamedTuple):
    """One step's records, padded on the right to the width S.

    A batch is a pytree of NumPy arrays, which a jitted step traces.

    Attributes:
      inputs: Tokens that the model reads. The last token of a record is only ever a target.
      targets: Token that follows each position that may be in the loss. T = S, except for the loss on the answer alone,
        in which T counts the few positions in ``positions``.
      weights: 1 where the target is in the loss; 0 for padding and for whole rows that fill up a short batch.
      positions: Index into S of each target; None stands for every position.
    """

    inputs: Int[Any, "B S"]
    targets: Int[Any, "B T"]
    weights: Float32[Any, "B T"]
    positions: Int[Any, "B T"] | None


@dataclass(frozen=True)
class Examples:
    """Tokenized records, concatenated.

    Attributes:
      tokens: Tokens of all records.
      offsets: Boundaries of the records: record i is ``tokens[offsets[i]:offsets[i + 1]]``.
      is_target: Mask of the tokens that are targets. A record's first token never is, because nothing predicts it.
      truncated: Number of records that were cut at the cutoff.
      skipped: Number of records that were left out because the cutoff left them no target.
    """

    tokens: Int[np.ndarray, " N"]
    offsets: Int[np.ndarray, " n_plus_1"]
    is_target: Bool[np.ndarray, " N"]
    truncated: int
    skipped: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def first_targets(self) -> Int[np.ndarray, " n"]:
        """Return the index of each record's first target within the record."""
        target_indices = np.flatnonzero(self.is_target)
        return target_indices[np.searchsorted(target_indices, self.offsets[:-1])] - self.offsets[:-1]

    @property
    def target_counts(self) -> Int[np.ndarray, " n"]:
        """Return the number of targets of each record."""
        return np.add.reduceat(self.is_target, self.offsets[:-1], dtype=np.int64)

    def target_mask(self, index: int) -> Bool[np.ndarray, " length"]:
        """Return the mask of the tokens of one record that are targets."""
        return self.is_target[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Return the number of tokens of each record."""
        return np.diff(self.offsets)

    @property
    def input_lengths(self) -> Int[np.ndarray, " n"]:
        """Return the number of inputs of each record: all tokens but the last, which is only a target."""
        return self.lengths - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " length"]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def split_records(records: Sequence[T], held_out: int, seed: int) -> tuple[list[T], list[T]]:
    """Split records into training and validation records.

    The permutation is that of `datasets.Dataset.train_test_split` at the same seed.

    Raises:
      InputError: There are fewer than ``held_out + 1`` records.
    """
    if not records:
        raise InputError("records must not be empty")
    if len(records) <= held_out:
        raise InputError(f"held_out must be less than the number of records, {len(records)}, got {held_out}")
    if not held_out:
        return list(records), []
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in order[held_out:]], [records[i] for i in order[:held_out]]


def tokenize(
    records: Sequence[AnyRecord],
    tokenizer: TextEncoder,
    *,
    cutoff: int = 256,
    template: str | None = None,
    answer_only: bool = False,
    chat: ChatTemplate | None = None,
) -> Examples:
    """Tokenize records.

    In all templates but ``chat``, tokens are those of the published code. The text is encoded with the tokenizer's
    usual beginning (a BOS token, or none). A text of more than ``cutoff`` tokens is cut at the end. The end-of-sequence
    token is appended only to a shorter text that does not end in one. With ``answer_only`` the targets begin at the
    first token in which the encoded text differs from the encoded prompt. A token that joins the prompt's last space
    and the answer's first word therefore belongs to the answer.

    A chat template writes the special tokens itself, so none are added to its text. A token is in the loss if it
    overlaps a part of the text that is in the loss: with ``answer_only`` an assistant turn, and otherwise everything
    except turns of weight 0.

    Args:
      cutoff: Maximum number of tokens of a record.
      template: Name of the template (see `texts.render_record`); None selects the default of the kind of record.
      answer_only: Whether only the answer is in the loss.
      chat: Chat template for the template ``chat``; None selects the tokenizer's.

    Returns:
      The tokens of all records that have a target within the cutoff.

    Raises:
      InputError: There are no records, none has a target within the cutoff, or a text is given although the loss is on
        the answer; or records cannot be rendered, of which the message lists the first ten and the number.
    """
    template = texts.default_template(records) if template is None else template
    if template == "chat":
        chat = load_chat_template(tokenizer) if chat is None else chat
    if answer_only and any(isinstance(record, Text) for record in records):
        raise InputError("loss_on must be 'all' for texts, which have no prompt and answer, got 'answer'")
    kept_ids: list[list[int]] = []
    masks: list[Bool[np.ndarray, " length"]] = []
    truncated = 0
    rendered = texts.render_records(records, template, chat, answer_only=answer_only)
    encode = _encode_chats if template == "chat" else _encode_texts
    for all_ids, in_loss in encode(rendered, tokenizer, answer_only):
        # Cut at the cutoff, and append the end-of-sequence token where there is room for it.
        ids = all_ids[:cutoff]
        truncated += len(all_ids) > cutoff
        if template != "chat" and len(ids) < cutoff and tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids = [*ids, tokenizer.eos_id]
        # An appended token is in the loss. Nothing predicts the first one.
        mask = np.ones(len(ids), bool)
        mask[: len(in_loss)] = in_loss[: len(ids)]
        mask[:1] = False
        # A record without a target would only take up room in a batch.
        if mask.any():
            kept_ids.append(ids)
            masks.append(mask)
    if not kept_ids:
        raise InputError(
            f"cutoff must leave a token to learn in at least one of the {len(records)} records, got {cutoff}"
        )
    # Concatenate, so that millions of tokens take one array instead of a list of integers for each record.
    offsets = np.cumsum([0, *map(len, kept_ids)])
    return Examples(
        tokens=np.fromiter((token for ids in kept_ids for token in ids), np.int32, count=int(offsets[-1])),
        offsets=offsets,
        is_target=np.concatenate(masks),
        truncated=truncated,
        skipped=len(records) - len(kept_ids),
    )


Encoded = tuple[list[int], Bool[np.ndarray, " length"]]
"""Token ids of a text, and the mask of those that are in the loss."""


def _encode_texts(rendered: Sequence[RenderedText], tokenizer: TextEncoder, answer_only: bool) -> Iterator[Encoded]:
    encoded = tokenizer.encode_batch([text for text, _ in rendered])
    prompts: list[list[int]] = [[]] * len(rendered)
    if answer_only:
        prompts = tokenizer.encode_batch([text[: spans[0][0]] for text, spans in rendered])
    for ids, prompt_ids in zip(encoded, prompts, strict=True):
        yield ids, np.arange(len(ids)) >= common_length(ids, prompt_ids)


def _encode_chats(rendered: Sequence[RenderedText], tokenizer: Any, answer_only: bool) -> Iterator[Encoded]:
    # Without masks, the positions of the tokens in the text are not needed.
    if not answer_only and all(spans == ((0, len(text)),) for text, spans in rendered):
        for ids in tokenizer.encode_batch([text for text, _ in rendered], False):
            yield ids, np.ones(len(ids), bool)
        return
    encoded = tokenizer.encode_with_offsets([text for text, _ in rendered])
    for (ids, offsets), (_, spans) in zip(encoded, rendered, strict=True):
        yield ids, mark_tokens(offsets, spans)


def choose_widths(input_lengths: Int[np.ndarray, " n"], count: int) -> tuple[int, ...]:
    """Choose the widths with the least padding.

    Dynamic programming over the multiples of `WIDTH_MULTIPLE` that records need: the best k widths that end at j are
    the best k - 1 widths that end at some smaller i, and j for the records in between.

    Args:
      input_lengths: Number of inputs of each record, at least 1.
      count: Maximum number of widths, at least 1.

    Returns:
      The widths in ascending order. The last one holds the longest record.

    Examples:
      >>> choose_widths(np.array([3, 5, 30, 31, 60]), 2)
      (32, 64)
    """
    # Multiples in ascending order, and the number of records that need at most each of them.
    multiples, records_at = np.unique(-(-input_lengths // WIDTH_MULTIPLE), return_counts=True)
    records_up_to = np.cumsum(records_at)
    # Padded positions and widths for the records up to each multiple, in units of WIDTH_MULTIPLE. One width first.
    costs = records_up_to * multiples
    widths: list[tuple[int, ...]] = [(multiple,) for multiple in multiples.tolist()]
    # Allow one more width in each pass.
    for _ in range(min(count, len(widths)) - 1):
        best = [(costs[0], widths[0])]
        for j in range(1, len(multiples)):
            totals = costs[:j] + (records_up_to[j] - records_up_to[:j]) * multiples[j]
            lowest = totals.min()
            # Among equal costs, the narrowest widths.
            ties = (widths[i] for i in np.flatnonzero(totals == lowest).tolist())
            best.append(min((costs[j], widths[j]), (lowest, (*min(ties), int(multiples[j])))))
        costs, widths = np.array([cost for cost, _ in best]), [chosen for _, chosen in best]
    return tuple(width * WIDTH_MULTIPLE for width in widths[-1]) if widths else ()


class EpochPlan(NamedTuple):
    """Order of the records in one epoch.

    Attributes:
      rows: Record indices of each batch; -1 is a row that fills up a short batch.
      widths: Padded length of each batch.
    """

    rows: Int[np.ndarray, "batches B"]
    widths: Int[np.ndarray, " batches"]


def plan_epoch(
    input_lengths: Int[np.ndarray, " n"], widths: Sequence[int], batch_size: int, *, seed: int | None, epoch: int
) -> EpochPlan:
    """Assign each record to one batch of an epoch, so that at most one batch is not full.

    Args:
      input_lengths: Number of inputs of each record.
      widths: Padded lengths in ascending order, of which the last holds every record.
      seed: Seed that determines the order together with ``epoch``; None keeps the order of the records (validation).
      epoch: Index of the epoch, from 0.
    """
    random = None if seed is None else np.random.default_rng([seed, epoch])
    # Shuffle the records and deal each to the narrowest width that holds it.
    order = np.arange(len(input_lengths)) if random is None else random.permutation(len(input_lengths))
    bucket = np.searchsorted(np.asarray(widths), input_lengths[order])
    batches: list[np.ndarray] = []
    batch_widths: list[int] = []
    remainder = np.empty(0, order.dtype)
    for index, width in enumerate(widths):
        # Fill batches of this width; a remainder goes to the next width, so only the last batch can be short.
        members = np.concatenate([remainder, order[bucket == index]])
        full = len(members) // batch_size
        batches.extend(members[: full * batch_size].reshape(full, batch_size))
        batch_widths.extend([width] * full)
        remainder = members[full * batch_size :]
    # Fill up the short batch, which has the last width.
    if len(remainder):
        batches.append(np.concatenate([remainder, np.full(batch_size - len(remainder), -1, order.dtype)]))
        batch_widths.append(widths[-1])
    # Shuffle the batches, so that the widths mix over the epoch.
    shuffled = np.arange(len(batches)) if random is None else random.permutation(len(batches))
    return EpochPlan(np.array(batches)[shuffled], np.array(batch_widths)[shuffled])


def count_epoch_steps(records: int, batch_size: int) -> int:
    """Return the number of batches of an epoch, the last of which may have fewer records."""
    return -(-records // batch_size)


class Batches:
    """Sequence of all batches of a run, indexed by step from 0.

    Args:
      widths: Padded lengths, see `choose_widths`.
      epochs: Number of passes over the records.
      steps: Number of batches, in place of ``epochs``; None is that of the epochs.
      seed: Seed of the order; None keeps the order of the records.
      answer_only: Whether a batch has targets only at the answer's positions.

    Attributes:
      examples: Tokenized records.
      steps_per_epoch: Number of batches in one epoch.
    """

    def __init__(
        self,
        examples: Examples,
        widths: Sequence[int],
        *,
        batch_size: int,
        epochs: int = 1,
        steps: int | None = None,
        seed: int | None = None,
        answer_only: bool = False,
    ) -> None:
        self.examples, self._widths = examples, tuple(widths)
        self._input_lengths = examples.input_lengths
        self._order = (batch_size, seed, answer_only)
        self._plan_epoch = partial(plan_epoch, self._input_lengths, self._widths, batch_size, seed=seed)
        self._plans: dict[int, EpochPlan] = {}
        self.steps_per_epoch = count_epoch_steps(len(examples), batch_size)
        self._steps = epochs * self.steps_per_epoch if steps is None else steps
        self._target_widths = self._max_target_counts() if answer_only else None

    def __len__(self) -> int:
        return self._steps

    def limit_widths(self, max_width: int) -> "Batches":
        """Return the same batches, padded to at most ``max_width``.

        Raises:
          InputError: A record is longer.
        """
        if self._widths[-1] <= max_width:  # no width, and so no record, is longer
            return self
        if (longest := int(self._input_lengths.max())) > max_width:
            raise InputError(
                f"a record has {longest + 1} tokens, but the model reads at most {max_width + 1}. "
                f"Set the cutoff to {max_width + 1}."
            )
        # The order of the records depends on the settings, not on the widths, so it stays the same.
        batch_size, seed, answer_only = self._order
        widths = [min(width, max_width) for width in self._widths]
        return Batches(
            self.examples, widths, batch_size=batch_size, steps=self._steps, seed=seed, answer_only=answer_only
        )

    @property
    def padding_share(self) -> float:
        """Return the share of the first epoch's positions that hold no token."""
        plan = self._plan(0)
        return 1 - float(self._input_lengths.sum() / (plan.widths * plan.rows.shape[1]).sum())

    @property
    def widest_step(self) -> int:
        """Return a step of the first epoch whose batch has the largest width."""
        return int(np.argmax(self._plan(0).widths[: len(self)]))

    def __repr__(self) -> str:
        """Return the numbers of steps and the widths."""
        return f"Batches({len(self)} steps of {self.steps_per_epoch} an epoch, widths {self._widths})"

    def _plan(self, epoch: int) -> EpochPlan:
        if (plan := self._plans.get(epoch)) is None:
            plan = self._plan_epoch(epoch=epoch)
            # Keep the previous epoch's plan as well: batches are prepared ahead, so both may be in use.
            previous = {epoch - 1: self._plans[epoch - 1]} if epoch - 1 in self._plans else {}
            self._plans = previous | {epoch: plan}
        return plan

    def __getitem__(self, step: int) -> Batch:
        return self._assemble(*self._locate(step))

    def _locate(self, step: int) -> tuple[Int[np.ndarray, " B"], int]:
        """Return the records of one step, -1 for a row that fills up a short batch, and the padded length."""
        if not -len(self) <= step < len(self):  # the IndexError also ends a loop over the batches
            raise IndexError(f"step must be less than {len(self)}, got {step}")
        epoch, index = divmod(step % len(self), self.steps_per_epoch)
        plan = self._plan(epoch)
        return plan.rows[index], int(plan.widths[index])

    def _assemble(self, rows: Int[np.ndarray, " B"], width: int) -> Batch:
        """Pad the records of one batch into its arrays."""
        target_width = width if self._target_widths is None else self._target_widths[width]
        inputs = np.zeros((len(rows), width), np.int32)
        targets = np.zeros((len(rows), target_width), np.int32)
        weights = np.zeros((len(rows), target_width), np.float32)
        positions = None if self._target_widths is None else np.zeros((len(rows), target_width), np.int32)
        for row, index in enumerate(rows.tolist()):
            # A row that fills up a short batch keeps weight 0.
            if index < 0:
                continue
            # Position i predicts token i + 1, so the token at index t is the target of position t - 1.
            tokens, target_indices = self.examples[index], np.flatnonzero(self.examples.target_mask(index))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            if positions is None:
                targets[row, : len(tokens) - 1] = tokens[1:]
                weights[row, target_indices - 1] = 1
            else:
                # Only the answer's targets, packed to the left, with the positions that predict them.
                targets[row, : len(target_indices)] = tokens[target_indices]
                weights[row, : len(target_indices)] = 1
                positions[row, : len(target_indices)] = target_indices - 1
        return Batch(inputs, targets, weights, positions)

    def _max_target_counts(self) -> dict[int, int]:
        """Return the maximum number of targets of a record at each width, rounded up to `WIDTH_MULTIPLE`."""
        counts = self.examples.target_counts
        max_counts = {width: int(counts[self._input_lengths <= width].max(initial=1)) for width in self._widths}
        return {width: min(width, -(-count // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) for width, count in max_counts.items()}


PREFETCHED_BATCHES = 2
"""Number of batches that are prepared ahead."""


def prefetch(batches: Batches, *, start: int = 0) -> Iterator[Batch]:
    """Yield the batches from step ``start`` on, prepared ahead in a background thread."""
    steps = iter(range(start, len(batches)))
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(batches.__getitem__, step) for step in islice(steps, PREFETCHED_BATCHES))
        while pending:
            # Start on the next batch before the caller works on this one.
            batch = pending.popleft().result()
            pending.extend(thread.submit(batches.__getitem__, step) for step in islice(steps, 1))
            yield batch
