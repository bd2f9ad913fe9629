"""Tables of a model's regime: files, columns, the verdict on the law, and summaries over layers.

The columns are those of `module_regime`'s rows, with all digits. This module does not need JAX.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from rora_theory.measure.tokens import SINK_RATIO
from rora_theory.optimizers import EPSILON
from rora_theory.stats.verdicts import RESOLUTION, TOLERANCE, judge_gaps, summarise_outcomes

CROSSINGS, CROSSING_DISTANCES, TOKENS, JUDGE, VERDICT, CROSSING_SUMMARY, CROSSING_DISTANCE_SUMMARY = (
    "crossing_ranks.csv", "crossing_distances.csv", "tokens.csv", "judge.csv", "verdict.json", "crossing_summary.csv",
    "crossing_distance_summary.csv",
)  # fmt: skip
"""Files of a run of ``sims.regime`` in addition to ``results.csv``."""

CROSSING_COLUMNS = (
    "layer", "module", "p_in", "p_out", "split", "tokens", "optimizer", "init", "signal", "cross_talk", "crossing_rank",
    "lower_quartile", "median", "upper_quartile", "linear_term",
)  # fmt: skip
RESULT_COLUMNS = (
    "layer", "module", "split", "optimizer", "init", "rule", "kappa", "rank", "alpha", "scaling", "predicted",
    "measured", "standard_error", "adapters",
)  # fmt: skip
CROSSING_DISTANCE_COLUMNS = (
    "layer", "module", "split", "init", "rank", "crossing_distance", "turn_5", "turn_25", "turn_50", "turn_75",
    "turn_95",
)  # fmt: skip
TOKEN_COLUMNS = ("layer", "module", "split", "all", "seen", "sinks", "read")
JUDGE_COLUMNS = (
    "optimizer", "init", "split", "rank", "modules", "mean_ratio", "standard_error", "largest_deviation", "largest_t",
)  # fmt: skip
UNITS = {
    "predicted": "root mean square over adapters, tokens and outputs of w = gamma B A x' after the first step, by the "
    "law",
    "measured": "the same from adapters that were drawn and stepped; the standard error is over adapters",
    "signal": "mean over tokens of |G x'|^2; Adam: with the rows of G normalised",
    "cross_talk": "mean over tokens of |G|_F^2 |x'|^2; Adam: with the rows of G normalised",
    "crossing_rank": "rank at which signal and cross-talk, summed over tokens, are equal; quartiles over tokens",
    "linear_term": "c: the mean square of w is proportional to r^2 + c r at fixed gamma and standard deviation of A",
    "epsilon": EPSILON,
    "crossing_distance": "distance (steps times learning rate) that A's entries move, at a constant gradient under "
    "Adam, until the A part of the change is larger than the B part",
    "turn_5 to turn_95": "distance at which this percentage of the entries of G A^T has changed sign",
    "seen": "held-out tokens that repeat the beginning of a training record; left out",
    "sinks": f"other tokens with an input norm above {SINK_RATIO:g} times the split's median; left out",
}


FALSE_ALARM = 0.01
"""Probability that a true law fails in any comparison, which sets the width of the error bars."""


def judge_regime(results: pd.DataFrame) -> dict[str, Any] | None:
    """Test whether every measured rms agrees with the predicted one.

    A value agrees if it lies within its error bar or within the tolerance. It fails if it lies outside both or is not
    finite. It is undecided if its error bar is wider than `stats.verdicts.RESOLUTION`. The verdict is ``fails`` if any
    value fails, otherwise ``undecided`` if any is undecided, otherwise ``holds``.

    The error bar is a two-sided Student interval for the number of adapters, at `FALSE_ALARM` divided by the number of
    comparisons (Bonferroni). If the laws were true and the tolerance 0, one or more values would fail with probability
    `FALSE_ALARM`. The tolerance is `stats.verdicts.TOLERANCE`.

    Args:
      results: Frame with the columns `RESULT_COLUMNS`.

    Returns:
      The verdict, the numbers of ``comparisons`` and of values ``outside``, ``undecided`` and ``not_finite``, and the
      largest differences of the finite values. None if no adapters were stepped.
    """
    stepped = _rows_with_adapters(results)
    if stepped.empty:
        return None
    # Half-width of the error bar in standard errors, by number of adapters.
    adapters = stepped["adapters"].astype(int)
    tail = FALSE_ALARM / len(stepped) / 2
    half_widths = {count: -float(special.stdtrit(count - 1, tail)) for count in sorted(set(adapters))}
    # Relative differences, with the larger of error bar and tolerance.
    gaps = np.abs((stepped["measured"] / stepped["predicted"] - 1).to_numpy(float))
    errors = (stepped["standard_error"] / stepped["predicted"]).to_numpy(float)
    widths = errors * adapters.map(half_widths).to_numpy(float)
    allowed = np.maximum(TOLERANCE, widths)
    # A value that is not finite fails, as does one from a single adapter, which has an error bar of NaN.
    finite = np.isfinite(gaps) & np.isfinite(errors)
    outcomes = judge_gaps(np.where(finite, gaps, math.nan), widths)
    judged: dict[str, Any] = {
        "verdict": summarise_outcomes(outcomes),
        "comparisons": len(stepped),
        "outside": outcomes.count("contradicts"),
        "undecided": outcomes.count("undecided"),
        "not_finite": int(np.sum(~finite)),
        "false_alarm": FALSE_ALARM,
        "tolerance": TOLERANCE,
        "error_bars_in_standard_errors": {str(count): bar for count, bar in half_widths.items()},
        "within_tolerance": float(np.mean(gaps <= TOLERANCE)),
    }
    # Largest differences, over the finite values.
    stepped, gaps, errors, allowed = stepped[finite], gaps[finite], errors[finite], allowed[finite]
    if stepped.empty:
        return judged | dict.fromkeys(_DIFFERENCE_KEYS)
    standardised = gaps / errors
    names = ["module", "split", "optimizer", "init", "rank", "predicted", "measured", "standard_error"]
    differences = (np.max(gaps), np.max(standardised), np.sqrt(np.mean(standardised**2)), np.median(errors))
    worst = stepped.iloc[[int(np.argmax(gaps / allowed))]][names].to_dict("records")[0]
    return judged | dict(zip(_DIFFERENCE_KEYS, (*map(float, differences), worst), strict=True))


_DIFFERENCE_KEYS = ("largest_deviation", "largest_t", "rms_t", "median_relative_standard_error", "nearest_to_failing")
"""Keys of `judge_regime` that describe the finite values."""


def describe_verdict(verdict: Mapping[str, Any]) -> str:
    """Return a sentence that describes a verdict of `judge_regime`.

    Args:
      verdict: Verdict, whose numbers of undecided and of non-finite values may be absent if they are 0.
    """
    text = (
        f"verdict: {verdict['verdict']}. {verdict['comparisons'] - verdict['outside']} of {verdict['comparisons']} "
        f"figures agree within {verdict['tolerance']:.0%} or their error bar (total false alarm probability "
        f"{verdict['false_alarm']:g})"
    )
    if undecided := verdict.get("undecided"):
        text += f", {undecided} of them within an error bar wider than {RESOLUTION:.0%}, which decides nothing"
    if not_finite := verdict.get("not_finite"):
        text += f"; {not_finite} not finite"
    text += f"; {verdict['within_tolerance']:.1%} within {verdict['tolerance']:.0%}"
    if verdict["largest_deviation"] is not None:
        text += f"; largest deviation {verdict['largest_deviation']:.1%}, largest |t| {verdict['largest_t']:.2f}"
        text += f", rms t {verdict['rms_t']:.3f}"
    return text


def measured_over_predicted(results: pd.DataFrame) -> pd.DataFrame:
    """Average the ratio of measured to predicted rms over modules, by optimizer, initialisation, split and rank.

    The draws of different modules are independent. The columns are `JUDGE_COLUMNS`.
    """
    rows = []
    keys = ["optimizer", "init", "split", "rank"]
    for key, group in _rows_with_adapters(results).groupby(keys, sort=False):
        # Average mean squares, which are unbiased, and take the root of the mean.
        squares = ((group["measured"] / group["predicted"]) ** 2).to_numpy(float)
        errors = (group["standard_error"] / group["predicted"]).to_numpy(float)
        ratios, mean_ratio = np.sqrt(squares), math.sqrt(float(np.mean(squares)))
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "modules": len(group),
                "mean_ratio": mean_ratio,
                # Errors of the squares, 2 ratio error, propagated to the root of their mean.
                "standard_error": float(np.sqrt(np.sum((errors * ratios) ** 2))) / len(group) / mean_ratio,
                "largest_deviation": float(np.max(np.abs(ratios - 1))),
                "largest_t": float(np.max(np.abs((ratios - 1) / errors))),
            }
        )
    return pd.DataFrame(rows, columns=list(JUDGE_COLUMNS)).sort_values(
        keys, key=_appearance_order, kind="stable", ignore_index=True
    )


def spread_over_layers(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Summarise columns of `CROSSING_COLUMNS` or `CROSSING_DISTANCE_COLUMNS` over the layers, by type of module.

    Args:
      table: Rows of crossing ranks or of crossing distances.
      columns: Columns to summarise.

    Returns:
      A row for each type of module and combination of split, optimizer, init and rank. Its columns are ``kind``, these
      keys, the number of ``layers``, and of each summarised column ``x`` the median ``x``, the smallest ``x_low`` and
      the largest ``x_high``.
    """
    keys = ["kind", *(name for name in ("split", "optimizer", "init", "rank") if name in table)]
    rows = []
    for key, layers in table.assign(kind=_module_type(table["module"])).groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True)) | {"layers": len(layers)}
        for column in columns:
            values_of_layers = layers[column]
            row[column] = values_of_layers.median()
            row |= {f"{column}_low": values_of_layers.min(), f"{column}_high": values_of_layers.max()}
        rows.append(row)
    return pd.DataFrame(rows)


def _module_type(modules: pd.Series) -> pd.Series:
    return modules.str.split(".").str[-1]


def summaries(crossings: pd.DataFrame, crossing_distances: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the summaries over layers by the names of their files.

    There is no crossing distance, and so no summary of them, where Adam was not measured.
    """
    tables = {
        CROSSING_SUMMARY: (crossings, ("crossing_rank", "median")),
        CROSSING_DISTANCE_SUMMARY: (crossing_distances, ("crossing_distance", "turn_5")),
    }
    return {name: spread_over_layers(table, columns) for name, (table, columns) in tables.items() if len(table)}


def _rows_with_adapters(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows for which adapters were stepped, including those with a result that is not finite."""
    return results.dropna(subset=["adapters"]) if "adapters" in results else results.iloc[:0]


def _appearance_order(column: pd.Series) -> pd.Series:
    """Return sort keys by first appearance, which keeps the order of the run's configuration."""
    return pd.Series(pd.factorize(column)[0], index=column.index)
