"""Ratio of the A part to the B part of the change in the runs of a matrix, and the displacement constant from it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.lab.sweep.change_parts import PARTS
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.runs import frames

QUANTILES = (0.05, 0.5, 0.95)
"""Quantiles over a model's modules of quantities such as the crossing distance."""

GRID_STEP = 1 / 4
"""Distance between adjacent learning rates of the grid, in decades."""


def part_table(runs: Sequence[SweepRun]) -> pd.DataFrame:
    """Tabulate the ratio of the A part to the B part of the change at every reading where they were measured.

    Returns:
      A row for each reading after which a B has moved: ``rank``, ``gain``, ``learning_rate``, ``seed`` and ``step``,
      and the median and the quantiles 5% and 95% over modules of ``ratio``, the rms of the A part over that of the B
      part.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        for reading in run.read.readings:
            if reading.parts is None:
                continue
            b, a = (np.asarray(reading.parts[name]) for name in PARTS[:2])
            # A module whose B has not moved has no ratio.
            moved = b > 0
            if moved.any():
                low, middle, high = np.quantile(a[moved] / b[moved], QUANTILES).tolist()
                row = {"rank": run.rank, "gain": run.gain, "learning_rate": run.rate, "seed": run.seed}
                rows.append(row | {"step": reading.step, "ratio": middle, "ratio_low": low, "ratio_high": high})
    return pd.DataFrame(rows)


def constants_by_steps(parts: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Compute the displacement constant K of every condition from runs at or below its best rate.

    Args:
      parts: `part_tables.part_table`.
      best: `curves.best_rate_table` of every step.

    Returns:
      A row for each ``step``, ``rank`` and ``gain``: ``constant``, the mean of K over runs, its smallest
      and largest value ``constant_low`` and ``constant_high``, and ``runs``, how many there are. A run belongs to it if
      its learning rate is at most half a grid step of a quarter decade above the best rate.
    """
    rows: list[dict[str, Any]] = []
    optima = {
        (row["step"], row["rank"], round(row["gain"], 6)): row["best_rate"]
        for row in frames.rows(best[best["rank"].notna()])
    }
    for (step, rank, gain), runs in parts.groupby(["step", "rank", "gain"]) if len(parts) else ():
        # Runs up to the best rate, with half a grid step of slack because it lies between the rates of the grid.
        optimum = optima.get((step, rank, round(gain, 6)))
        near_best = runs[runs["learning_rate"] <= (optimum or 0.0) * 10 ** (GRID_STEP / 2)]
        if len(near_best):
            # K = G rho (1 + rho), with the measured ratio rho of the A part to the B part.
            values = gain * near_best["ratio"] * (1 + near_best["ratio"])
            rows.append(
                {"step": int(step), "rank": int(rank), "gain": float(gain)}
                | {"constant": float(values.mean())}
                | {"constant_low": float(values.min()), "constant_high": float(values.max()), "runs": len(near_best)}
            )
    columns = ["step", "rank", "gain", "constant", "constant_low", "constant_high", "runs"]
    return frames.from_rows(rows, columns)
