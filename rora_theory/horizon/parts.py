"""The parts of the change in runs of a grid of horizons: which one leads, and which rate keeps the change."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.horizon.grid import warmed_up
from rora_theory.horizon.runs import HorizonRun
from rora_theory.io import frames
from rora_theory.measure.led import PARTS, keeping_exponent, keeping_factor
from rora_theory.theory import horizon

QUANTILES = (0.05, 0.5, 0.95)
"""Over a model's modules, of what each has its own, such as the distance at which A takes over."""


def led_table(runs: Sequence[HorizonRun], *, takeovers: Sequence[float], warmup: int) -> pd.DataFrame:
    """Which part of the change leads in every run and reading where this was measured, beside the law.

    Args:
      runs: of the grid.
      takeovers, warmup: see `horizon_law.predictions`; no takeovers leave the law's column out.

    Returns:
      ``rank``, ``strength``, ``learning_rate``, ``seed``, ``step``; over the modules the median and the 5% and 95%
      quantiles of ``ratio``, A-led over B-led rms, and of ``exponent``, see `measure.led.keeping_exponent`;
      ``change``, the root of the mean square over modules of their outputs' change; ``law_ratio``, of the median
      takeover at a constant gradient.
    """
    rows: list[dict[str, Any]] = []
    takeover = float(np.median(takeovers)) if takeovers else None
    for run in runs:
        for one in run.read.readings:
            if one.parts is None:
                continue
            b, a, w = (np.asarray(one.parts[name]) for name in PARTS)
            row: dict[str, Any] = {"rank": run.rank, "strength": run.strength, "learning_rate": run.rate}
            row |= {"seed": run.seed, "step": one.step}
            for name, values in (("ratio", a / b), ("exponent", keeping_exponent(b, a, w))):
                low, middle, high = np.quantile(values, QUANTILES).tolist()
                row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
            row["change"] = float(np.sqrt(np.mean(w**2)))
            if takeover is not None:
                rates = [run.rate * factor for factor in warmed_up(one.step, warmup)]
                row["law_ratio"] = horizon.distances(rates, takeover=takeover).A / takeover
            rows.append(row)
    return pd.DataFrame(rows)


def change_at_best(best: pd.DataFrame, led: pd.DataFrame) -> pd.DataFrame:
    """The size of the change at each best rate: equal ones bear out that the best rate is the one that keeps it.

    Args:
      best: of `horizon_curves.bests`, at every step.
      led: of `led_table`.

    Returns:
      ``step``, ``rank``, ``strength``, ``best_rate``; ``change`` there, between the two nearest rates along a line in
      logs, the mean of the logs over ``seeds``; ``log2_error``, a standard error: that of the best rate times the slope
      of that line; ``edge``, of the best rate: where it is at the grid's end there is no error. The seeds are those of
      which it was measured at every strength of the rank. No row without such a seed, and none where the best rate lies
      outside the rates at which the change was measured.
    """
    found: dict[tuple[int, int], dict[float, dict[int, tuple[float, float]]]] = {}
    rows = frames.rows(best[best["rank"].notna()]) if len(led) else []
    for row in rows:
        own = led[(led["rank"] == row["rank"]) & np.isclose(led["strength"], row["strength"])]
        for seed, one in own[own["step"] == row["step"]].groupby("seed"):
            x, y = (np.log2(one.sort_values("learning_rate")[name].to_numpy()) for name in ("learning_rate", "change"))
            at = math.log2(row["best_rate"])  # by rounding, at the end of the grid it may lie a little beyond
            if len(x) > 1 and x[0] - 1e-4 <= at <= x[-1] + 1e-4:
                right = min(max(int(np.searchsorted(x, at)), 1), len(x) - 1)
                slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
                by_seed = found.setdefault((row["step"], row["rank"]), {}).setdefault(row["strength"], {})
                by_seed[int(seed)] = (y[right] + (at - x[right]) * slope, slope)
    table: list[dict[str, Any]] = []
    for row in rows:
        measured = found.get((row["step"], row["rank"]), {})
        seeds = set.intersection(*map(set, measured.values())) if row["strength"] in measured else set()
        if seeds:
            logs, slopes = np.mean([measured[row["strength"]][seed] for seed in sorted(seeds)], axis=0)
            error = row["log2_error"]
            table.append(
                {"step": int(row["step"]), "rank": int(row["rank"])}
                | {name: row[name] for name in ("strength", "best_rate")}
                | {"change": float(2**logs)}
                | {"log2_error": None if error is None else float(slopes) * error, "seeds": len(seeds)}
                | {"edge": row["edge"]}
            )
    return pd.DataFrame(table)


def exponent_of_parts(
    runs: Sequence[HorizonRun],
    step: int,
    *,
    rank: int,
    strengths: tuple[float, float],
    rate: float,
    seeds: Sequence[int],
) -> list[float]:
    """The exponent of the rate in gamma r that keeps the change of all modules together, by the parts that were
    measured in runs at the first strength (`measure.led.keeping_factor`), a seed each: along a line in the log of the
    rate between the two runs beside it, no further apart than a grid step, or of the one within half a step, an eighth
    of a decade. None of a seed without such a run; a run whose parts tell no factor is none.

    Args:
      runs: of the grid.
      step: the horizon.
      rank: of the runs.
      strengths: gamma r of the runs, and the other.
      rate: the best one at the first.
      seeds: whose runs.
    """
    grows = strengths[1] / strengths[0]
    measured: dict[int, dict[float, float]] = {}
    for run in runs:
        parts = next((one.parts for one in run.read.readings if one.step == step), None)
        if parts is None or run.strength is None or run.rank != rank or run.seed not in seeds:
            continue
        if math.isclose(run.strength, strengths[0], rel_tol=1e-6):
            factor = keeping_factor(grows, *(np.asarray(parts[name]) for name in PARTS))
            if math.isnan(factor):
                continue
            measured.setdefault(run.seed, {})[math.log10(run.rate / rate)] = math.log(factor) / math.log(grows)
    found = []
    for seed in sorted(measured):
        apart, slopes = zip(*sorted(measured[seed].items()), strict=True)
        right = int(np.searchsorted(apart, 0.0))
        if 0 < right < len(apart) and apart[right] - apart[right - 1] <= 1 / 4 + 1e-3:
            found.append(float(np.interp(0.0, apart, slopes)))
        elif abs(nearest := min(apart, key=abs)) <= 1 / 8 + 1e-3:
            found.append(measured[seed][nearest])
    return found
