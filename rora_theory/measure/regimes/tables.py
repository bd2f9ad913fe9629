"""Tables of a model's regime: their files and columns, whether the law holds in them, and what they say by depth.

Columns are those of `module_regime`'s rows: a row one measured thing, floats with every digit. Nothing here needs JAX.
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
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.measure.layers.layer_data import SPLITS
from rora_theory.measure.tokens import SINK
from rora_theory.optimizers import EPSILON
from rora_theory.theory.laws import Optimizer
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import USUAL_RANKS

CROSSINGS, TAKEOVER, TOKENS, JUDGE, VERDICT, CROSSING_SUMMARY, TAKEOVER_SUMMARY = (
    "crossing_ranks.csv", "takeover.csv", "tokens.csv", "judge.csv", "verdict.json", "crossing_summary.csv",
    "takeover_summary.csv",
)  # fmt: skip
"""Files of a run of ``sims.regime`` beside `results.csv`."""

CROSSING_COLUMNS = (
    "layer", "module", "p_in", "p_out", "split", "tokens", "optimizer", "init", "signal", "cross_talk", "crossing_rank",
    "lower_quartile", "median", "upper_quartile", "linear_term",
)  # fmt: skip
RESULT_COLUMNS = (
    "layer", "module", "split", "optimizer", "init", "rule", "kappa", "rank", "alpha", "scaling", "predicted",
    "measured", "standard_error", "adapters",
)  # fmt: skip
TAKEOVER_COLUMNS = (
    "layer", "module", "split", "init", "rank", "takeover", "turn_5", "turn_25", "turn_50", "turn_75", "turn_95",
)  # fmt: skip
TOKEN_COLUMNS = ("layer", "module", "split", "all", "seen", "sinks", "read")
JUDGE_COLUMNS = (
    "optimizer", "init", "split", "rank", "modules", "mean_ratio", "standard_error", "largest_deviation", "largest_t",
)  # fmt: skip
UNITS = {
    "predicted": "root mean square over adapters, tokens and outputs of w = gamma B A x' after the first step: the law",
    "measured": "the same of adapters drawn and stepped; its standard error is over adapters",
    "signal": "mean over tokens of |G x'|^2; Adam: rows of G normalised",
    "cross_talk": "mean over tokens of |G|_F^2 |x'|^2; Adam: rows of G normalised",
    "crossing_rank": "rank where signal and cross-talk, summed over tokens, are equal; quartiles over tokens",
    "linear_term": "c: the mean square of w is proportional to r^2 + c r at fixed gamma and deviation of A",
    "epsilon": EPSILON,
    "takeover": "distance that A's entries move, at a constant gradient under Adam, until A leads: steps times rate",
    "turn_5 to turn_95": "distance at which so many per cent of the entries of G A^T have turned their sign",
    "seen": "held-out tokens up to which the record begins as one of the training batch does: not read",
    "sinks": f"others whose input's norm is above {SINK:g} times the median of the split's: not read",
}


def flat_kappa_between(optimizer: Optimizer, init: Init, linear_term: float, *, low: int = 8, high: int = 128) -> float:
    """The kappa of ``gamma = alpha / r**kappa`` whose first step is as large at rank ``high`` as at ``low``.

    Args:
      optimizer, init: whose step, from which A.
      linear_term: c, a column of the crossing ranks.
      low, high: ranks.
    """
    carried = transfer(Setting(low, 1.0, 1.0, 0.0, optimizer, init), high, {"module": linear_term})
    return -math.log(carried.alpha) / math.log(high / low)


RESOLUTION = 0.5
"""Relative width of an error bar above which a figure outside the tolerance can't tell: it would pass at half of what
is predicted."""


@dataclass(frozen=True)
class JudgeConfig:
    """When a law fails.

    Raises:
      InputError: a value out of range.
    """

    tolerance: Positive = 0.02
    """measured may differ from predicted by this much, or by its error bar where that is larger"""
    false_alarm: float = 0.01
    """probability that a true law fails somewhere: it sets the error bars' width"""

    def __post_init__(self) -> None:
        check_ranges(self, str)
        if not 0 < self.false_alarm < 1:
            raise InputError(f"false_alarm is {self.false_alarm}; accepted is a number between 0 and 1")


