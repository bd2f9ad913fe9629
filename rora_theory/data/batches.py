"""From records to padded batches: tokens, a split, few widths, and an order that any step can be asked for.

Every batch holds records of about the same length, padded to one of a few widths. A width is a shape, and a
shape is compiled once. The order of the batches is a function of the seed and the epoch alone, so the
position in the data is the step: a run that goes on at step k asks for batch k and nothing is read twice or
left out.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int

from rora_theory.data import chat as chats
from rora_theory.data import texts
from rora_theory.data.formats import AnyRecord, Text
from rora_theory.errors import InputError
from rora_theory.llama.shared_prompt import common_length

MULTIPLE = 8
"""Widths are multiples of this, as in the published code."""

T = TypeVar("T")


@runtime_checkable
class TextEncoder(Protocol):
    """What is asked of a tokenizer; `rora_theory.llama.tokenizer.Tokenizer` is one, and chats ask for one."""

    @property
    def eos_id(self) -> int | None: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


class Batch(NamedTuple):
    """One step's records, padded to the width S on the right. A pytree of numpy arrays, traced in a step.

    Attributes:
      inputs: tokens the model reads. The last token of a record is only ever a target.
      targets: the token that follows, for each position that may be in the loss: T = S, or, for the loss on
        the answer alone, the few positions named by ``positions``.
      weights: 1 where the target counts, 0 for padding and for whole rows that fill a short batch.
      positions: index into S of each target; None is every position.
    """

    inputs: Int[Any, "B S"]
    targets: Int[Any, "B T"]
    weights: Float32[Any, "B T"]
    positions: Int[Any, "B T"] | None


@dataclass(frozen=True)
class Examples:
    """Tokenized records, end to end.

    Attributes:
      tokens: all tokens.
      offsets: record i is ``tokens[offsets[i]:offsets[i + 1]]``.
      learned: which tokens count as targets; a record's first never does, since nothing predicts it.
      truncated: records cut at the cut-off.
      skipped: records left out because the cut-off left them no target.
    """

    tokens: Int[np.ndarray, " N"]
    offsets: Int[np.ndarray, " n_plus_1"]
    learned: Bool[np.ndarray, " N"]
    truncated: int
    skipped: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def starts(self) -> Int[np.ndarray, " n"]:
        """Index within each record of the first token that counts as a target."""
        first = np.flatnonzero(self.learned)
        return first[np.searchsorted(first, self.offsets[:-1])] - self.offsets[:-1]

    @property
    def targets(self) -> Int[np.ndarray, " n"]:
        """How many tokens of each record count as targets."""
        return np.add.reduceat(self.learned, self.offsets[:-1], dtype=np.int64)

    def learned_of(self, index: int) -> Bool[np.ndarray, " length"]:
        """Which tokens of a record count as targets."""
        return self.learned[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of each record."""
        return np.diff(self.offsets)

    @property
    def sizes(self) -> Int[np.ndarray, " n"]:
        """Positions each record takes: its tokens but the last, which is only a target."""
        return self.lengths - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " length"]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def split(records: Sequence[T], held_out: int, seed: int) -> tuple[list[T], list[T]]:
    """Training and validation records, permuted as `datasets.Dataset.train_test_split` does at this seed.

    Raises:
      InputError: fewer than ``held_out + 1`` records.
    """
    if not records:
        raise InputError("there are no records; accepted is one or more")
    if len(records) <= held_out:
        raise InputError(f"held_out is {held_out} of {len(records)} records; accepted are fewer than all")
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
    chat: chats.ChatTemplate | None = None,
) -> Examples:
    """Prompts as token ids.

    In all templates but ``chat`` as the published code makes them: the text is encoded with the checkpoint's own
    beginning (a BOS token, or none). More than ``cutoff`` tokens are cut at the end; the end-of-sequence token is added
    only to a text that is shorter and does not end in one. With ``answer_only`` the targets begin at the first token in
    which the encoded text differs from the encoded prompt: a token that joins the prompt's last space to the answer's
    first word is the answer's.

    A chat template writes the special tokens itself, so nothing is added to what it writes. A token is in the loss if
    it shares a letter with a part of the text that is in the loss: with ``answer_only`` a turn of the assistant's, and
    otherwise anything but a turn of weight 0.

    Args:
      records: Records to encode.
      tokenizer: Tokenizer of the model.
      cutoff: Maximum number of tokens of a record.
      template: Name of the template (see `texts.write`); None selects that of the kind of record.
      answer_only: Whether only the answer is in the loss.
      chat: Chat template of the template ``chat``; None selects the tokenizer's own.

    Raises:
      InputError: There are no records, none has a token to learn within the cut-off, or a text is given although the
        loss is on the answer; or records can't be rendered, of which the message lists the first ten and the number.
    """
    template = texts.default_template(records) if template is None else template
    if template == "chat":
        chat = chats.chat_template_of(tokenizer) if chat is None else chat
    if answer_only and any(isinstance(record, Text) for record in records):
        raise InputError("loss_on is answer, and a text has no prompt and answer; accepted is loss_on all")
    kept: list[list[int]] = []
    learned: list[Bool[np.ndarray, " length"]] = []
    truncated = 0
    for whole, in_loss in _encode(records, tokenizer, template, chat, answer_only=answer_only, least=2 * cutoff):
        ids = whole[:cutoff]
        truncated += len(whole) > cutoff
        if template != "chat" and len(ids) < cutoff and tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids = [*ids, tokenizer.eos_id]
        counted = np.ones(len(ids), bool)
        counted[: len(in_loss)] = in_loss[: len(ids)]
        counted[:1] = False
        if counted.any():
            kept.append(ids)
            learned.append(counted)
    if not kept:
        raise InputError(f"none of {len(records)} records has a token to learn within cutoff {cutoff}")
    offsets = np.cumsum([0, *map(len, kept)])
    return Examples(
        tokens=np.fromiter((token for ids in kept for token in ids), np.int32, count=int(offsets[-1])),
        offsets=offsets,
        learned=np.concatenate(learned),
        truncated=truncated,
        skipped=len(records) - len(kept),
    )


