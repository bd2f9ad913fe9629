"""Which tokens of a batch count: not padding, not what has no target, and of a held-out batch what was not seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from rora_theory.errors import InputError
from rora_theory.measure.tokens import NOTHING, beginnings
from rora_theory.measure.torch.modules import task_type

IGNORED = -100
"""A label that is not in the loss, as PyTorch and transformers have it."""

Batch = Mapping[str, Any]
"""What a model takes by name, and labels."""

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
"""Of a model and a batch."""


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """``model(**batch).loss``.

    Raises:
      InputError: the model gives none.
    """
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise InputError(
            f"the model gives no loss for a batch of {', '.join(batch)}; accepted is one with labels, or a loss="
        )
    return found


class Tokens(NamedTuple):
    """Which tokens of a module's input are real, and which were seen in training, in the order of its rows."""

    real: Bool[np.ndarray, " tokens"]
    seen: Bool[np.ndarray, " tokens"]


TokensByShape = dict[tuple[int, ...], Tokens]
"""`Tokens` by the leading shape of a module's input: [batch, sequence], [sequence, batch] and [batch * sequence]."""


def moved(batch: Batch, model: torch.nn.Module) -> dict[str, Any]:
    """Move a batch to the device on which the model begins, as tensors that autograd can save."""
    device = getattr(model, "device", None) or next((each.device for each in model.parameters()), torch.device("cpu"))

    def placed(value: torch.Tensor) -> torch.Tensor:
        value = value.clone() if value.is_inference() else value
        return value if device.type == "meta" else value.to(device)  # meta: weights that are loaded when needed

    return {name: placed(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def tokens(model: torch.nn.Module, batch: Batch, trained: Batch | None = None) -> TokensByShape:
    """Find which tokens count, for each leading shape that a module's input may have.

    Of other shapes nothing is known, as of an expert's. Real is what ``attention_mask`` says; in a causal model that is
    given labels, up to a row's last token with a target. Seen are tokens up to which a record is the beginning of a
    trained one. A record begins with its row, and where ``position_ids`` begin again. Tokens of an encoder depend on
    what follows too, and are left out all the same. Tokens of a decoder were seen where the whole input of the encoder
    was, too.

    Where two orders of tokens have the same shape (as many rows as tokens in a row; an encoder and a decoder of one
    length) only tokens that count in both are kept.

    Args:
      model: Base model, whose class distinguishes a causal model from others.
      batch: Batch as transformers takes it: ``input_ids``, ``attention_mask``, ``labels``, ``position_ids``.
      trained: Batch that gives the gradient, with respect to which tokens were seen; None if none were.
    """
    found: TokensByShape = {}
    ids = _array(batch, "input_ids")
    if ids is not None and ids.ndim == 2:
        real = _real(model, ids, batch)
        seen = np.zeros(ids.shape, bool)
        if trained is not None and (other := _array(trained, "input_ids")) is not None:
            rows, places = _records(ids, real, _array(batch, "position_ids"))
            known, _ = _records(other, _real(model, other, trained), _array(trained, "position_ids"))
            for row, place, begun in zip(rows, places, beginnings(rows, [known]), strict=True):
                seen.reshape(-1)[place] = begun[row != NOTHING]
        _add(found, real, seen)
    decoder = _decoder(model, batch)
    if decoder is not None:
        _add(found, decoder.real, _seen_by_decoder(model, batch, trained, decoder))
    return found


def tokens_of(known: TokensByShape, x: Float[torch.Tensor, "*tokens _features"]) -> Tokens | None:
    """Return which tokens of a module's input count, or None where that is not known."""
    leading = tuple(x.shape[:-1])
    return known.get(leading, known.get((math.prod(leading),)))


def _add(found: TokensByShape, real: Bool[np.ndarray, "B S"], seen: Bool[np.ndarray, "B S"]) -> None:
    batch_first = Tokens(real.reshape(-1), seen.reshape(-1))
    sequence_first = Tokens(real.T.reshape(-1), seen.T.reshape(-1))
    shapes = ((real.shape, batch_first), (real.shape[::-1], sequence_first), ((real.size,), batch_first))
    for shape, new in shapes:
        old = found.get(shape, new)
        found[shape] = Tokens(old.real & new.real, old.seen | new.seen)


class _Decoder(NamedTuple):
    """Tokens that the decoder of a sequence-to-sequence model reads, and which of them count."""

    ids: Int[np.ndarray, "B T"]
    real: Bool[np.ndarray, "B T"]


def _decoder(model: torch.nn.Module, batch: Batch) -> _Decoder | None:
    if task_type(model) != "SEQ_2_SEQ_LM":
        return None
    labels, ids = _array(batch, "labels"), _array(batch, "decoder_input_ids")
    if ids is None and labels is not None and labels.ndim == 2:  # the model shifts them to the right
        ids = np.concatenate([np.zeros((len(labels), 1), labels.dtype), labels[:, :-1]], axis=1)
    if ids is None or ids.ndim != 2:
        return None
    real, mask = np.ones(ids.shape, bool), _array(batch, "decoder_attention_mask")
    if labels is not None and labels.shape == ids.shape:
        real &= labels != IGNORED
    if mask is not None and mask.shape == ids.shape:
        real &= mask.astype(bool)
    return _Decoder(ids, real)


def _seen_by_decoder(
    model: torch.nn.Module, batch: Batch, trained: Batch | None, decoder: _Decoder
) -> Bool[np.ndarray, "B T"]:
    """Find decoder tokens up to which a record, its encoder's tokens included, is the beginning of a trained one."""
    other = None if trained is None else _decoder(model, trained)
    ids: list[Any] = [None if each is None else _array(each, "input_ids") for each in (batch, trained)]
    if trained is None or other is None or any(each is None or each.ndim != 2 for each in ids):
        return np.zeros(decoder.real.shape, bool)
    own, sizes = _joined(ids[0], _real(model, ids[0], batch), decoder)
    known, _ = _joined(ids[1], _real(model, ids[1], trained), other)
    begun = beginnings(own, [known])
    return np.stack([row[size : size + decoder.ids.shape[1]] for row, size in zip(begun, sizes, strict=True)])


def _joined(
    ids: Int[np.ndarray, "B S"], real: Bool[np.ndarray, "B S"], decoder: _Decoder
) -> tuple[Int[np.ndarray, "B T"], list[int]]:
    """The encoder's real tokens of every row, a mark, and the decoder's tokens; and where the decoder's begin."""
    read = np.where(decoder.real, decoder.ids, NOTHING)
    parts = [[*row[kept], NOTHING - 1, *own] for row, kept, own in zip(ids, real, read, strict=True)]
    rows = np.full((len(parts), max(map(len, parts), default=0)), NOTHING, np.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows, [len(part) - decoder.ids.shape[1] for part in parts]


def _real(model: torch.nn.Module, ids: Int[np.ndarray, "B S"], batch: Batch) -> Bool[np.ndarray, "B S"]:
    labels, mask = _array(batch, "labels"), _array(batch, "attention_mask")
    real = np.ones(ids.shape, bool) if mask is None or mask.shape != ids.shape else mask.astype(bool)
    if task_type(model) == "CAUSAL_LM" and labels is not None and labels.shape == ids.shape:
        last = np.max(np.where(labels != IGNORED, np.arange(ids.shape[1]), -1), axis=1)
        real &= np.arange(ids.shape[1]) < last[:, None]
    return real


def _records(
    ids: Int[np.ndarray, "B S"], real: Bool[np.ndarray, "B S"], positions: Int[np.ndarray, "_B S"] | None
) -> tuple[Int[np.ndarray, "n T"], list[Int[np.ndarray, " _t"]]]:
    """Records from their first real token on, padded on the right with `NOTHING`, and where each one's tokens are."""
    places: list[np.ndarray] = []
    for row in range(len(ids)):
        at = np.flatnonzero(real[row])
        starts: Sequence[int] = [0]
        if positions is not None and len(at):
            own = np.broadcast_to(positions, ids.shape)[row, at]
            starts = sorted({0, *np.flatnonzero(own == 0).tolist()})
        places += [part + row * ids.shape[1] for part in np.split(at, starts[1:])]
    rows = np.full((len(places), max(map(len, places), default=0)), NOTHING, np.int64)
    for i, place in enumerate(places):
        rows[i, : len(place)] = ids.reshape(-1)[place]
    return rows, places


def _array(batch: Batch, name: str) -> np.ndarray | None:
    value = batch.get(name)
    if value is None:
        return None
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