def judge_regime(results: pd.DataFrame, config: JudgeConfig | None = None) -> dict[str, Any] | None:
    """Whether every measured rms lies within its error bar or the tolerance of the predicted one; None: none tried.

    One outside both, or that is no finite number, fails. One within an error bar that is wider than `RESOLUTION`, but
    outside the tolerance, is undecided. The verdict is ``fails`` where one fails, else ``undecided`` where one is, else
    ``holds``.

    The error bar is Student's for the number of adapters, two-sided, at false_alarm divided by the number of
    comparisons (Bonferroni): with true laws, and no tolerance, one or more would fail with that probability.

    Args:
      results: of `RESULT_COLUMNS`, of any modules.
      config: how much may differ; None is `JudgeConfig` as it stands.

    Returns:
      the verdict, how many figures it is of, are ``outside``, ``undecided`` and ``not_finite``, and how far those that
      are finite lie apart: None where none is.
    """
    config = config or JudgeConfig()
    false_alarm, tolerance = config.false_alarm, config.tolerance
    tried = _tried(results)
    if tried.empty:
        return None
    adapters = tried["adapters"].astype(int)
    bars = {count: -float(special.stdtrit(count - 1, false_alarm / len(tried) / 2)) for count in sorted(set(adapters))}
    gaps = np.abs((tried["measured"] / tried["predicted"] - 1).to_numpy(float))
    errors = (tried["standard_error"] / tried["predicted"]).to_numpy(float)
    widths = errors * adapters.map(bars).to_numpy(float)
    allowed = np.maximum(tolerance, widths)
    finite = np.isfinite(gaps) & np.isfinite(errors)
    outside = ~finite | ~(gaps <= allowed)  # a bar that is no number, of one adapter alone, allows nothing
    undecided = ~outside & (gaps > tolerance) & (widths > RESOLUTION)
    judged: dict[str, Any] = {
        "verdict": "fails" if outside.any() else "undecided" if undecided.any() else "holds",
        "comparisons": len(tried),
        "outside": int(np.sum(outside)),
        "undecided": int(np.sum(undecided)),
        "not_finite": int(np.sum(~finite)),
        "false_alarm": false_alarm,
        "tolerance": tolerance,
        "error_bars_in_standard_errors": {str(count): bar for count, bar in bars.items()},
        "within_tolerance": float(np.mean(gaps <= tolerance)),
    }
    tried, gaps, errors, allowed = tried[finite], gaps[finite], errors[finite], allowed[finite]
    if tried.empty:
        return judged | dict.fromkeys(_APART)
    t = gaps / errors
    names = ["module", "split", "optimizer", "init", "rank", "predicted", "measured", "standard_error"]
    apart = (np.max(gaps), np.max(t), np.sqrt(np.mean(t**2)), np.median(errors))
    worst = tried.iloc[[int(np.argmax(gaps / allowed))]][names].to_dict("records")[0]
    return judged | dict(zip(_APART, (*map(float, apart), worst), strict=True))


_APART = ("largest_deviation", "largest_t", "rms_t", "median_relative_standard_error", "nearest_to_failing")
"""What `judge_regime` says of the figures that are finite."""


def in_words(verdict: Mapping[str, Any]) -> str:
    """What `judge_regime` found, in a sentence."""
    text = (
        f"verdict: {verdict['verdict']}. {verdict['comparisons'] - verdict['outside']} of {verdict['comparisons']} "
        f"figures within {verdict['tolerance']:.0%} or their error bar (false alarm {verdict['false_alarm']:g} over "
        f"all)"
    )
    if undecided := verdict.get("undecided"):  # earlier runs have none
        text += f", {undecided} of them in an error bar wider than {RESOLUTION:.0%}, which decides nothing"
    if not_finite := verdict.get("not_finite"):
        text += f"; {not_finite} measured no finite number"
    text += f"; {verdict['within_tolerance']:.1%} within {verdict['tolerance']:.0%}"
    if verdict["largest_deviation"] is not None:
        text += f"; largest deviation {verdict['largest_deviation']:.1%}, largest |t| {verdict['largest_t']:.2f}"
        text += f", rms t {verdict['rms_t']:.3f}"
    return text


def measured_over_predicted(results: pd.DataFrame) -> pd.DataFrame:
    """Measured over predicted by optimizer, init, split and rank: means over modules, whose draws are independent.

    Columns are `JUDGE_COLUMNS`.
    """
    found = []
    keys = ["optimizer", "init", "split", "rank"]
    for key, own in _tried(results).groupby(keys, sort=False):
        # Mean squares, which are unbiased; their root halves the deviation.
        squares = ((own["measured"] / own["predicted"]) ** 2).to_numpy(float)
        spread = (own["standard_error"] / own["predicted"]).to_numpy(float)
        ratios, mean = np.sqrt(squares), math.sqrt(float(np.mean(squares)))
        found.append(
            dict(zip(keys, key, strict=True))
            | {
                "modules": len(own),
                "mean_ratio": mean,
                "standard_error": float(np.sqrt(np.sum((spread * ratios) ** 2))) / len(own) / mean,
                "largest_deviation": float(np.max(np.abs(ratios - 1))),
                "largest_t": float(np.max(np.abs((ratios - 1) / spread))),
            }
        )
    return pd.DataFrame(found, columns=list(JUDGE_COLUMNS)).sort_values(
        keys, key=_in_order, kind="stable", ignore_index=True
    )


