"""Which tokens of a batch count: not padding, not what has no target, and of a held-out batch what was not seen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

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
    """Of all tokens that a module may be run on, in their order, which are real, and which were seen in training."""

    real: Bool[np.ndarray, " tokens"]
    seen: Bool[np.ndarray, " tokens"]


def moved(batch: Batch, model: torch.nn.Module) -> dict[str, Any]:
    """The batch on the device on which the model begins."""
    device = getattr(model, "device", None) or next((each.device for each in model.parameters()), torch.device("cpu"))
    if device.type == "meta":  # weights that are loaded when they are needed
        return dict(batch)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def tokens(model: torch.nn.Module, batch: Batch, trained: Batch | None = None) -> dict[int, Tokens]:
    """`Tokens` of each size that a module's input may have; of other sizes nothing is known, as of an expert's.

    Real is what ``attention_mask`` says; in a causal model that is given labels, up to a row's last token with a
    target. Seen are tokens up to which a record is the beginning of a trained one. A record begins with its row, and
    where ``position_ids`` begin again. Those of an encoder see what follows too, and are left out all the same.

    Args:
      model: tells a causal model from others.
      batch: as transformers takes it: ``input_ids``, ``attention_mask``, ``labels``, ``position_ids``.
      trained: the batch that gives the gradient, with respect to which tokens were seen; None: none were.
    """
    found: dict[int, Tokens] = {}
    ids, labels = _array(batch, "input_ids"), _array(batch, "labels")
    if ids is not None and ids.ndim == 2:
        real = _real(model, ids, batch)
        seen = np.zeros(ids.shape, bool)
        if trained is not None and (other := _array(trained, "input_ids")) is not None:
            rows, places = _records(ids, real, _array(batch, "position_ids"))
            known, _ = _records(other, _real(model, other, trained), _array(trained, "position_ids"))
            for row, place, begun in zip(rows, places, beginnings(rows, [known]), strict=True):
                seen.reshape(-1)[place] = begun[row != NOTHING]
        found[ids.size] = Tokens(real.reshape(-1), seen.reshape(-1))
    if task_type(model) == "SEQ_2_SEQ_LM" and labels is not None:
        own = (labels != IGNORED).reshape(-1)
        if own.size in found:  # encoder's and decoder's tokens can't be told apart
            found[own.size] = found[own.size]._replace(real=found[own.size].real | own)
        else:
            found[own.size] = Tokens(own, np.zeros(own.shape, bool))
    return found


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
