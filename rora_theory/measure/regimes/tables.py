"""Tables of a model's regime: files, columns, the verdict on the law, and summaries by depth.

The columns are those of `module_regime`'s rows, with all digits. This module does not need JAX.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.inits import Init
from rora_theory.measure.regimes.layer import SPLITS
from rora_theory.measure.tokens import SINK_RATIO
from rora_theory.optimizers import EPSILON, Optimizer
from rora_theory.scaling import check_between
from rora_theory.stats.verdicts import RESOLUTION, judge_gaps, summarise_outcomes
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import USUAL_RANKS

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


def flat_kappa_between(optimizer: Optimizer, init: Init, linear_term: float, *, low: int = 8, high: int = 128) -> float:
    """Compute the kappa of ``gamma = alpha / r**kappa`` at which the first step has the same size at two ranks.

    Args:
      optimizer: Optimizer of the step.
      init: Initialisation of A.
      linear_term: Linear term c, a column of the crossing ranks.
      low: Lower rank.
      high: Higher rank.

    Returns:
      The exponent kappa.
    """
    advice = transfer(Setting(low, 1.0, 1.0, 0.0, optimizer, init), high, {"module": linear_term})
    return -math.log(advice.alpha) / math.log(high / low)


@dataclass(frozen=True)
class JudgeConfig:
    """Criteria for the verdict on a law.

    Raises:
      InputError: If a value is out of range.
    """

    tolerance: Positive = 0.02
    """Relative difference of measured and predicted values that is allowed even if the error bar is smaller"""
    false_alarm: float = 0.01
    """Probability that a true law fails in any comparison, which sets the width of the error bars"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_between("false_alarm", self.false_alarm, 0, 1, closed="neither")


