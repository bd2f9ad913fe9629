"""The first steps of a grid of adapters in real layers, their data held fixed: measured, and by the law.

grid, layers = StepGrid(ranks=(8, 32)), layer_data.read_layers("layers.npz")
crossings(grid, layers)
frames.of([row for cell in layer_cells(grid, layers) for row in layer_rows(grid, layers, cell)], COLUMNS)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rora_theory.inits import Init
from rora_theory.measure.layers import layer_rms
from rora_theory.measure.layers.layer_data import SPLITS, Layer
from rora_theory.optimizers import EPSILON
from rora_theory.random.draws import stream_key
from rora_theory.scaling import exponent
from rora_theory.stats.moments import agreement
from rora_theory.theory.grid import StepGrid, exponent_of
from rora_theory.validation.rules import name_of

COLUMNS = (
    "layer", "split", "tokens", "optimizer", "rule", "kappa", "init", "p_in", "p_out", "rank", "alpha", "scaling",
    "quantity", "estimate", "standard_error", "exact", "draws", "sampler",
)  # fmt: skip
CROSSINGS = "crossing_ranks.csv"
UNITS = {
    "rms": "root mean square of w_i over adapters, tokens and outputs; its error is that over adapters",
    "crossing_rank": "rank at which signal and cross-talk, summed over tokens, are equal; quartiles over tokens",
    "epsilon": EPSILON,
}

RELATIVE_ERROR = 0.01

GROUP = ["optimizer", "init", "split", "layer", "rule"]


@dataclass(frozen=True)
class LayerCell:
    """One stream of adapters: it serves every optimizer, rule and split."""

    layer: str
    init: Init
    rank: int

    def __str__(self) -> str:
        return f"{self.layer}, r = {self.rank}"


def layer_cells(grid: StepGrid, layers: Sequence[Layer]) -> list[LayerCell]:
    """Every stream, in the order of the table."""
    inits: tuple[Init, ...] = grid.inits or ("kaiming_uniform",)
    return [LayerCell(layer.name, init, rank) for layer in layers for init in inits for rank in grid.ranks]


def layer_rows(grid: StepGrid, layers: Sequence[Layer], cell: LayerCell) -> list[dict[str, Any]]:
    """Rms of w of each optimizer, rule and split, drawn to the asked precision, beside the law's."""
    (layer,) = (layer for layer in layers if layer.name == cell.layer)
    rules = {name_of(rule): (exponent(rule), gamma) for rule, gamma in grid.scalings(cell.rank)}
    named = [(optimizer, rule) for optimizer in grid.optimizers for rule in rules]
    steps = [(optimizer, rules[rule][1]) for optimizer, rule in named]
    figures, draws = layer_rms.measured_rms(
        layer,
        stream_key(grid.seed, f"{cell.layer} {cell.init} {cell.rank}"),
        rank=cell.rank,
        steps=steps,
        learning_rate=grid.lr,
        init=cell.init,
        relative_error=grid.relative_error or RELATIVE_ERROR,
        draws=grid.draws,
    )
    exact = [
        value
        for step in steps
        for value in layer_rms.exact_rms(layer, step, rank=cell.rank, learning_rate=grid.lr, init=cell.init)
    ]
    p_out, p_in = layer.grad.shape
    found: list[dict[str, Any]] = []
    for (optimizer, rule), split in ((pair, split) for pair in named for split in SPLITS):
        kappa, gamma = rules[rule]
        measured = figures[len(found)]
        found.append(
            {
                "layer": cell.layer,
                "split": split,
                "tokens": len(layer.inputs[split]),
                "optimizer": optimizer,
                "rule": rule,
                "kappa": kappa,
                "init": cell.init,
                "p_in": p_in,
                "p_out": p_out,
                "rank": cell.rank,
                "alpha": grid.alpha,
                "scaling": gamma,
                "quantity": "rms",
                "estimate": measured.value,
                "standard_error": measured.error,
                "exact": exact[len(found)],
                "draws": draws,
                "sampler": "direct",
            }
        )
    return found


def crossings(grid: StepGrid, layers: Sequence[Layer]) -> pd.DataFrame:
    """The crossing rank of every layer, split and optimizer, with its quartiles over tokens, by the law."""
    return pd.DataFrame(
        {"layer": layer.name, "split": split, "optimizer": optimizer}
        | layer_rms.crossing(layer, split, optimizer)._asdict()
        for layer in layers
        for split in layer.inputs
        for optimizer in grid.optimizers
    )


def layers_in_words(results: pd.DataFrame) -> str:
    """How far measurement and law agree."""
    found = agreement(*(results[name].tolist() for name in ("estimate", "standard_error", "exact")))
    return (
        f"On real layers measured and exact rms of w agree within {found.largest_gap:.2%} in {len(results)} figures "
        f"(largest |z| {found.largest_score:.2f}, rms z {found.rms_score:.2f})."
    )


def layer_exponents(results: pd.DataFrame, *, low: int, high: int) -> pd.DataFrame:
    """Log-log slopes of the rms against the rank, over the ranks from ``low`` to ``high``.

    Returns:
      a row an optimizer, init, split, layer and rule: ``low`` and ``high`` rank, ``slope`` with its ``standard_error``,
      and the law's under the same fit, ``exact``. Over all ranks where fewer than two are between; NaN where there is
      one.
    """
    ranks = sorted(set(results["rank"]))
    between = [rank for rank in ranks if low <= rank <= high]
    ranks = between if len(between) > 1 else ranks
    found = []
    for key, group in results[results["rank"].isin(ranks)].groupby(GROUP, sort=False):
        line = dict(zip(GROUP, key, strict=True)) | {"low": ranks[0], "high": ranks[-1]}
        found.append(line | exponent_of(group))
    return pd.DataFrame(found)
