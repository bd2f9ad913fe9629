"""What a coordinate check reads, of several ranks and seeds: slopes against the rank, and what they say.

The sizes are measured by `rora_theory.measure.rank_check.coordinates` and `rora_theory.measure.torch.check`.
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
"""The batch that was stepped on last, or one that never is."""

BATCH_SPLITS: tuple[BatchSplit, ...] = get_args(BatchSplit)

MODEL = "model"
"""Where a module is named, stands for the whole model."""

WHOLE = ((MODEL, "hidden"), (MODEL, "logits"))
"""What the verdict on a rule is on: modules lose cross-talk with the rank, and it does not add up over them."""

GROWING = ("output", "delta", "hidden", "logits")
"""Quantities that carry gamma to the power of the first step at first."""


class Coordinate(NamedTuple):
    """What is read, where and when.

    Attributes:
      quantity: of a module, over its adapted layers and the split's tokens: ``output``, root mean square of
        gamma B A x at the inputs x of the adapted model; ``inner``, of A x; ``delta``, |gamma B A|_F, root mean square
        over layers; ``grad_A``, ``grad_B``, Frobenius norms over layers together of the gradient that made the last
        step. Of the model: ``hidden``, ``logits``, root mean square of their change from the base model's; ``loss``,
        mean cross-entropy of the split's targets.
      split: ``train``, the batch of the last step, or ``held_out``. ``delta`` and gradients are under ``train``.
      module: a name of `rora_theory.llama.MODULES`, or ``model``.
      step: updates made.
    """

    quantity: str
    split: str
    module: str
    step: int


@dataclass(frozen=True)
class Table:
    """Coordinates of several ranks and seeds.

    Attributes:
      ranks: ascending.
      values: [seeds, ranks] of each coordinate.
    """

    ranks: tuple[int, ...]
    values: Mapping[Coordinate, Float[np.ndarray, "seeds ranks"]]

    def slope(self, quantity: str, *, split: str, step: int, module: str = MODEL) -> SeedFit:
        """Log-log slope against the rank, see `slopes.seed_fit`.

        Raises:
          InputError: no such coordinate, or a value that is not finite and above 0.
        """
        coordinate = Coordinate(quantity, split, module, step)
        if coordinate not in self.values:
            raise InputError(f"there is no {coordinate}; accepted are {', '.join(map(str, list(self.values)[:3]))} ...")
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
        """Pass where the slope is shown to lie within ``band`` of zero, see `slopes.assert_flat`."""
        self.slope(quantity, split=split, step=step, module=module)
        what = f"{quantity} of {module} on {split} at step {step}"
        y = self.values[Coordinate(quantity, split, module, step)]
        return slopes.assert_flat(self.ranks, y, band=band, confidence=confidence, what=what)

    def lines(self, *, band: float = BAND, kappa: float | None = None, power: int = 1) -> list[dict[str, Any]]:
        """The slope of every coordinate but the loss, and its verdict; without what did not move at all.

        What moved at some ranks or seeds and not at others has no slope: it is undecided.

        Args:
          band: largest absolute slope to call flat.
          kappa, power: exponent of the rule and power of gamma in the first step, which tell the exponent that would
            have been flat, ``kappa_flat``, of the quantities `GROWING`; None does not.
        """
        found = []
        for coordinate, value in self.values.items():
            if coordinate.quantity == "loss":
                continue
            line: dict[str, Any] = coordinate._asdict()
            if not value.any():
                continue  # the first gradient of A is zero
            if not (np.isfinite(value).all() and (value > 0).all()):
                verdict = "undecided" if np.isfinite(value).all() else "diverged"
                found.append(line | {"seeds": len(value), "verdict": verdict})
                continue
            fit = slopes.seed_fit(self.ranks, value)
            line |= {"slope": fit.slope, "standard_error": fit.standard_error}
            line |= {"half_width": fit.half_width(), "seeds": fit.seeds}
            line |= {"verdict": slopes.trend(fit, band)}
            if kappa is not None and coordinate.quantity in GROWING:
                line |= {"kappa_flat": kappa + fit.slope / power}
            found.append(line)
        return found


def whole_model(lines: Sequence[Mapping[Any, Any]]) -> str:
    """One verdict on the final hidden states and the logits, of the lines of one `Table`."""
    return in_a_word([line["verdict"] for line in lines if (line["module"], line["quantity"]) in WHOLE])


def in_a_word(verdicts: Sequence[str]) -> str:
    """One verdict on several slopes: theirs where they agree, else which of them were found."""
    found = list(dict.fromkeys(verdicts))
    if len(found) == 1:
        return f"{found[0]} with the rank" if found[0] in ("grows", "shrinks") else found[0]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in found)
    return f"mixed ({counts})" if found else "nothing moved"