def judge_regime(results: pd.DataFrame, config: JudgeConfig | None = None) -> dict[str, Any] | None:
    """Test whether every measured rms agrees with the predicted one.

    A value agrees if it lies within its error bar or within the tolerance. It fails if it lies outside both or is not
    finite. It is undecided if its error bar is wider than `stats.verdicts.RESOLUTION`. The verdict is ``fails`` if any
    value fails, otherwise ``undecided`` if any is undecided, otherwise ``holds``.

    The error bar is a two-sided Student interval for the number of adapters, at false_alarm divided by the number of
    comparisons (Bonferroni). If the laws are true and the tolerance is 0, one or more values fail with probability
    false_alarm.

    Args:
      results: Frame with the columns `RESULT_COLUMNS`.
      config: Criteria; None is the default `JudgeConfig`.

    Returns:
      The verdict, the numbers of ``comparisons`` and of values ``outside``, ``undecided`` and ``not_finite``, and the
      largest differences of the finite values. None if no adapters were stepped.
    """
    config = config or JudgeConfig()
    false_alarm, tolerance = config.false_alarm, config.tolerance
    stepped = _rows_with_adapters(results)
    if stepped.empty:
        return None
    # Half-width of the error bar in standard errors, by number of adapters.
    adapters = stepped["adapters"].astype(int)
    tail = false_alarm / len(stepped) / 2
    half_widths = {count: -float(special.stdtrit(count - 1, tail)) for count in sorted(set(adapters))}
    # Relative differences, with the larger of error bar and tolerance.
    gaps = np.abs((stepped["measured"] / stepped["predicted"] - 1).to_numpy(float))
    errors = (stepped["standard_error"] / stepped["predicted"]).to_numpy(float)
    widths = errors * adapters.map(half_widths).to_numpy(float)
    allowed = np.maximum(tolerance, widths)
    # A value that is not finite fails, as does one from a single adapter, which has an error bar of NaN.
    finite = np.isfinite(gaps) & np.isfinite(errors)
    outcomes = judge_gaps(np.where(finite, gaps, math.nan), widths, tolerance=tolerance)
    judged: dict[str, Any] = {
        "verdict": summarise_outcomes(outcomes),
        "comparisons": len(stepped),
        "outside": outcomes.count("contradicts"),
        "undecided": outcomes.count("undecided"),
        "not_finite": int(np.sum(~finite)),
        "false_alarm": false_alarm,
        "tolerance": tolerance,
        "error_bars_in_standard_errors": {str(count): bar for count, bar in half_widths.items()},
        "within_tolerance": float(np.mean(gaps <= tolerance)),
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


def crossings_by_depth(
    crossings: pd.DataFrame, tokens: pd.DataFrame, optimizer: Optimizer, init: Init, *, low: int = 8, high: int = 128
) -> pd.DataFrame:
    """Summarise crossing ranks by type of module, third of the layers and split.

    Returns:
      A frame with the columns ``kind``, ``layers`` and ``split``; the medians over layers of crossing rank and
      quartiles; the ``lowest_kappa`` and ``highest_kappa`` over layers (`flat_kappa_between`); and the numbers of
      held-out tokens: ``all``, ``seen``, ``fewest_sinks`` and ``most_sinks``. The numbers are missing if ``tokens`` is
      empty.
    """
    rows = []
    names = ["crossing_rank", "lower_quartile", "median", "upper_quartile"]
    selected = crossings[(crossings["optimizer"] == optimizer) & (crossings["init"] == init)]
    for kind, layers, group in by_depth(selected):
        # Numbers of held-out tokens: sinks differ between modules, the others do not.
        left_out = tokens[tokens["module"].isin(set(group["module"])) & (tokens["split"] == "heldout")]
        counts = {} if left_out.empty else left_out[["all", "seen"]].iloc[0].to_dict()
        counts |= {"fewest_sinks": left_out["sinks"].min(), "most_sinks": left_out["sinks"].max()} if counts else {}
        for split in SPLITS:
            split_rows = group[group["split"] == split]
            # Exponent of the flat rule in every layer of the third.
            kappas = [
                flat_kappa_between(optimizer, init, linear_term, low=low, high=high)
                for linear_term in split_rows["linear_term"]
            ]
            row = {"kind": kind, "layers": layers, "split": split} | split_rows[names].median().to_dict()
            rows.append(row | {"lowest_kappa": min(kappas), "highest_kappa": max(kappas)} | counts)
    return pd.DataFrame(rows)


def crossing_distances_by_depth(crossing_distances: pd.DataFrame, init: Init) -> pd.DataFrame:
    """Summarise crossing distances by type of module, third of the layers, split and rank.

    Returns:
      A frame with the columns ``kind``, ``layers``, ``split`` and ``rank``; the ``median``, ``smallest`` and
      ``largest`` crossing distance over layers; and the median ``turn_5`` over all splits and ranks.
    """
    rows = []
    for kind, layers, group in by_depth(crossing_distances[crossing_distances["init"] == init]):
        turn_5 = group["turn_5"].median()
        for (split, rank), cell in group.groupby(["split", "rank"], sort=False):
            distances = cell["crossing_distance"]
            row = {"kind": kind, "layers": layers, "split": split, "rank": rank, "median": distances.median()}
            rows.append(row | {"smallest": distances.min(), "largest": distances.max(), "turn_5": turn_5})
    return pd.DataFrame(rows)


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


def by_depth(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Group rows by type of module and third of the layers.

    Yields:
      The type, the first and last layer of the third, and the rows.
    """
    kinds = _module_type(table["module"])
    thirds = [layers.tolist() for layers in np.array_split(sorted(set(table["layer"])), 3) if len(layers)]
    for kind in dict.fromkeys(kinds):
        for layers in thirds:
            group = table[(kinds == kind) & table["layer"].isin(layers)]
            if len(group):
                yield kind, str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", group


class FormattedTable(NamedTuple):
    """Formatted table of a report.

    Attributes:
      title: Title with the meaning of the columns.
      heads: Names of the columns.
      rows: Formatted cells by row.
    """

    title: str
    heads: list[str]
    rows: list[list[Any]]


def format_crossings(crossings: pd.DataFrame, tokens: pd.DataFrame, optimizer: Optimizer, init: Init) -> FormattedTable:
    """Format `crossings_by_depth` with a row for each type of module and third of the layers.

    The columns are the pooled and the median r* with quartiles of each split, the range of kappa of each split, and the
    number of held-out tokens left out.
    """
    low, high = USUAL_RANKS
    ranks = [f"r* {statistic} {split}" for split in SPLITS for statistic in ("pooled", "median")]
    return FormattedTable(
        f"{optimizer}, A {init}: crossing rank r* of all tokens together (pooled) and of a token (median and quartiles "
        f"over tokens), medians over layers; kappa: exponent at which the first step has the same size at ranks {low} "
        f"and {high}, range over layers; left out: held-out tokens that repeat the beginning of a training record + "
        f"attention sinks (input norm above {SINK_RATIO:g} times the median), of all held-out tokens",
        ["module", "layers", *ranks, *(f"kappa {split}" for split in SPLITS), "left out"],
        _format_groups(crossings_by_depth(crossings, tokens, optimizer, init, low=low, high=high), _format_crossings),
    )


def format_crossing_distances(crossing_distances: pd.DataFrame, init: Init, learning_rate: float) -> FormattedTable:
    """Format `crossing_distances_by_depth` with a row for each type of module and third of the layers.

    The columns are the number of steps until A dominates for each rank and split, as a median and range over layers,
    and the number of steps until 5% of the gradient's signs have changed.
    """
    table = crossing_distances_by_depth(crossing_distances, init)
    columns = table[["rank", "split"]].drop_duplicates().to_numpy()
    return FormattedTable(
        f"Adam, A {init}: number of steps t_A until A dominates, at the constant rate {learning_rate:g} and a constant "
        "gradient, median over layers (range); turn: number of steps until 5% of the entries of G A^T have changed "
        "sign, far beyond which the law is only approximate",
        ["module", "layers", *(f"r = {rank} {split}" for rank, split in columns), "turn"],
        _format_groups(table, partial(_format_steps, learning_rate)),
    )


def format_ratios(ratios: pd.DataFrame, optimizer: Optimizer) -> FormattedTable:
    """Format `measured_over_predicted` at held-out tokens with a row for each rank and a column for each init."""
    rows = ratios[(ratios["optimizer"] == optimizer) & (ratios["split"] == "heldout")]
    template = "{mean_ratio:.4f} ({standard_error:.4f}), {largest_deviation:.1%}"
    cells = [
        [rank, *(template.format_map(row) for row in group.to_dict("records"))]
        for rank, group in rows.groupby("rank", sort=False)
    ]
    return FormattedTable(
        f"{optimizer}: ratio of measured to predicted rms at held-out tokens, mean over modules, standard error "
        "in brackets, and largest single deviation, by initialisation of A",
        ["rank", *rows["init"].unique()],
        cells,
    )


def _rows_with_adapters(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows for which adapters were stepped, including those with a result that is not finite."""
    return results.dropna(subset=["adapters"]) if "adapters" in results else results.iloc[:0]


def _appearance_order(column: pd.Series) -> pd.Series:
    """Return sort keys by first appearance, which keeps the order of the run's configuration."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _format_groups(table: pd.DataFrame, cells: Callable[[list[dict[Any, Any]]], list[str]]) -> list[list[str]]:
    groups = table.groupby(["kind", "layers"], sort=False)
    return [[*map(str, key), *cells(group.to_dict("records"))] for key, group in groups]


def _format_crossings(splits: list[dict[Any, Any]]) -> list[str]:
    ranks, kappas = [], []
    for row in splits:
        ranks.append(f"{row['crossing_rank']:.1f}")
        ranks.append(f"{row['median']:.1f} ({row['lower_quartile']:.1f}-{row['upper_quartile']:.1f})")
        kappas.append(f"{row['lowest_kappa']:.2f}-{row['highest_kappa']:.2f}")
    left_out = ""
    if "all" in splits[0]:
        low, high = splits[0]["fewest_sinks"], splits[0]["most_sinks"]
        left_out = f"{splits[0]['seen']}+{low if low == high else f'{low}-{high}'} of {splits[0]['all']}"
    return [*ranks, *kappas, left_out]


def _format_steps(learning_rate: float, distances: list[dict[Any, Any]]) -> list[str]:
    """Format distances of A as numbers of steps."""
    texts = []
    for row in distances:
        steps = (row[name] / learning_rate for name in ("median", "smallest", "largest", "turn_5"))
        median, low, high, sign_change = (f"{value:.1f}" for value in steps)
        # A single layer has no range.
        texts.append(f"{median} ({low}-{high})" if "-" in row["layers"] else median)
    # The distance at which signs change is that of the group, in all of its rows.
    return [*texts, "-" if sign_change == "nan" else sign_change]
