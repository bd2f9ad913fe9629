"""B part and A part of the change in the runs of a grid of horizons, and the rate that preserves the change."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.lab.sweep.change_parts import PARTS, preserving_exponent, preserving_factor
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.laws import constant_gradient
from rora_theory.optimizers import Schedule, schedule_factor
from rora_theory.runs import frames

QUANTILES = (0.05, 0.5, 0.95)
"""Quantiles over a model's modules of quantities such as the crossing distance."""

GRID_STEP = 1 / 4
"""Distance between adjacent learning rates of the grid, in decades."""


def part_table(
    runs: Sequence[SweepRun], *, crossing_distances: Sequence[float], warmup: int, schedule: Schedule = "constant"
) -> pd.DataFrame:
    """Tabulate the B part and the A part of the change at every reading where they were measured.

    Args:
      runs: Runs of the grid.
      crossing_distances: Crossing distances of the model's modules; if empty, the table has no column ``law_ratio``.
      warmup: Number of steps of linear warm-up.
      schedule: Schedule of the learning rate after the warm-up.

    Returns:
      A row for each reading after which a B has moved: ``rank``, ``gain``, ``learning_rate``, ``seed`` and ``step``;
      the median and the quantiles 5% and 95% over modules of ``ratio``, the rms of the A part over that of the B part,
      and of ``exponent`` (`change_parts.preserving_exponent`); ``change``, the root mean square over modules of the
      change of their outputs; and ``law_ratio``, the ratio that the law predicts for the median crossing distance at a
      constant gradient.
    """
    rows: list[dict[str, Any]] = []
    crossing_distance = float(np.median(crossing_distances)) if crossing_distances else None
    for run in runs:
        for reading in run.read.readings:
            if reading.parts is None:
                continue
            # Root mean squares, by module, of the B part, the A part and the whole change.
            b, a, w = (np.asarray(reading.parts[name]) for name in PARTS)
            # A module whose B has not moved has no ratio.
            moved = b > 0
            if not moved.any():
                continue
            row: dict[str, Any] = {"rank": run.rank, "gain": run.gain, "learning_rate": run.rate}
            row |= {"seed": run.seed, "step": reading.step}
            ratios, exponents = a[moved] / b[moved], preserving_exponent(b[moved], a[moved], w[moved])
            for name, values in (("ratio", ratios), ("exponent", exponents)):
                low, middle, high = np.quantile(values, QUANTILES).tolist()
                row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
            row["change"] = float(np.sqrt(np.mean(w**2)))
            # The law's ratio at a constant gradient is the distance that A moves over the crossing distance.
            if crossing_distance is not None:
                factors = schedule_factor(schedule, np.arange(reading.step), steps=reading.step, warmup=warmup)
                law = constant_gradient.distances(run.rate * factors, crossing_distance=crossing_distance)
                row["law_ratio"] = law.A / crossing_distance
            rows.append(row)
    return pd.DataFrame(rows)


