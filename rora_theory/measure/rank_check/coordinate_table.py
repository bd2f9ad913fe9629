"""Table of the sizes that a coordinate check measures, with slopes against the rank and verdicts.

`rora_theory.measure.rank_check.check` measures the sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.stats import slopes
from rora_theory.stats.estimate import CONFIDENCE
from rora_theory.stats.slopes import BAND, SeedFit

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


@dataclass(frozen=True)
class Table:
    """Sizes of coordinates at several ranks and seeds.

    Attributes:
      ranks: Ranks in ascending order.
      values: Sizes of each coordinate, an array [seeds, ranks].
    """

    ranks: tuple[int, ...]
    values: Mapping[Coordinate, Float[np.ndarray, "seeds ranks"]]

    def slope(self, quantity: str, *, split: str, step: int, module: str = MODEL) -> SeedFit:
        """Fit the log-log slope of a coordinate against the rank, see `slopes.seed_fit`.

        Args:
          quantity: Name of the quantity, see `Coordinate`.
          split: Batch at which it is measured.
          step: Number of updates.
          module: Name of the module, or ``model``.

        Returns:
          The slope with its error over seeds.

        Raises:
          InputError: If the table has no such coordinate, or if a size is not finite and positive.
        """
        coordinate = Coordinate(quantity, split, module, step)
        if coordinate not in self.values:
            examples = ", ".join(map(str, list(self.values)[:3]))
            raise InputError(f"the table has no {coordinate}; it has {examples} ...")
        return slopes.seed_fit(self.ranks, self.values[coordinate])

    def assert_flat(
        self,
        quantity: str = "output",
        *,
        split: str,
        step: int,
        module: str = MODEL,
        band: float = BAND,
        confidence: float = CONFIDENCE,
    ) -> SeedFit:
        """Assert that a slope lies within ``band`` of zero, see `slopes.assert_flat`.

        Args:
          quantity: Name of the quantity, see `Coordinate`.
          split: Batch at which it is measured.
          step: Number of updates.
          module: Name of the module, or ``model``.
          band: Largest absolute slope that counts as flat.
          confidence: Level of the two-sided interval that must lie within the band.

        Returns:
          The fit.

        Raises:
          AssertionError: If the trend is not flat.
          InputError: If the table has no such coordinate, or if a size is not finite and positive.
        """
        # Raises `InputError` if the table has no such coordinate.
        self.slope(quantity, split=split, step=step, module=module)
        label = f"{quantity} of {module} on {split} at step {step}"
        sizes = self.values[Coordinate(quantity, split, module, step)]
        return slopes.assert_flat(self.ranks, sizes, band=band, confidence=confidence, label=label)

    def slope_rows(self, *, band: float = BAND, kappa: float | None = None, power: int = 1) -> list[dict[str, Any]]:
        """Return a row with the slope and verdict of every coordinate except the loss.

        Coordinates that are zero everywhere are left out. Coordinates that are zero at some ranks or seeds have no
        slope; their verdict is ``"undecided"``.

        Args:
          band: Largest absolute slope that counts as flat.
          kappa: Exponent of the rule, from which to compute ``kappa_flat``, the exponent at which the quantities
            `SCALED_QUANTITIES` would have been flat; None does not compute it.
          power: Power of gamma in the first step.
        """
        rows = []
        for coordinate, value in self.values.items():
            if coordinate.quantity == "loss":
                continue
            row: dict[str, Any] = coordinate._asdict()
            # Skip what is zero everywhere.
            if not value.any():
                continue
            # A logarithm exists only if every size is finite and positive.
            if not (np.isfinite(value).all() and (value > 0).all()):
                verdict = "undecided" if np.isfinite(value).all() else "diverged"
                rows.append(row | {"seeds": len(value), "verdict": verdict})
                continue
            fit = slopes.seed_fit(self.ranks, value)
            row |= {"slope": fit.slope, "standard_error": fit.standard_error}
            row |= {"half_width": fit.half_width(), "seeds": fit.seeds}
            row |= {"verdict": slopes.trend(fit, band)}
            # gamma ~ r^-kappa enters as gamma^power, so that kappa + slope / power would have been flat.
            if kappa is not None and coordinate.quantity in SCALED_QUANTITIES:
                row |= {"kappa_flat": kappa + fit.slope / power}
            rows.append(row)
        return rows


def judge_model(rows: Sequence[Mapping[Any, Any]]) -> str:
    """Summarise the verdicts on the final hidden states and the logits in the rows of one `Table`."""
    return summarise_verdicts([row["verdict"] for row in rows if (row["module"], row["quantity"]) in MODEL_QUANTITIES])


def summarise_verdicts(verdicts: Sequence[str]) -> str:
    """Return the common verdict of several slopes, or the number of each verdict if they differ."""
    distinct = list(dict.fromkeys(verdicts))
    if len(distinct) == 1:
        return f"{distinct[0]} with the rank" if distinct[0] in ("grows", "shrinks") else distinct[0]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in distinct)
    return f"mixed ({counts})" if distinct else "nothing moved"
