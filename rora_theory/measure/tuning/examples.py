"""Training batches and held-out groups of rows, from batches of tensors, texts, chats or tokenized records."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from rora_theory.errors import InputError, shown
from rora_theory.measure.batches import IGNORED_LABEL, Batch, pad_rows
from rora_theory.measure.chats import ChatCollator
from rora_theory.measure.modules import task_type

MAX_GROUPS = 32
"""Number of groups into which held-out rows are split at most, unless there are more batches than that.

Losses of groups are the samples of the bootstrap.
"""

MAX_HELD_OUT_BATCHES = 128
"""Maximum number of held-out batches that are read. A probe evaluates fewer."""

LABEL_MASKS = ("completion_mask", "assistant_masks")
"""Columns of tokenized records, as TRL names them, that are 1 at the tokens to be learned."""

Data = Iterable[Any]
"""Batches (mappings with tensors, such as a ``DataLoader``), or records: texts, chats or tokenized examples."""


class Group(NamedTuple):
    """Rows of the held-out batches that are evaluated together.

    Attributes:
      batch: Batch of these rows.
      targets: Number of tokens with a label.
      tokens: Number of tokens that the model reads.
    """

    batch: Batch
    targets: int
    tokens: int


def read_batches(
    data: Data, name: str, *, tokenizer: Any, batch_size: int, max_length: int, count: int | None = None
) -> list[Batch]:
    """Return batches of tensors.

    Args:
      data: Batches or records.
      name: Name of the argument, for errors.
      tokenizer: Tokenizer for records; None accepts batches only.
      batch_size: Number of records of a batch.
      max_length: Maximum number of tokens of a record; longer ones are truncated.
      count: Maximum number of batches; None reads all.

    Raises:
      InputError: If there is no batch, if an element has an unsupported type, or if records come without a tokenizer.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise InputError(f"{name} must be a sequence of batches or records, got {type(data).__name__}")
    # Look at the first element and put it back, because an iterator cannot be rewound.
    elements = iter(data)
    first = next(elements, None)
    if first is None:
        raise InputError(f"{name} must have at least one batch or record, got none")
    elements = itertools.chain([first], elements)
    if _is_batch(first):
        batches = list(itertools.islice(elements, count))
    else:
        collate = _make_collator(first, name, tokenizer, max_length)
        batches = [collate(records) for records in itertools.islice(_chunks(elements, batch_size), count)]
    for batch in batches:
        if not _is_batch(batch):
            raise InputError(f"{name} must have elements of one kind, got {shown(type(batch).__name__)} among batches")
    return batches


@contextmanager
def preserved_generators(*data: Data) -> Iterator[None]:
    """Restore on exit the random generators of every ``DataLoader``, which yields the same batches again."""
    owners = [owner for loader in data for owner in (loader, getattr(loader, "sampler", None))]
    generators = {getattr(owner, "generator", None) for owner in owners}
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def count_tokens(batch: Batch) -> int:
    """Return the number of tokens that a model reads in a batch: those that ``attention_mask`` includes, or all."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    return count_rows(batch)


def count_targets(model: torch.nn.Module, batch: Batch) -> int:
    """Return the number of labels in the loss of a batch. A causal model has no prediction of a row's first token."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        return count_rows(batch)
    if task_type(model) == "CAUSAL_LM" and labels.ndim == 2:
        labels = labels[:, 1:]
    return int((labels != IGNORED_LABEL).sum()) if not labels.is_floating_point() else len(labels)


