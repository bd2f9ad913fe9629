"""Batches of padded rows, and masks of the tokens of a batch that a measurement uses.

Padding is left out. In a causal model so are the tokens after a row's last target. In a held-out batch, tokens that
repeat the beginning of a training record are marked as seen.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from rora_theory.errors import InputError, first_line, is_out_of_memory, shown
from rora_theory.measure.modules import base_model, task_type, unwrap
from rora_theory.measure.tokens import PADDING_ID, mark_repeats
from rora_theory.scaling import check_instance

IGNORED_LABEL = -100
"""Label that PyTorch and transformers leave out of the loss."""

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward pass, with labels."""

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
"""Function of a model and a batch that returns the loss."""


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], padding: int | None) -> dict[str, torch.Tensor]:
    """Return a batch of rows padded on the right, where padding is masked and has no label.

    Args:
      rows: Token ids and labels of each row.
      padding: Padding token; None uses token 0.
    """
    width = max((len(ids) for ids, _ in rows), default=0)
    batch = {
        "input_ids": torch.full((len(rows), width), padding or 0),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED_LABEL),
    }
    for row, (ids, labels) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(labels)] = torch.tensor(labels, dtype=torch.long)
    return batch


def model_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return ``model(**batch).loss``.

    Raises:
      InputError: If the model's output has no loss.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise InputError(
            f"the model returns no loss for a batch with the keys {', '.join(batch)}. "
            "Add labels to the batch, or pass a function as loss."
        )
    return loss


def check_batch(name: str, batch: object) -> None:
    """Raise `InputError` unless ``batch`` is a mapping with at least one row of tokens, if it has tokens."""
    if not isinstance(batch, Mapping) or not batch:
        raise InputError(
            f"{name} must be a mapping with the arguments of the model's forward pass, such as input_ids and labels, "
            f"got {shown(batch)}"
        )
    for key in ("input_ids", "labels"):
        value = batch.get(key)
        if isinstance(value, torch.Tensor) and not value.numel():
            raise InputError(f"{name} must have at least one row, got {key} of shape {tuple(value.shape)}")


@contextmanager
def naming_failure(work: str) -> Iterator[None]:
    """Raise an `InputError` of one line for an error of a model's own code, such as a batch that it does not accept."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"{work} failed with {type(error).__name__}: {reason}. Check that the model trains on this batch."
        ) from error


def loss_function(loss: Loss | None) -> Loss:
    """Return a loss function that refuses results other than a tensor with one number; None is `model_loss`.

    Raises:
      InputError: If ``loss`` is not a function. Later: if it returns anything else, or if the model fails.
    """
    compute_value = model_loss if loss is None else loss
    check_instance("loss", compute_value, Callable, "a function")

    def compute(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with naming_failure(f"the forward pass of {type(base_model(unwrap(model))).__name__}"):
            value = compute_value(model, batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            result = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
            raise InputError(f"loss must return a tensor with one number, got {result}")
        return value

    return compute


class TokenMasks(NamedTuple):
    """Masks over the tokens of a module's input, in the order of its rows.

    Attributes:
      real: Tokens that are neither padding nor without a target.
      seen: Tokens that occur in the training batch after the same beginning.
    """

    real: Bool[np.ndarray, " tokens"]
    seen: Bool[np.ndarray, " tokens"]


class MasksByShape(dict[tuple[int, ...], TokenMasks]):
    """Masks by the leading shape of a module's input: [batch, sequence], [sequence, batch] and [batch * sequence].

    A flattened input may be in either order. Its rows come first unless an input of shape [sequence, batch] was found.

    Attributes:
      agreed: Masks of flattened inputs, with the tokens that count in both orders.
      sequence_first: Shapes of inputs [sequence, batch].
      is_sequence_first: Whether `select_masks` found an input of such a shape.
      rows: Number of rows of a batch that holds nothing but text; None if it holds images or sound, or no token ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.agreed: dict[tuple[int, ...], TokenMasks] = {}
        self.sequence_first: set[tuple[int, ...]] = set()
        self.is_sequence_first = False
        self.rows: int | None = None