def crossings_by_depth(
    crossings: pd.DataFrame, tokens: pd.DataFrame, optimizer: Optimizer, init: Init, *, low: int = 8, high: int = 128
) -> pd.DataFrame:
    """Crossing ranks by type of module, third of the layers and split: medians over the layers of that third.

    Columns are ``kind``, ``layers``, ``split``, those medians by the names of `CROSSING_COLUMNS`, over the layers the
    ``lowest_kappa`` and the ``highest_kappa`` (`flat_kappa_between`), and of the held-out tokens how many there are
    (``all``), were ``seen``, and the least and most that are sinks besides; missing where ``tokens`` is empty.
    """
    found = []
    names = ["crossing_rank", "lower_quartile", "median", "upper_quartile"]
    own = crossings[(crossings["optimizer"] == optimizer) & (crossings["init"] == init)]
    for kind, layers, parts in by_depth(own):
        left_out = tokens[tokens["module"].isin(set(parts["module"])) & (tokens["split"] == "heldout")]
        counts = {} if left_out.empty else left_out[["all", "seen"]].iloc[0].to_dict()
        counts |= {"fewest_sinks": left_out["sinks"].min(), "most_sinks": left_out["sinks"].max()} if counts else {}
        for split in SPLITS:
            part = parts[parts["split"] == split]
            kappas = [flat_kappa_between(optimizer, init, c, low=low, high=high) for c in part["linear_term"]]
            row = {"kind": kind, "layers": layers, "split": split} | part[names].median().to_dict()
            found.append(row | {"lowest_kappa": min(kappas), "highest_kappa": max(kappas)} | counts)
    return pd.DataFrame(found)


def takeover_by_depth(takeover: pd.DataFrame, init: Init) -> pd.DataFrame:
    """Takeover distances by type of module, third of the layers, split and rank.

    Columns are ``kind``, ``layers``, ``split``, ``rank``, over the layers of that third the ``median``, ``smallest``
    and ``largest`` takeover, and the median ``turn_5`` of all its splits and ranks.
    """
    found = []
    for kind, layers, parts in by_depth(takeover[takeover["init"] == init]):
        turn = parts["turn_5"].median()
        for (split, rank), part in parts.groupby(["split", "rank"], sort=False):
            spread = part["takeover"].agg(["median", "min", "max"]).tolist()
            row = {"kind": kind, "layers": layers, "split": split, "rank": rank}
            found.append(row | dict(zip(("median", "smallest", "largest"), spread, strict=True)) | {"turn_5": turn})
    return pd.DataFrame(found)