def change_at_best(best: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """Interpolate the size of the change at each best rate.

    Equal sizes support the law that the best rate is the one that preserves the change.

    Args:
      best: `curves.best_rate_table` of every step.
      parts: `part_table`.

    Returns:
      A row for each best rate: ``step``, ``rank``, ``gain`` and ``best_rate``; ``change``, interpolated linearly in
      logs between the two nearest rates, the mean of the logs over ``seeds``; ``log2_error``, the standard error of the
      best rate times the absolute slope of that line; and ``edge`` of the best rate, for which there is no error. Seeds
      must have a change at every gain of the rank. Best rates without such a seed, or outside the rates at which
      the change was measured, have no row.
    """
    # log2 of the change at the best rate, and its slope in log2 of the rate: by step and rank, by gain, by seed.
    changes: dict[tuple[int, int], dict[float, dict[int, tuple[float, float]]]] = {}
    rows = frames.rows(best[best["rank"].notna()]) if len(parts) else []
    for row in rows:
        setting = parts[(parts["rank"] == row["rank"]) & np.isclose(parts["gain"], row["gain"])]
        for seed, readings in setting[setting["step"] == row["step"]].groupby("seed"):
            by_rate = readings.sort_values("learning_rate")
            x, y = (np.log2(by_rate[name].to_numpy()) for name in ("learning_rate", "change"))
            # Rounding can move a best rate at the end of the grid slightly beyond it.
            log_rate = math.log2(row["best_rate"])
            if len(x) > 1 and x[0] - 1e-4 <= log_rate <= x[-1] + 1e-4:
                # Line through the readings on both sides of the best rate, or the last two at an end.
                right = min(max(int(np.searchsorted(x, log_rate)), 1), len(x) - 1)
                slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
                by_seed = changes.setdefault((row["step"], row["rank"]), {}).setdefault(row["gain"], {})
                by_seed[int(seed)] = (y[right] + (log_rate - x[right]) * slope, slope)
    # Mean over the seeds that all gains of the rank share.
    table: list[dict[str, Any]] = []
    for row in rows:
        measured = changes.get((row["step"], row["rank"]), {})
        seeds = set.intersection(*map(set, measured.values())) if row["gain"] in measured else set()
        if seeds:
            # The error of the best rate becomes one of the change through the slope of the line.
            log_change, slope = np.mean([measured[row["gain"]][seed] for seed in sorted(seeds)], axis=0)
            error = row["log2_error"]
            table.append(
                {"step": int(row["step"]), "rank": int(row["rank"])}
                | {name: row[name] for name in ("gain", "best_rate")}
                | {"change": float(2**log_change)}
                | {"log2_error": None if error is None else abs(float(slope)) * error, "seeds": len(seeds)}
                | {"edge": row["edge"]}
            )
    return pd.DataFrame(table)


def exponent_of_parts(
    runs: Sequence[SweepRun],
    step: int,
    *,
    rank: int,
    gains: tuple[float, float],
    rate: float,
    seeds: Sequence[int],
) -> list[float]:
    """Compute, for each seed, the exponent of gamma r by which the rate preserves the change of all modules.

    The exponent comes from the measured parts of runs at the first gain (`change_parts.preserving_factor`). It is
    interpolated linearly in the log of the rate between two runs that are at most a grid step (a quarter decade) apart,
    or taken from a run within half a step. Seeds without such a run have no exponent.

    Args:
      runs: Runs of the grid.
      step: Number of steps.
      rank: Rank of the runs.
      gains: G = gamma r of the runs, and the other gain.
      rate: Best rate at the first gain.
      seeds: Seeds to include.

    Returns:
      The exponents of the seeds that have one, in ascending order of the seed.
    """
    growth = gains[1] / gains[0]
    # Exponents by seed and log10 of the run's rate over the best rate.
    exponents: dict[int, dict[float, float]] = {}
    for run in runs:
        parts = next((reading.parts for reading in run.read.readings if reading.step == step), None)
        if parts is None or run.gain is None or run.rank != rank or run.seed not in seeds:
            continue
        if math.isclose(run.gain, gains[0], rel_tol=1e-6):
            factor = preserving_factor(growth, *(np.asarray(parts[name]) for name in PARTS))
            if math.isnan(factor):
                continue
            exponents.setdefault(run.seed, {})[math.log10(run.rate / rate)] = math.log(factor) / math.log(growth)
    by_seed = []
    # Interpolate to the best rate, at distance 0, or use a run close enough to it.
    for seed in sorted(exponents):
        distances, values = zip(*sorted(exponents[seed].items()), strict=True)
        right = int(np.searchsorted(distances, 0.0))
        nearest = min(distances, key=abs)
        if 0 < right < len(distances) and distances[right] - distances[right - 1] <= GRID_STEP + 1e-3:
            by_seed.append(float(np.interp(0.0, distances, values)))
        elif abs(nearest) <= GRID_STEP / 2 + 1e-3:
            by_seed.append(exponents[seed][nearest])
    return by_seed
