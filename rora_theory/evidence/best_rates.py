"""Best rates of public sweeps, and the exponent of the best rate in the rank or in G, with models as the unit."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from rora_theory.errors import InputError
from rora_theory.evidence.sweeps import Sweep
from rora_theory.runs import frames
from rora_theory.stats.curve_optima import Method, quadratic_optima, registration_shifts
from rora_theory.stats.estimate import Estimate, jackknife
from rora_theory.stats.rate_curves import Curve, log2_rates, rate_errors
from rora_theory.stats.slopes import slope_weights

if TYPE_CHECKING:
    import pandas as pd

BEST_COLUMNS = (
    "source", "model", "steps", "batch_size", "rank", "gain", "best_rate", "log2_error", "log2_half_width",
    "best_loss", "rates", "place",
)  # fmt: skip
"""Columns of the table of `best_rates`."""

EXPONENT_COLUMNS = (
    "source", "over", "from_rank", "to_rank", "method", "exponent", "standard_error", "half_width", "error_over",
    "models", "curves",
)  # fmt: skip
"""Columns of the table of `exponents`."""

FIRST_RANKS = (1, 4, 16)
"""Lowest ranks from which exponents are estimated."""


def best_rates(sweeps: Iterable[Sweep]) -> "pd.DataFrame":
    """Compute the best rate of every curve.

    Args:
      sweeps: Sweeps of one source or of several.

    Returns:
      A table with the columns `BEST_COLUMNS`: ``gain`` is G = gamma r, ``log2_error`` the standard error of log2 of
      the best rate and ``log2_half_width`` half of its 95% interval (both from repeated runs or from the scatter of a
      dense curve, and empty where the rate is a bound or nothing was repeated), ``best_loss`` the lowest measured loss
      in nats per token, ``rates`` the number of rates, and ``place`` a `sweeps.Place`.
    """
    rows = []
    for sweep in sweeps:
        for fit in sweep.fits:
            error, half_width = rate_errors(fit.log2_rate, edge="" if fit.is_inside else fit.place)
            rows.append(
                {"source": sweep.source, "model": sweep.model, "steps": sweep.steps, "batch_size": sweep.batch_size}
                | {"rank": fit.curve.rank, "gain": fit.curve.gain, "best_rate": fit.best_rate}
                | {"log2_error": error, "log2_half_width": half_width}
                | {"best_loss": float(np.mean(fit.curve.lowest_losses()))}
                | {"rates": len(fit.curve.rates), "place": fit.place}
            )
    return frames.from_rows(rows, BEST_COLUMNS)


def log_rates(curves: Sequence[Curve], method: Method = "vertex") -> list[float]:
    """Compute the natural logarithms of the best rates of the curves of one model, up to a constant.

    Args:
      curves: Curves of one sweep with one seed each, or with several, over which the logarithms are averaged.
      method: Estimator. Registration only gives differences to the first curve, which is 0.
    """
    if method == "vertex":
        log2 = [float(np.mean(log2_rates(curve))) for curve in curves]
    elif method == "quadratic":
        log2 = [float(np.mean(quadratic_optima(curve))) for curve in curves]
    else:
        log2 = [0.0, *(float(np.mean(registration_shifts(curves[0], curve))) for curve in curves[1:])]
    return [value * math.log(2) for value in log2]


def estimate_exponent(
    sweeps: Sequence[Sweep],
    *,
    ranks: tuple[int, float] = (1, math.inf),
    method: Method = "vertex",
) -> tuple[Estimate, int, int]:
    r"""Estimate the exponent of the best rate in the rank.

    One slope is fitted to the log best rates of all models, each with an intercept of its own. The standard error is
    the jackknife's over models. For a single model it comes from the scatter of its best rates around the line, with
    two degrees of freedom less than there are rates.

    Args:
      sweeps: Sweeps of one source.
      ranks: Lowest and highest rank.
      method: Estimator of the best rates. Curves whose best rate is a bound are left out.

    Returns:
      The exponent, the number of models with at least two different values, and their number of curves.

    Raises:
      InputError: If no model has two best rates inside their grids.
    """
    # Centred logarithms of the setting and of the best rates of every model.
    points: list[tuple[np.ndarray, np.ndarray]] = []
    for sweep in sweeps:
        curves = [fit.curve for fit in sweep.fits if fit.is_inside and ranks[0] <= fit.curve.rank <= ranks[1]]
        x = np.log([curve.rank for curve in curves])
        if len(curves) > 1 and np.ptp(x) > 0:
            y = np.array(log_rates(curves, method))
            points.append((x - x.mean(), y - y.mean()))
    if not points:
        raise InputError("sweeps must have a model with two best rates inside their grids, got none")

    def slope(indices: Sequence[int]) -> float:
        x, y = (np.concatenate([points[index][part] for index in indices]) for part in (0, 1))
        return float(slope_weights(x) @ y)

    count = sum(len(x) for x, _ in points)
    estimate = jackknife(slope, len(points), "models")
    if len(points) == 1 and count > 2:
        (x, y), value = points[0], slope([0])
        error = math.sqrt(float(np.sum((y - value * x) ** 2)) / (count - 2) / float(np.sum(x**2)))
        # Two degrees of freedom less than points; the half width counts one.
        estimate = Estimate(value, error, count - 1, "ranks")
    return estimate, len(points), count


def exponents(sweeps: Sequence[Sweep]) -> "pd.DataFrame":
    """Estimate the exponents of the best rate in the rank at one G, or along the sweep's own path of rank and G.

    Args:
      sweeps: Sweeps of one source.

    Returns:
      A table with the columns `EXPONENT_COLUMNS`. ``over`` is ``"rank"`` if G is the same in all curves, and ``"rank
      and G"`` if it changes with the rank. ``half_width`` is half of the 95% interval.
    """
    rows = []
    changes_gain = any(not math.isclose(curve.gain, sweep.curves[0].gain) for sweep in sweeps for curve in sweep.curves)
    for first in FIRST_RANKS:
        ranks = [f.curve.rank for sweep in sweeps for f in sweep.fits if f.is_inside and f.curve.rank >= first]
        for method in get_args(Method):
            try:
                value, models, curves = estimate_exponent(sweeps, ranks=(first, math.inf), method=method)
            except InputError:
                continue
            half_width = value.half_width() if value.has_error else math.inf
            rows.append(
                {"source": sweeps[0].source, "over": "rank and G" if changes_gain else "rank"}
                | {"from_rank": min(ranks), "to_rank": max(ranks), "method": method, "exponent": value.value}
                | {"standard_error": value.known_error}
                | {"half_width": half_width if math.isfinite(half_width) else None}
                | {"error_over": value.over, "models": models, "curves": curves}
            )
    unique = {(row["from_rank"], row["method"]): row for row in rows}
    return frames.from_rows(unique.values(), EXPONENT_COLUMNS)