Encoded = tuple[list[int], Bool[np.ndarray, " length"]]
"""Token ids of a text, and which of them are in the loss."""

LETTERS = 16
"""Letters of a text's beginning for each token that it should have: most tokens have two to five."""


def _encode(
    records: Sequence[AnyRecord],
    tokenizer: TextEncoder,
    template: str,
    chat: chats.ChatTemplate | None,
    *,
    answer_only: bool,
    least: int,
) -> list[Encoded]:
    """Encode each record, of a long text a beginning of at least ``least`` tokens.

    A cut changes the tokens just before it, so ``least`` is more than the tokens that are used.
    """
    encode = _encode_chats if template == "chat" else _encode_texts
    encoded: dict[int, Encoded] = {}
    left, letters = list(range(len(records))), LETTERS * least
    while left:
        part = [records[index] for index in left]
        written = texts.write_all(part, template, chat, answer_only=answer_only, letters=letters)
        tokens = list(encode(written, tokenizer, answer_only))
        encoded |= {
            index: own
            for index, text, own in zip(left, written, tokens, strict=True)
            if len(text.text) < letters or len(own[0]) >= least
        }
        # The few texts with so many letters to a token are written and encoded again, at four times the length.
        left, letters = [index for index in left if index not in encoded], 4 * letters
    return [encoded[index] for index in range(len(records))]


def _encode_texts(written: Sequence[chats.Written], tokenizer: TextEncoder, answer_only: bool) -> Iterator[Encoded]:
    encoded = tokenizer.encode_batch([one.text for one in written])
    heads: list[list[int]] = [[]] * len(written)
    if answer_only:
        heads = tokenizer.encode_batch([text[: spans[0][0]] for text, spans in written])
    for ids, head in zip(encoded, heads, strict=True):
        yield ids, np.arange(len(ids)) >= common_length(ids, head)


def _encode_chats(written: Sequence[chats.Written], tokenizer: Any, answer_only: bool) -> Iterator[Encoded]:
    if not answer_only and all(spans == ((0, len(text)),) for text, spans in written):
        yield from ((ids, np.ones(len(ids), bool)) for ids in tokenizer.encode_batch([w.text for w in written], False))
        return
    encoded = tokenizer.encode_with_letters([one.text for one in written])
    for (ids, letters), (_, spans) in zip(encoded, written, strict=True):
        begins, ends = letters.T
        learned = np.zeros(len(ids), bool)
        for begin, end in spans:
            learned |= (begins < end) & (ends > begin)
        yield ids, learned