def held_out_groups(model: torch.nn.Module, batches: Sequence[Batch]) -> list[Group]:
    """Split held-out batches into groups of rows of one batch, see `MAX_GROUPS`.

    A batch whose tensors do not all have a row for each record is one group. Groups without a label are left out.

    Raises:
      InputError: If no group has a label.
    """
    total = sum(count_rows(batch) for batch in batches)
    # Rows per group, so that there are at most about `MAX_GROUPS` of them.
    size = -(-total // MAX_GROUPS)
    groups = []
    for batch in batches:
        for part in _split_rows(batch, size):
            targets = count_targets(model, part)
            if targets:
                groups.append(Group(part, targets, count_tokens(part)))
    if not groups:
        raise InputError("held_out has no token with a label. Add labels to the batches.")
    return groups


def count_repeated(groups: Sequence[Group], batches: Sequence[Batch]) -> int:
    """Return the number of held-out rows whose tokens equal those of a training row, padding apart."""
    trained = {row for batch in batches for row in _token_rows(batch)}
    return sum(row in trained for group in groups for row in _token_rows(group.batch))


def _token_rows(batch: Batch) -> Iterator[tuple[int, ...]]:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return
    is_real = mask != 0 if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else torch.ones_like(ids) != 0
    for row, real in zip(ids, is_real, strict=True):
        yield tuple(row[real].tolist())


def digest(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 of the tensors of batches."""
    state = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            if isinstance(value, torch.Tensor):
                # Name, type and shape too: equal bytes may be different tensors.
                tensor = value.detach().cpu().contiguous()
                state.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _is_batch(element: Any) -> bool:
    """Return whether an element is a batch: a mapping with a tensor of several rows."""
    return isinstance(element, Mapping) and any(
        isinstance(value, torch.Tensor) and (value.ndim > 1 or "input_ids" not in element) for value in element.values()
    )


def count_rows(batch: Batch) -> int:
    """Return the number of rows of ``input_ids``, or of the first tensor with rows; 1 if there is none."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.ndim:
        return len(ids)
    return len(tensors[0]) if tensors else 1


def _split_rows(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield parts of a batch of at most ``size`` rows, or the batch itself if a tensor has another number of rows."""
    rows = count_rows(batch)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if any(not tensor.ndim or len(tensor) != rows for tensor in tensors):
        yield batch
        return
    for start in range(0, rows, size):
        yield {
            name: value[start : start + size] if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def _chunks(elements: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(elements, size)):
        yield chunk


def _read_tokens(record: Mapping[str, Any], name: str, max_length: int) -> tuple[list[int], list[int]]:
    """Return the first token ids and labels of a tokenized record, without padding.

    A record without labels is learned as a whole, or where every mask of ``LABEL_MASKS`` that it has is 1.

    Raises:
      InputError: If a column is no list of integers, or has another length than ``input_ids``.
    """
    columns = {}
    for key in ("input_ids", "labels", "attention_mask", *LABEL_MASKS):
        if record.get(key) is not None:
            try:
                columns[key] = [int(value) for value in record[key]]
            except (TypeError, ValueError):
                raise InputError(
                    f"{name} must have records with lists of integers, got {key} {shown(record[key])}. For other "
                    "labels, pass batches."
                ) from None
    ids = columns.pop("input_ids")
    for key, values in columns.items():
        if len(values) != len(ids):
            raise InputError(f"{name} has a record with {len(ids)} input_ids, but {key} of length {len(values)}")
    # A mask that the record does not have leaves out nothing.
    ones = [1] * len(ids)
    masks = zip(*(columns.get(key, ones) for key in LABEL_MASKS), strict=True)
    labels = columns.get("labels") or [
        token if all(mask) else IGNORED_LABEL for token, mask in zip(ids, masks, strict=True)
    ]
    tokens = zip(ids, labels, columns.get("attention_mask", ones), strict=True)
    pairs = [(token, label) for token, label, is_real in tokens if is_real][:max_length]
    return [token for token, _ in pairs], [label for _, label in pairs]


def _make_collator(first: Any, name: str, tokenizer: Any, max_length: int) -> Callable[[Sequence[Any]], Batch]:
    """Return a function that builds a batch from records like ``first``."""
    # Kind of the records, by the first of these keys that a record has.
    is_mapping = isinstance(first, Mapping)
    kind = next((key for key in ("messages", "text", "input_ids") if is_mapping and key in first), None)
    if isinstance(first, str):
        kind = "text"
    if kind is None:
        keys = f" with the keys {', '.join(map(str, first))}" if is_mapping else ""
        raise InputError(
            f"{name} must have batches of tensors, texts, or records with messages, text or input_ids, got "
            f"{type(first).__name__}{keys}"
        )
    if tokenizer is None:
        raise InputError(f"{name} has records with {kind}, which need a tokenizer. Pass tokenizer, or batches.")
    if kind == "messages":
        return ChatCollator(tokenizer, max_length)
    if not callable(tokenizer) or not hasattr(tokenizer, "pad_token_id"):
        raise InputError(f"tokenizer must be a tokenizer of transformers, got {shown(tokenizer)}")

    def encode(record: Any) -> tuple[list[int], list[int]]:
        if kind == "text":
            ids = tokenizer(record if isinstance(record, str) else record["text"])["input_ids"]
            record = {"input_ids": ids}
        return _read_tokens(record, name, max_length)

    def collate(records: Sequence[Any]) -> Batch:
        return pad_rows([encode(record) for record in records], tokenizer.pad_token_id)

    return collate
