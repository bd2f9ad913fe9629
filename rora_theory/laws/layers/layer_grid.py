"""First steps of a grid of adapters in real layers with fixed data, measured and predicted by the law.

grid, layers = StepGrid(ranks=(8, 32)), layer_data.read_layers("layers.npz")
crossings(grid, layers)
frames.from_rows([row for cell in layer_cells(grid, layers) for row in layer_rows(grid, layers, cell)], COLUMNS)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rora_theory.inits import Init
from rora_theory.laws.grid import StepGrid, exponent_table
from rora_theory.laws.layers import layer_rms
from rora_theory.laws.layers.layer_data import SPLITS, Layer
from rora_theory.laws.random.draws import stream_key
from rora_theory.optimizers import EPSILON
from rora_theory.scaling import exponent
from rora_theory.stats.moments import agreement
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
"""Default relative standard error at which the drawing of adapters stops."""

GROUP = ["optimizer", "init", "split", "layer", "rule"]
"""Columns that identify a slope against the rank."""


@dataclass(frozen=True)
class LayerCell:
    """Stream of adapters of one layer, initialisation and rank, which all optimizers, rules and splits share."""

    layer: str
    init: Init
    rank: int

    def __str__(self) -> str:
        return f"{self.layer}, r = {self.rank}"


def layer_cells(grid: StepGrid, layers: Sequence[Layer]) -> list[LayerCell]:
    """Return all streams of adapters in the order of the table."""
    inits: tuple[Init, ...] = grid.inits or ("kaiming_uniform",)
    return [LayerCell(layer.name, init, rank) for layer in layers for init in inits for rank in grid.ranks]


def layer_rows(grid: StepGrid, layers: Sequence[Layer], cell: LayerCell) -> list[dict[str, Any]]:
    """Measure and predict the rms of w for each optimizer, rule and split.

    Adapters are drawn until the precision that the grid requests is reached.

    Args:
      grid: Settings of the adapters.
      layers: Layers, one of which the cell names.
      cell: Stream of adapters.

    Returns:
      A row with the columns `COLUMNS` for each optimizer, rule and split.
    """
    (layer,) = (layer for layer in layers if layer.name == cell.layer)
    # A step for every optimizer and rule, all from the same draws of A.
    rules = {name_of(rule): (exponent(rule), gamma) for rule, gamma in grid.scalings(cell.rank)}
    pairs = [(optimizer, rule) for optimizer in grid.optimizers for rule in rules]
    steps = [(optimizer, rules[rule][1]) for optimizer, rule in pairs]
    # Measured from drawn adapters, and predicted by the law, both in the order of the steps and splits.
    measured, draws = layer_rms.measured_rms(
        layer,
        stream_key(grid.seed, f"{cell.layer} {cell.init} {cell.rank}"),
        rank=cell.rank,
        steps=steps,
        learning_rate=grid.lr,
        init=cell.init,
        relative_error=grid.relative_error or RELATIVE_ERROR,
        draws=grid.draws,
    )
    exact: list[float] = []
    for step in steps:
        exact += layer_rms.exact_rms(layer, step, rank=cell.rank, learning_rate=grid.lr, init=cell.init)
    p_out, p_in = layer.grad.shape
    # One row for each step and split, in the order of the measured and predicted values.
    rows: list[dict[str, Any]] = []
    labels = itertools.product(pairs, SPLITS)
    for ((optimizer, rule), split), rms, exact_rms in zip(labels, measured, exact, strict=True):
        kappa, gamma = rules[rule]
        rows.append(
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
                "estimate": rms.value,
                "standard_error": rms.error,
                "exact": exact_rms,
                "draws": draws,
                "sampler": "direct",
            }
        )
    return rows


def crossings(grid: StepGrid, layers: Sequence[Layer]) -> pd.DataFrame:
    """Compute the crossing rank of every layer, split and optimizer, with its quartiles over tokens."""
    return pd.DataFrame(
        {"layer": layer.name, "split": split, "optimizer": optimizer}
        | layer_rms.crossing(layer, split, optimizer)._asdict()
        for layer in layers
        for split in layer.inputs
        for optimizer in grid.optimizers
    )


def describe_agreement(results: pd.DataFrame) -> str:
    """Return a sentence that states how closely measurement and law agree."""
    fit = agreement(*(results[name].tolist() for name in ("estimate", "standard_error", "exact")))
    return (
        f"On real layers measured and exact rms of w agree within {fit.largest_gap:.2%} in {len(results)} figures "
        f"(largest |z| {fit.largest_score:.2f}, rms z {fit.rms_score:.2f})."
    )


def layer_exponents(results: pd.DataFrame, *, low: int, high: int) -> pd.DataFrame:
    """Fit log-log slopes of the rms against the rank, over the ranks from ``low`` to ``high``.

    All ranks are used if fewer than two lie in the range. The slope is NaN if there is only one rank.

    Args:
      results: Rows of `layer_rows`.
      low: Lowest rank of the fit.
      high: Highest rank of the fit.

    Returns:
      A row for each optimizer, initialisation, split, layer and rule: the ``low`` and ``high`` rank, the ``slope`` with
      its ``standard_error``, and the slope ``exact`` that the same fit gives for the law.
    """
    ranks = sorted(set(results["rank"]))
    in_range = [rank for rank in ranks if low <= rank <= high]
    ranks = in_range if len(in_range) > 1 else ranks
    return exponent_table(results, GROUP, [ranks])