def choose_widths(sizes: Int[np.ndarray, " n"], count: int) -> tuple[int, ...]:
    """At most ``count`` multiples of `MULTIPLE` that ``sizes`` can be padded to with the least padding.

    Dynamic programming over the multiples: the best k widths that end at j are the best k - 1 that end at
    some i below, and j for the records between.

    Args:
      sizes: positions each record takes, 1 or more.
      count: most widths, 1 or more.

    Returns:
      widths in ascending order; the last holds the longest record.

    Examples:
      >>> choose_widths(np.array([3, 5, 30, 31, 60]), 2)
      (32, 64)
    """
    steps = -(-sizes // MULTIPLE)
    many = np.bincount(steps)
    below = np.cumsum(many)
    top = len(many) - 1
    # best[j]: (positions, widths) for the records up to width j, in units of MULTIPLE.
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [(int(below[j]) * j, (j,)) for j in range(1, top + 1)]
    for _ in range(count - 1):
        best = [best[0]] + [
            min([best[j]] + [(best[i][0] + int(below[j] - below[i]) * j, (*best[i][1], j)) for i in range(1, j)])
            for j in range(1, top + 1)
        ]
    return tuple(step * MULTIPLE for step in best[top][1])


class Plan(NamedTuple):
    """The order of one epoch.

    Attributes:
      rows: records of each batch; -1 is a row that fills a short batch.
      widths: padded length of each batch.
    """

    rows: Int[np.ndarray, "batches B"]
    widths: Int[np.ndarray, " batches"]


def plan_epoch(
    sizes: Int[np.ndarray, " n"], widths: Sequence[int], batch_size: int, *, seed: int | None, epoch: int
) -> Plan:
    """Batches of one epoch: each record once, every batch full but one.

    Records are shuffled, dealt to the narrowest width that holds them and batched there; what is left over in
    a width goes to the next. The batches are then shuffled. Thus only the last, in the widest, can be short.

    Args:
      sizes: positions each record takes.
      widths: padded lengths, ascending, the last of which holds every record.
      batch_size: records a batch.
      seed: with ``epoch`` determines the order; None keeps the records' order (validation).
      epoch: from 0.
    """
    random = None if seed is None else np.random.default_rng([seed, epoch])
    order = np.arange(len(sizes)) if random is None else random.permutation(len(sizes))
    bucket = np.searchsorted(np.asarray(widths), sizes[order])
    rows: list[np.ndarray] = []
    chosen: list[int] = []
    left = np.empty(0, order.dtype)
    for index, width in enumerate(widths):
        members = np.concatenate([left, order[bucket == index]])
        full = len(members) // batch_size
        rows.extend(members[: full * batch_size].reshape(full, batch_size))
        chosen.extend([width] * full)
        left = members[full * batch_size :]
    if len(left):
        rows.append(np.concatenate([left, np.full(batch_size - len(left), -1, order.dtype)]))
        chosen.append(widths[-1])
    shuffled = np.arange(len(rows)) if random is None else random.permutation(len(rows))
    return Plan(np.array(rows)[shuffled], np.array(chosen)[shuffled])


class Batches:
    """All batches of a run by step, from 0.

    Args:
      examples: the records.
      widths: padded lengths, see `choose_widths`.
      batch_size: records a batch.
      epochs: passes over the records.
      seed: of the order; None keeps the records' order.
      answer_only: whether batches name the answer's positions.

    Attributes:
      examples: the records.
      steps_per_epoch: batches of one epoch.
    """

    def __init__(
        self,
        examples: Examples,
        widths: Sequence[int],
        *,
        batch_size: int,
        epochs: int = 1,
        seed: int | None = None,
        answer_only: bool = False,
    ) -> None:
        self.examples, self._widths, self._epochs = examples, tuple(widths), epochs
        self._sizes = examples.sizes
        self._order = (batch_size, seed, answer_only)
        self._plan_of = partial(plan_epoch, self._sizes, self._widths, batch_size, seed=seed)
        self._plans: dict[int, Plan] = {}
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self._answers = self._answer_widths() if answer_only else None

    def __len__(self) -> int:
        return self._epochs * self.steps_per_epoch

    def within(self, longest: int) -> "Batches":
        """The same batches, padded to no more than the ``longest`` positions that a model reads.

        Raises:
          InputError: a record that is longer.
        """
        if self._widths[-1] <= longest:  # and so every record
            return self
        if (size := int(self._sizes.max())) > longest:
            raise InputError(
                f"a record has {size + 1} tokens; accepted are at most {longest + 1}, as many as the model reads: a "
                f"cutoff of {longest + 1} cuts it"
            )
        batch_size, seed, answer_only = self._order
        widths = [min(width, longest) for width in self._widths]
        return Batches(
            self.examples, widths, batch_size=batch_size, epochs=self._epochs, seed=seed, answer_only=answer_only
        )

    @property
    def digest(self) -> str:
        """The SHA-256 of all that decides the batch of a step; passes that may follow change none."""
        found = hashlib.sha256(repr((self._widths, *self._order)).encode())
        for array in (self.examples.tokens, self.examples.offsets, self.examples.learned):
            found.update(array.tobytes())
        return found.hexdigest()

    @property
    def padding(self) -> float:
        """Share of the first epoch's positions that hold no token."""
        plan = self._plan(0)
        return 1 - float(self._sizes.sum() / (plan.widths * plan.rows.shape[1]).sum())

    @property
    def full_steps(self) -> list[int]:
        """The first epoch's steps whose batch has a record in every row."""
        return np.flatnonzero((self._plan(0).rows >= 0).all(axis=1)).tolist()

    def __repr__(self) -> str:
        return f"Batches({len(self)} steps of {self.steps_per_epoch} an epoch, widths {self._widths})"

    def _plan(self, epoch: int) -> Plan:
        """The order of an epoch, kept with that of the one before: batches are made ahead of the steps."""
        if (plan := self._plans.get(epoch)) is None:
            plan = self._plan_of(epoch=epoch)
            self._plans = {one: kept for one, kept in self._plans.items() if one == epoch - 1} | {epoch: plan}
        return plan

    def __getitem__(self, step: int) -> Batch:
        if not -len(self) <= step < len(self):  # which also ends a loop over the batches
            raise IndexError(f"step is {step}; accepted is below {len(self)}")
        epoch, index = divmod(step % len(self), self.steps_per_epoch)
        plan = self._plan(epoch)
        return self._assemble(plan.rows[index], int(plan.widths[index]))

    def _assemble(self, rows: Int[np.ndarray, " B"], width: int) -> Batch:
        size = width if self._answers is None else self._answers[width]
        inputs = np.zeros((len(rows), width), np.int32)
        targets = np.zeros((len(rows), size), np.int32)
        weights = np.zeros((len(rows), size), np.float32)
        positions = None if self._answers is None else np.zeros((len(rows), size), np.int32)
        for row, index in enumerate(rows.tolist()):
            if index < 0:
                continue
            tokens, learned = self.examples[index], np.flatnonzero(self.examples.learned_of(index))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            if positions is None:
                targets[row, : len(tokens) - 1] = tokens[1:]
                weights[row, learned - 1] = 1
            else:
                targets[row, : len(learned)] = tokens[learned]
                weights[row, : len(learned)] = 1
                positions[row, : len(learned)] = learned - 1
        return Batch(inputs, targets, weights, positions)

    def _answer_widths(self) -> dict[int, int]:
        """For each padded length the most targets of any record it may hold, as a multiple of `MULTIPLE`."""
        targets = self.examples.targets
        most = {width: int(targets[self._sizes <= width].max(initial=1)) for width in self._widths}
        return {width: min(width, -(-count // MULTIPLE) * MULTIPLE) for width, count in most.items()}


AHEAD = 2
"""Batches that are made before they are asked for."""


def iterate(batches: Batches, *, start: int = 0) -> Iterator[Batch]:
    """Batches from step ``start`` on, made ahead in a thread of their own."""
    steps = iter(range(start, len(batches)))
    with ThreadPoolExecutor(1) as thread:
        made = deque(thread.submit(batches.__getitem__, step) for step in islice(steps, AHEAD))
        while made:
            batch = made.popleft().result()
            made.extend(thread.submit(batches.__getitem__, step) for step in islice(steps, 1))
            yield batch