def move_batch(batch: Batch, model: torch.nn.Module) -> dict[str, Any]:
    """Move a batch to the device of the model's first layer, as tensors that autograd can save."""
    devices = (parameter.device for parameter in model.parameters())
    device = getattr(model, "device", None) or next(devices, torch.device("cpu"))

    def move(value: torch.Tensor) -> torch.Tensor:
        # Autograd can't save an inference tensor; a clone made outside inference mode is an ordinary tensor.
        value = value.clone() if value.is_inference() else value
        # A model on the meta device loads its weights when they are needed: the batch stays where it is.
        return value if device.type == "meta" else value.to(device)

    return {name: move(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def find_masks(model: torch.nn.Module, batch: Batch, trained: Batch | None = None) -> MasksByShape:
    """Compute the masks of a batch's tokens for every leading shape that a module's input may have.

    A token is real if ``attention_mask`` includes it and, in a causal model with labels, if a token with a target
    follows it in its row. A token is seen if its record, up to that token, is the beginning of a record of ``trained``.
    Records begin at the start of a row and where ``position_ids`` restart. Tokens of a decoder count as seen only if
    the encoder's whole input was seen as well.

    Inputs of other shapes, such as those of experts, have no masks. If two orders of the tokens have the same shape
    (as many rows as tokens in a row, or an encoder and a decoder of equal length), a token must count in both.

    Args:
      model: Base model. Its class distinguishes causal models from others.
      batch: Batch in the format of transformers: ``input_ids``, ``attention_mask``, ``labels``, ``position_ids``.
      trained: Batch that yields the gradient; None marks no token as seen.

    Returns:
      The masks by leading shape; empty if the batch has no token ids.
    """
    masks = MasksByShape()
    # Tokens of the model or, with a decoder, of its encoder.
    ids = _array(batch, "input_ids")
    if ids is not None and ids.ndim == 2:
        real = _real_tokens(model, ids, batch)
        seen = np.zeros(ids.shape, bool)
        trained_ids = None if trained is None else _array(trained, "input_ids")
        if trained is not None and trained_ids is not None:
            # Compare records, not rows: a packed row holds several.
            records, positions = _split_records(ids, real, _array(batch, "position_ids"))
            trained_real = _real_tokens(model, trained_ids, trained)
            trained_records, _ = _split_records(trained_ids, trained_real, _array(trained, "position_ids"))
            repeats = mark_repeats(records, [trained_records])
            for record, position, repeated in zip(records, positions, repeats, strict=True):
                seen.reshape(-1)[position] = repeated[record != PADDING_ID]
        _add_masks(masks, real, seen)
        masks.rows = len(ids) if _is_text(batch) else None
    # Tokens of the decoder, if the model has one.
    decoder = _read_decoder(model, batch)
    if decoder is not None:
        _add_masks(masks, decoder.real, _seen_by_decoder(model, batch, trained, decoder))
    return masks


def check_unseen(model: torch.nn.Module, held_out: Batch, trained: Batch) -> None:
    """Raise `InputError` if every token of a held-out batch repeats the beginning of a training record."""
    masks = find_masks(model, held_out, trained)
    if masks and not any((mask.real & ~mask.seen).any() for mask in masks.values()):
        tokens = max(int(mask.real.sum()) for mask in masks.values())
        raise InputError(
            f"all {tokens} held-out tokens repeat the beginning of a training record, so they carry no information "
            "about new text. Pass different or longer records, or switch the mask off."
        )


def select_masks(masks: MasksByShape, x: Float[torch.Tensor, "*tokens _features"]) -> TokenMasks | None:
    """Return the masks for a module's input, or None if its shape or the order of its tokens is unknown.

    An input of shape [sequence, batch] is noted, because the flattened inputs of later calls may be in the same order.
    """
    leading = tuple(x.shape[:-1])
    masks.is_sequence_first |= leading in masks.sequence_first
    if not is_flattened(masks, x):
        return masks[leading]
    size = (math.prod(leading),)
    if not masks.is_sequence_first:
        return masks.get(size)
    agreed = masks.agreed.get(size)
    return agreed if agreed is not None and (agreed.real & ~agreed.seen).any() else None


def is_flattened(masks: MasksByShape, x: Float[torch.Tensor, "*tokens _features"]) -> bool:
    """Return whether the order of an input's tokens is not known from its shape."""
    leading = tuple(x.shape[:-1])
    return len(leading) == 1 or leading not in masks


def has_other_positions(masks: MasksByShape, x: Float[torch.Tensor, "*tokens _features"]) -> bool:
    """Return whether an input has another number of positions per row than the batch has tokens.

    Examples are a model that pads every row to a multiple of its attention window, and a decoder that reads several
    streams. A flat input may hold the tokens that a router chose.
    """
    leading = tuple(x.shape[:-1])
    is_by_row = masks.rows in leading and len(leading) == 2
    return is_by_row and leading not in masks and (math.prod(leading),) not in masks


def describe_positions(leading: tuple[int, ...]) -> str:
    """Return why a module with an input of this leading shape is left out, see `has_other_positions`."""
    return f"reads {' x '.join(map(str, leading))} positions, which are not the batch's tokens: the model pads them"


def _is_text(batch: Batch) -> bool:
    """Return whether a batch has no tensors of real numbers apart from labels and masks, such as pixels."""
    return not any(
        isinstance(value, torch.Tensor) and value.is_floating_point() and name != "labels" and "mask" not in name
        for name, value in batch.items()
    )


def _add_masks(masks: MasksByShape, real: Bool[np.ndarray, "B S"], seen: Bool[np.ndarray, "B S"]) -> None:
    """Add the masks of one batch's tokens under every leading shape that a module's input may have."""
    batch_first = TokenMasks(real.reshape(-1), seen.reshape(-1))
    sequence_first = TokenMasks(real.T.reshape(-1), seen.T.reshape(-1))
    agreed = _intersect(batch_first, sequence_first)
    shape, flat = real.shape, (real.size,)
    if shape == shape[::-1]:
        # The shape of a square batch does not show the order of its tokens, nor that of flattened ones.
        batch_first = sequence_first = agreed
    elif 1 not in shape:
        masks.sequence_first.add(shape[::-1])
    # Shapes can coincide: keep the tokens that count in every order.
    for key, new in ((shape, batch_first), (shape[::-1], sequence_first), (flat, batch_first)):
        masks[key] = _intersect(masks.get(key, new), new)
    masks.agreed[flat] = _intersect(masks.agreed.get(flat, agreed), agreed)


def _intersect(first: TokenMasks, second: TokenMasks) -> TokenMasks:
    """Return the masks of the tokens that count in both of two orders."""
    return TokenMasks(first.real & second.real, first.seen | second.seen)


class _DecoderTokens(NamedTuple):
    """Tokens that the decoder of a sequence-to-sequence model reads, and the mask of those that count."""

    ids: Int[np.ndarray, "B T"]
    real: Bool[np.ndarray, "B T"]


def _read_decoder(model: torch.nn.Module, batch: Batch) -> _DecoderTokens | None:
    """Return the decoder's tokens, or None if the model has no decoder or the batch no tokens for it."""
    if task_type(model) != "SEQ_2_SEQ_LM":
        return None
    labels, ids = _array(batch, "labels"), _array(batch, "decoder_input_ids")
    if ids is None and labels is not None and labels.ndim == 2:
        # Without decoder_input_ids the model reads the labels, shifted to the right by one.
        ids = np.concatenate([np.zeros((len(labels), 1), labels.dtype), labels[:, :-1]], axis=1)
    if ids is None or ids.ndim != 2:
        return None
    # Ignored labels and the mask both mark tokens that do not count.
    real, mask = np.ones(ids.shape, bool), _array(batch, "decoder_attention_mask")
    if labels is not None and labels.shape == ids.shape:
        real &= labels != IGNORED_LABEL
    if mask is not None and mask.shape == ids.shape:
        real &= mask.astype(bool)
    return _DecoderTokens(ids, real)


def _seen_by_decoder(
    model: torch.nn.Module, batch: Batch, trained: Batch | None, decoder: _DecoderTokens
) -> Bool[np.ndarray, "B T"]:
    """Mark decoder tokens up to which a record, with its encoder's tokens, is the beginning of a trained record."""
    trained_decoder = None if trained is None else _read_decoder(model, trained)
    ids, trained_ids = _array(batch, "input_ids"), None if trained is None else _array(trained, "input_ids")
    if trained is None or trained_decoder is None or ids is None or trained_ids is None:
        return np.zeros(decoder.real.shape, bool)
    if ids.ndim != 2 or trained_ids.ndim != 2:
        return np.zeros(decoder.real.shape, bool)
    # A decoder token is seen only with all encoder tokens before it: compare both as one row.
    rows, starts = _join_decoder(ids, _real_tokens(model, ids, batch), decoder)
    trained_rows, _ = _join_decoder(trained_ids, _real_tokens(model, trained_ids, trained), trained_decoder)
    repeats = mark_repeats(rows, [trained_rows])
    return np.stack([row[start : start + decoder.ids.shape[1]] for row, start in zip(repeats, starts, strict=True)])


def _join_decoder(
    ids: Int[np.ndarray, "B S"], real: Bool[np.ndarray, "B S"], decoder: _DecoderTokens
) -> tuple[Int[np.ndarray, "B T"], list[int]]:
    """Join the encoder's real tokens, a separator and the decoder's tokens of every row.

    Returns:
      The joined rows, padded with `PADDING_ID`, and the index of the first decoder token in each.
    """
    decoder_ids = np.where(decoder.real, decoder.ids, PADDING_ID)
    joined = [
        [*encoder_row[mask], PADDING_ID - 1, *decoder_row]
        for encoder_row, mask, decoder_row in zip(ids, real, decoder_ids, strict=True)
    ]
    rows = np.full((len(joined), max(map(len, joined), default=0)), PADDING_ID, np.int64)
    for row, values in zip(rows, joined, strict=True):
        row[: len(values)] = values
    return rows, [len(values) - decoder.ids.shape[1] for values in joined]


def _real_tokens(model: torch.nn.Module, ids: Int[np.ndarray, "B S"], batch: Batch) -> Bool[np.ndarray, "B S"]:
    """Return the mask of the tokens that are not padding and, in a causal model, precede a token with a target."""
    labels, mask = _array(batch, "labels"), _array(batch, "attention_mask")
    real = np.ones(ids.shape, bool) if mask is None or mask.shape != ids.shape else mask.astype(bool)
    if task_type(model) == "CAUSAL_LM" and labels is not None and labels.shape == ids.shape:
        # The loss compares a position's logits with the next label: nothing after the last target gets a gradient.
        last_target = np.max(np.where(labels != IGNORED_LABEL, np.arange(ids.shape[1]), -1), axis=1)
        real &= np.arange(ids.shape[1]) < last_target[:, None]
    return real


def _split_records(
    ids: Int[np.ndarray, "B S"], real: Bool[np.ndarray, "B S"], position_ids: Int[np.ndarray, "*_B S"] | None
) -> tuple[Int[np.ndarray, "n T"], list[Int[np.ndarray, " _t"]]]:
    """Split rows into records of real tokens.

    Returns:
      The records, padded on the right with `PADDING_ID`, and the flat indices of each record's tokens in ``ids``.
    """
    indices: list[np.ndarray] = []
    if position_ids is not None:
        # Models of images have several positions of a token (time, height, width): all are 0 where a record begins.
        position_ids = position_ids.reshape(-1, *position_ids.shape[-2:]).max(axis=0)
    for row in range(len(ids)):
        columns = np.flatnonzero(real[row])
        starts: Sequence[int] = [0]
        if position_ids is not None and len(columns):
            # A packed record begins where the position is 0.
            row_positions = np.broadcast_to(position_ids, ids.shape)[row, columns]
            starts = sorted({0, *np.flatnonzero(row_positions == 0).tolist()})
        indices += [part + row * ids.shape[1] for part in np.split(columns, starts[1:])]
    records = np.full((len(indices), max(map(len, indices), default=0)), PADDING_ID, np.int64)
    for record, record_indices in zip(records, indices, strict=True):
        record[: len(record_indices)] = ids.reshape(-1)[record_indices]
    return records, indices


def _array(batch: Batch, name: str) -> np.ndarray | None:
    value = batch.get(name)
    if value is None:
        return None
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