def spread_over_layers(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Summarise columns of `CROSSING_COLUMNS` or `TAKEOVER_COLUMNS` over the layers, by type of module.

    Args:
      table: Rows of crossing ranks or of takeover distances.
      columns: Columns to summarise.

    Returns:
      A row for each type of module and combination of split, optimizer, init and rank. Its columns are ``kind``, these
      keys, the number of ``layers``, and of each summarised column ``x`` the median ``x``, the smallest ``x_low`` and
      the largest ``x_high``.
    """
    keys = ["kind", *(key for key in ("split", "optimizer", "init", "rank") if key in table)]
    rows = []
    for values, layers in table.assign(kind=_module_type(table["module"])).groupby(keys, sort=False):
        row = dict(zip(keys, values, strict=True)) | {"layers": len(layers)}
        for column in columns:
            spread = layers[column].agg(["median", "min", "max"])
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), spread, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def _module_type(modules: pd.Series) -> pd.Series:
    return modules.str.rpartition(".")[2]


def summaries(crossings: pd.DataFrame, takeover: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the summaries over layers by the names of their files."""
    return {
        CROSSING_SUMMARY: spread_over_layers(crossings, ("crossing_rank", "median")),
        TAKEOVER_SUMMARY: spread_over_layers(takeover, ("takeover", "turn_5")),
    }


def by_depth(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Rows by type of module and third of the layers: early, middle and late, named by the first and the last layer."""
    kinds = _module_type(table["module"])
    thirds = [part.tolist() for part in np.array_split(sorted(set(table["layer"])), 3) if len(part)]
    for kind in dict.fromkeys(kinds):
        for layers in thirds:
            part = table[(kinds == kind) & table["layer"].isin(layers)]
            if len(part):
                yield kind, str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", part


class TableInWords(NamedTuple):
    """A table as a report prints it."""

    title: str
    heads: list[str]
    rows: list[list[Any]]


def crossings_in_words(crossings: pd.DataFrame, tokens: pd.DataFrame, optimizer: Optimizer, init: Init) -> TableInWords:
    """`crossings_by_depth`, a line a type of module and third of the layers: of each split r* pooled and of a token
    with its quartiles, then of each split kappa's range, then how many held-out tokens were left out."""
    low, high = USUAL_RANKS
    ranks = [f"r* {what} {split}" for split in SPLITS for what in ("pooled", "median")]
    return TableInWords(
        f"{optimizer}, A {init}: crossing rank r* of all tokens together (pooled) and of a token (median and quartiles "
        f"over tokens), medians over layers; kappa: the exponent whose first step is as large at rank {high} as at "
        f"{low}, range over layers; left out: held-out tokens of a module that begin as the training batch does + "
        f"sinks (input above {SINK:g} times the median norm), of all",
        ["module", "layers", *ranks, *(f"kappa {split}" for split in SPLITS), "left out"],
        _by_place(crossings_by_depth(crossings, tokens, optimizer, init, low=low, high=high), _crossings),
    )


def takeovers_in_words(takeover: pd.DataFrame, init: Init, learning_rate: float) -> TableInWords:
    """`takeover_by_depth`, likewise: of each rank and split the steps at a rate until A leads, with their median and
    range over layers, then the steps until 5% of the gradient's signs have turned."""
    table = takeover_by_depth(takeover, init)
    columns = table[["rank", "split"]].drop_duplicates().to_numpy()
    return TableInWords(
        f"Adam, A {init}: steps t_A at rate {learning_rate:g} and a constant gradient after which A leads, median over "
        "layers (range); turn: steps after which 5% of the entries of G A^T have turned their sign, far beyond which "
        "the law is approximate",
        ["module", "layers", *(f"r = {rank} {split}" for rank, split in columns), "turn"],
        _by_place(table, partial(_steps, learning_rate)),
    )


def ratios_in_words(results: pd.DataFrame, optimizer: Optimizer) -> TableInWords:
    """`measured_over_predicted` at held-out tokens, a line a rank, a column a law of A."""
    found = measured_over_predicted(results)
    own = found[(found["optimizer"] == optimizer) & (found["split"] == "heldout")]
    text = "{mean_ratio:.4f} ± {standard_error:.4f} ({largest_deviation:.1%})".format_map
    return TableInWords(
        f"{optimizer}: measured over predicted rms, held-out tokens: mean over modules ± s.e. (largest single "
        "deviation), by law of A",
        ["rank", *own["init"].unique()],
        [[rank, *map(text, rows.to_dict("records"))] for rank, rows in own.groupby("rank", sort=False)],
    )


def _tried(results: pd.DataFrame) -> pd.DataFrame:
    """Rows of which adapters were drawn, whatever they measured."""
    return results.dropna(subset=["adapters"]) if "adapters" in results else results.iloc[:0]


def _in_order(column: pd.Series) -> pd.Series:
    """Of first appearance, so that tables go as the run was asked for."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _by_place(table: pd.DataFrame, cells: Callable[[list[dict[Any, Any]]], list[str]]) -> list[list[str]]:
    places = table.groupby(["kind", "layers"], sort=False)
    return [[*map(str, place), *cells(part.to_dict("records"))] for place, part in places]


def _crossings(splits: list[dict[Any, Any]]) -> list[str]:
    ranks = "{crossing_rank:.1f}|{median:.1f} ({lower_quartile:.1f}-{upper_quartile:.1f})"
    kappas = ["{lowest_kappa:.2f}-{highest_kappa:.2f}".format_map(row) for row in splits]
    left_out = ""
    if "all" in splits[0]:
        low, high = splits[0]["fewest_sinks"], splits[0]["most_sinks"]
        left_out = f"{splits[0]['seen']}+{low if low == high else f'{low}-{high}'} of {splits[0]['all']}"
    return [*(text for row in splits for text in ranks.format_map(row).split("|")), *kappas, left_out]


def _steps(lr: float, distances: list[dict[Any, Any]]) -> list[str]:
    """Of A's distances at a rate."""
    texts = []
    for row in distances:
        median, low, high, turn = (f"{row[name] / lr:.1f}" for name in ("median", "smallest", "largest", "turn_5"))
        texts.append(f"{median} ({low}-{high})" if "-" in row["layers"] else median)
    return [*texts, "-" if turn == "nan" else turn]
