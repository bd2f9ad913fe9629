"""Sizes that a coordinate check measures, with slopes against the rank and verdicts.

`rora_theory.measure.rank_check.check` measures the sizes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory.stats import slopes
from rora_theory.stats.slopes import BAND

BatchSplit = Literal["train", "held_out"]
"""Batch at which a size is measured: the training batch of the last step, or a held-out batch."""

BATCH_SPLITS: tuple[BatchSplit, ...] = get_args(BatchSplit)

MODEL = "model"
"""Module name that stands for the whole model."""

MODEL_QUANTITIES = ((MODEL, "hidden"), (MODEL, "logits"))
"""Module and quantity pairs on which the verdict on a rule rests.

Single modules are not used: their cross-talk shrinks with the rank, but averages out over modules.
"""

SCALED_QUANTITIES = ("output", "hidden", "logits")
"""Quantities whose size after the first step is proportional to the first step's power of gamma."""


class Coordinate(NamedTuple):
    """Quantity that is measured, with the place and step at which it is measured.

    Attributes:
      quantity: Name of the quantity. Of modules: ``output``, the root mean square of gamma B A x over the layers and
        the split's tokens, at the inputs x of the adapted model. Of the model: ``hidden`` and ``logits``, the root mean
        square of their change since the base model; ``loss``, the loss.
      split: ``train`` for the batch of the last step, or ``held_out``.
      module: Name that modules share, such as ``q_proj``, or ``model``.
      step: Number of updates.
    """

    quantity: str
    split: str
    module: str
    step: int


def values_by_coordinate(
    sizes: pd.DataFrame, *, ranks: Sequence[int], seeds: Sequence[int]
) -> dict[Coordinate, Float[np.ndarray, "seeds ranks"]]:
    """Return the sizes of each coordinate as an array; NaN marks what was not measured.

    Args:
      sizes: Frame with the fields of `Coordinate` and the columns rank, seed and value.
      ranks: Ranks in ascending order.
      seeds: Seeds.
    """
    values = {}
    for names, group in sizes.groupby(list(Coordinate._fields), sort=False):
        by_seed = group.pivot(index="seed", columns="rank", values="value")
        values[Coordinate._make(names)] = by_seed.reindex(index=seeds, columns=ranks).to_numpy(np.float64)
    return values


def slope_rows(
    ranks: Sequence[int],
    values: Mapping[Coordinate, Float[np.ndarray, "seeds ranks"]],
    *,
    band: float = BAND,
    kappa: float | None = None,
    power: int = 1,
) -> list[dict[str, Any]]:
    """Return a row with the slope and verdict of every coordinate except the loss.

    Coordinates that are zero everywhere are left out. Coordinates that are zero at some ranks or seeds have no slope;
    their verdict is ``"undecided"``.

    Args:
      ranks: Ranks in ascending order.
      values: Sizes of each coordinate.
      band: Largest absolute slope that counts as flat.
      kappa: Exponent of the rule, from which to compute ``kappa_flat``, the exponent at which the quantities
        `SCALED_QUANTITIES` would have been flat; None does not compute it.
      power: Power of gamma in the first step.
    """
    rows = []
    for coordinate, value in values.items():
        # Skip what is zero everywhere.
        if coordinate.quantity == "loss" or not value.any():
            continue
        row: dict[str, Any] = coordinate._asdict()
        # A logarithm exists only if every size is finite and positive.
        if not (np.isfinite(value).all() and (value > 0).all()):
            verdict = "undecided" if np.isfinite(value).all() else "diverged"
            rows.append(row | {"seeds": len(value), "verdict": verdict})
            continue
        fit = slopes.seed_fit(ranks, value)
        row |= fit.row(band)
        # gamma ~ r^-kappa enters as gamma^power, so that kappa + slope / power would have been flat.
        if kappa is not None and coordinate.quantity in SCALED_QUANTITIES:
            row |= {"kappa_flat": kappa + fit.value / power}
        rows.append(row)
    return rows


def rows_of_model(rows: Iterable[Mapping[Any, Any]]) -> list[Mapping[Any, Any]]:
    """Return the rows of `slope_rows` on the final hidden states and the logits."""
    return [row for row in rows if (row["module"], row["quantity"]) in MODEL_QUANTITIES]


def judge_model(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Summarise the verdicts on the final hidden states and the logits in `slope_rows`."""
    return summarise_verdicts([row["verdict"] for row in rows_of_model(rows)])


def summarise_verdicts(verdicts: Sequence[str]) -> str:
    """Return the common verdict of several slopes, or the number of each verdict if they differ."""
    distinct = list(dict.fromkeys(verdicts))
    if len(distinct) == 1:
        return f"{distinct[0]} with the rank" if distinct[0] in ("grows", "shrinks") else distinct[0]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in distinct)
    return f"mixed ({counts})" if distinct else "nothing moved"
