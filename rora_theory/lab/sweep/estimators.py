"""Exponents of the best rate by several estimators: three points and whole curves."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, get_args

import pandas as pd

from rora_theory.runs import frames
from rora_theory.stats.curve_optima import Method, pooled_exponent
from rora_theory.stats.rate_curves import Curve, at_shared_seeds

COLUMNS = (
    "step", "over", "at", "first", "second", "estimate", "exponent", "standard_error", "half_width", "seeds", "pairs",
    "edges",
)  # fmt: skip
"""Columns of `estimator_table`."""


def estimator_table(curves: Sequence[Curve], step: int) -> pd.DataFrame:
    """Estimate the exponents of the best rate in gamma r and in the rank by every estimator of `stats.curve_optima`.

    Exponents are measured between all pairs of values, at every value of the other setting, and pooled over all of
    them with seeds as clusters.

    Args:
      curves: `curves.curves_at` the step.
      step: Number of steps.

    Returns:
      A row for each exponent and estimator: ``step``, ``over`` (``gain`` or ``rank``), ``at`` (the values of the
      other setting, separated by spaces), ``first``, ``second``; ``estimate``, the estimator; ``exponent`` with
      ``standard_error`` and 95% ``half_width`` over the ``seeds``; ``pairs`` of curves, and ``edges``, the number of
      pairs with a best rate at the end of a grid, which bounds the exponent only. Without a minimum of a curve there is
      no row.
    """
    curve_of_setting = {(curve.rank, curve.gain): curve for curve in curves if curve.rank}
    rows: list[dict[str, Any]] = []
    for over, index in (("gain", 1), ("rank", 0)):
        values = sorted({key[index] for key in curve_of_setting})
        for low, high in itertools.combinations(values, 2):
            # Pairs of curves with a shared seed, by the value of the other setting in ascending order.
            pairs: dict[float, tuple[Curve, Curve]] = {}
            for other_value in sorted({key[1 - index] for key in curve_of_setting}):
                ends: list[Any] = [(low, other_value), (high, other_value)]
                if over == "gain":
                    ends = [(other_value, low), (other_value, high)]
                if all(end in curve_of_setting for end in ends):
                    first, second = (curve_of_setting[end] for end in ends)
                    if at_shared_seeds(first, second):
                        pairs[other_value] = first, second
            # Each value of the other setting by itself and, if there are several, all of them pooled.
            groups = [(at,) for at in pairs] + ([tuple(pairs)] if len(pairs) > 1 else [])
            for group in groups:
                group_pairs = [pairs[at] for at in group]
                # A best rate at the end of a grid makes the exponent a bound.
                edges = sum(any(curve.edge for curve in at_shared_seeds(*pair)) for pair in group_pairs)
                labels = {"step": step, "over": over, "at": " ".join(f"{at:g}" for at in group)}
                labels |= {"first": float(low), "second": float(high)}
                for method in get_args(Method):
                    exponent = pooled_exponent({high / low: group_pairs}, method)
                    if not math.isnan(exponent.value):
                        rows.append(
                            labels
                            | {"estimate": method, "exponent": exponent.value}
                            | {"standard_error": exponent.known_error}
                            | {"half_width": exponent.half_width() if exponent.has_error else None}
                            | {"seeds": exponent.n, "pairs": len(group_pairs), "edges": edges}
                        )
    return frames.from_rows(rows, COLUMNS)
