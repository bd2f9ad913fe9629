"""Error rates of the verdict rules, and bias and spread of the estimators of a best rate, on synthetic data.

    python benchmarks/verdict_rules.py --out results/published/verdict_rules

Every rule is applied to data with a known truth. The learning-rate sweeps resemble the published ones: two or three
seeds, three to five rates a quarter of a decade apart, and paired held-out records (`SweepModel`). A false
agreement is a verdict "agrees" on a prediction that differs from the truth; a false contradiction is the reverse.

Files in the output folder: `rules.csv` (exponents of best rates), `power.csv` (how often a sweep decides, by its
seeds, rates and ranks), `estimators.csv` (bias, spread and coverage), `other_rules.csv` (coordinate check, regime,
equations of the paper), `by_rule.csv` (a summary) and `summary.json`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory.lab.sweep.law import RIVALS
from rora_theory.measure.regimes.tables import judge_regime
from rora_theory.paper.verdicts import FALSE_ALARM, SLOPE_RESOLUTION, SLOPE_TOLERANCE
from rora_theory.runs import frames
from rora_theory.runs.files import write_whole
from rora_theory.stats.curve_optima import Method, quadratic_optima, registration_shifts, whole_curve_log2_rates
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.moments import threshold
from rora_theory.stats.rate_curves import Curve, log2_rates, weighted_log2_rates
from rora_theory.stats.slopes import BAND, SlopeFit, seed_fit, trend
from rora_theory.stats.verdicts import RESOLUTION, Outcome, judge_gaps, judge_range
from sims.common import cli
from sims.common.tables import print_records

PUBLISHED = Path(__file__).parents[1] / "results" / "published" / "verdict_rules"

GRID_STEP = math.log2(10) / 4
"""Distance between learning rates in octaves: a quarter of a decade."""


@dataclass(frozen=True)
class SweepModel:
    r"""Distribution of a sweep: pairs of curves, at two values of a setting, for one or more ranks.

    The log loss of a run is a curve in the log2 of the rate,

    .. math:: \log L = \kappa \left( u^2 + s u^3 \right) + \varepsilon, \qquad u = x - m - d_{seed} - d_{record}

    with the optimum m of the population, a displacement of every seed and of every held-out record, and noise of every
    run. Curves of one seed share most of its displacement, since they train on the same batches in the same order.

    The defaults are medians over the published curves of SmolLM2-135M after 64 and 256 steps.

    Attributes:
      exponent: True exponent of the best rate between the two values.
      ratio: Second value divided by the first.
      seeds: Number of seeds.
      rates: Number of learning rates of each curve, a quarter of a decade apart; the optimum of the population lies
        within half a step of the middle one.
      ranks: Number of pairs of curves.
      curvature: Curvature kappa of the first curve of each pair, per octave squared.
      second_curvature: Curvature of the second curve of each pair.
      skew: Skew s, per octave; above 0 the curve is steeper towards high rates.
      seed_spread: Standard deviation of a seed's optimum in octaves.
      seed_correlation: Correlation of a seed's optima between two curves.
      record_spread: Standard deviation of a record's optimum in octaves.
      record_correlation: Correlation of a record's optima between two curves.
      noise: Standard deviation of a run's log loss.
      records: Number of held-out records.
    """

    exponent: float
    ratio: float
    seeds: int
    rates: int
    ranks: int = 2
    curvature: float = 0.009
    second_curvature: float = 0.009
    skew: float = 0.0
    seed_spread: float = 0.25
    seed_correlation: float = 0.85
    record_spread: float = 1.3
    record_correlation: float = 0.7
    noise: float = 0.002
    records: int = 96


def draw_sweeps(
    model: SweepModel, count: int, random: np.random.Generator, *, draws: int = 200
) -> list[list[tuple[Curve, Curve]]]:
    """Draw independent sweeps.

    Args:
      model: Distribution of a sweep.
      count: Number of sweeps.
      random: Source of random numbers.
      draws: Number of bootstrap samples of the records, the same for all curves.

    Returns:
      For every sweep, a pair of curves for each rank.
    """
    shape = (count, model.ranks, 2)
    # Middle of each grid; the population's optimum lies within half a step of it.
    optima = np.zeros(shape)
    optima[..., 1] = model.exponent * math.log2(model.ratio)
    middle = optima + GRID_STEP * random.uniform(-0.5, 0.5, shape)
    x = middle[..., None] + GRID_STEP * (np.arange(model.rates) - (model.rates - 1) / 2)
    # Displacements of seeds and records, correlated between curves.
    by_seed = _correlated(random, shape, model.seeds, model.seed_spread, model.seed_correlation)
    by_record = _correlated(random, shape, model.records, model.record_spread, model.record_correlation)
    # Distance u of each rate from the optimum, and the losses: [sweeps, ranks, ends, seeds, rates, records].
    u = (x - optima[..., None])[..., None, :, None] - by_seed[..., None, None] - by_record[..., None, None, :]
    curvature = np.array([model.curvature, model.second_curvature])[:, None, None, None]
    noise = model.noise * random.normal(size=(*shape, model.seeds, model.rates, 1))
    losses = np.exp(curvature * (u**2 + model.skew * u**3) + noise)
    # Bootstrap of the records, as weights that every curve shares.
    picks = random.integers(0, model.records, (draws, model.records))
    weights = np.stack([np.bincount(pick, minlength=model.records) for pick in picks]) / model.records
    # Means over all records, [..., seeds, rates], and over each bootstrap sample, [..., draws, seeds, rates].
    means, resampled = losses.mean(axis=-1), np.moveaxis(losses @ weights.T, -1, 3)
    seeds = tuple(range(model.seeds))

    def make_curve(sweep: int, rank: int, end: int) -> Curve:
        index = (sweep, rank, end)
        samples = resampled[index], seeds, model.records
        return Curve("adamw", "both", "lora", 1.0, rank + 1, 1.0, 2.0 ** x[index], means[index], *samples)

    return [
        [(make_curve(sweep, rank, 0), make_curve(sweep, rank, 1)) for rank in range(model.ranks)]
        for sweep in range(count)
    ]


def _correlated(
    random: np.random.Generator, shape: tuple[int, ...], members: int, spread: float, correlation: float
) -> Float[np.ndarray, "sweeps ranks ends members"]:
    """Draw normal displacements of the members, with a given correlation between the curves of a sweep."""
    shared = random.normal(size=(shape[0], 1, 1, members))
    specific = random.normal(size=(*shape, members))
    return spread * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * specific)


GAINS, RANKS = (64.0, 724.0), (8, 128)
"""Ends of the measured exponents in G = gamma r and in the rank."""

CONSTANT_GRADIENT, DISPLACEMENT = (-0.563, -0.511), (-0.807, -0.633)
"""Exponents that the two laws predict from G = 64 to 724 after 64 steps, over modules and over K and c."""

SHAPES: dict[str, dict[str, float]] = {
    "equal parabolas": {},
    "skewed, second flatter": {"second_curvature": 0.0055, "skew": 0.1},
}
"""Shapes of the two curves of a pair: what the estimators assume, and what the published curves look like."""

FEWEST = 30
"""Fewest sweeps of a case from which bias, spread and coverage are summarised."""

METHODS: tuple[Method, ...] = ("vertex", "quadratic", "registration")


@dataclass(frozen=True)
class Rule:
    """Prediction of the exponent of a best rate, with the rule that tests it.

    Attributes:
      name: Name in the tables.
      over: Setting that changes.
      prediction: Smallest and largest predicted exponent.
      rivals: Exponents of rival predictions; None accepts every interval that meets the prediction.
    """

    name: str
    over: Literal["gain", "rank"]
    prediction: tuple[float, float]
    rivals: tuple[float, ...] | None

    @property
    def ratio(self) -> float:
        """Second value of the setting divided by the first."""
        ends = GAINS if self.over == "gain" else RANKS
        return ends[1] / ends[0]

    def judge(self, slope: Estimate, *, edge: bool, seeds: int) -> Outcome:
        """Apply the rule to a measured exponent."""
        if self.rivals is not None:
            return judge_range(slope, self.prediction, self.rivals, is_bound=edge, seeds=seeds)
        # A rival that no finite interval contains leaves the overlap with the prediction alone.
        return judge_range(slope, self.prediction, (math.inf,), is_bound=edge, seeds=seeds)


RULES = (
    Rule("constant gradient, rivals", "gain", CONSTANT_GRADIENT, (*RIVALS["gain"], *DISPLACEMENT)),
    Rule("constant gradient, overlap alone", "gain", CONSTANT_GRADIENT, None),
    Rule("displacement, rivals", "gain", DISPLACEMENT, (*RIVALS["gain"], *CONSTANT_GRADIENT)),
    Rule("displacement, overlap alone", "gain", DISPLACEMENT, None),
    Rule("no change in the rank, rivals", "rank", (0.0, 0.0), RIVALS["rank"]),
    Rule("no change in the rank, overlap alone", "rank", (0.0, 0.0), None),
)
TRUE_EXPONENTS = {"gain": (-0.79, -0.65, -0.53), "rank": (0.0, 0.1, 0.2)}
POWER_EXPONENTS = (-0.9, -0.8, -0.75, -0.7, -0.65, -0.53)
"""True exponents in G for which the power of the rule on the displacement law is measured."""

POWER_DESIGNS = tuple(product((2, 3, 5, 8), (3, 5, 7), (1, 2)))
"""Numbers of seeds, of rates and of ranks of the sweeps in the table of power."""

TREND = "flat in the rank, band"
"""Name of the rule of `slopes.trend`: agrees is "flat", contradicts is "grows" or "shrinks"."""


@dataclass(frozen=True)
class VerdictRulesOptions:
    out: Path | None = None
    """Folder for the tables"""
    sweeps: int = 250
    """Number of sweeps of each case"""
    registrations: int = 100
    """Number of sweeps of each case to which registration is applied, which takes ten times as long"""
    seed: int = 0
    """Seed of all draws"""


def yield_cases() -> Iterator[tuple[str, str, SweepModel]]:
    """Yield the setting that changes, the shape's name and the model of every case."""
    for (over, exponents), shape, seeds, rates in product(TRUE_EXPONENTS.items(), SHAPES, (2, 3), (3, 4, 5)):
        low, high = GAINS if over == "gain" else RANKS
        for exponent in exponents:
            yield over, shape, SweepModel(exponent, high / low, seeds, rates, **SHAPES[shape])  # type: ignore[arg-type]


_DIFFERENCES: dict[Method, Callable[[Curve, Curve], np.ndarray]] = {
    "vertex": lambda first, second: log2_rates(second) - log2_rates(first),
    "quadratic": lambda first, second: quadratic_optima(second) - quadratic_optima(first),
    "registration": registration_shifts,
}


def pooled_exponent(pairs: Sequence[tuple[Curve, Curve]], ratio: float, method: Method) -> Estimate:
    r"""Estimate the exponent of the best rate from pairs of curves, pooled with seeds as clusters.

    A pair's exponent is the difference of log2 best rates divided by log2 of the ratio of the setting that changes.
    Each seed's exponent is the mean over the pairs, and the standard error is that of the mean over seeds. Runs of
    different pairs share the seed's records, so they are not independent.

    Args:
      pairs: Pairs of curves of the same seeds, such as one pair for each rank.
      ratio: Second value of the setting that changes, divided by the first.
      method: Estimator of the difference.

    Returns:
      The exponent, with its error over seeds; NaN if a curve has no optimum.
    """
    return over_seeds(np.mean([_DIFFERENCES[method](*pair) for pair in pairs], axis=0) / math.log2(ratio))


def measure_exponents(
    pairs: list[tuple[Curve, Curve]], ratio: float, methods: Iterable[Method]
) -> dict[tuple[str, int], Estimate]:
    """Estimate the exponent of a sweep by every method, from one rank and from all of them.

    The method "as judged" is the one behind the verdicts on the horizon runs: the vertex, with the errors over seeds
    and over records combined.
    """
    as_judged = weighted_log2_rates((-1.0, 1.0), *pairs[0]).times(1 / math.log2(ratio))
    estimates = {("as judged", 1): as_judged}
    for method, count in product(methods, (1, len(pairs))):
        estimates[method, count] = pooled_exponent(pairs[:count], ratio, method)
    return estimates


def exponent_tables(config: VerdictRulesOptions) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Apply the rules and the estimators to the sweeps of every case.

    Returns:
      A row for each rule, estimate and case with the share of each verdict, and a row for each estimator and case with
      its bias, standard deviation, coverage of the 95% interval and median half-width.
    """
    rule_rows: list[dict[str, Any]] = []
    estimator_rows: list[dict[str, Any]] = []
    for number, (over, shape, model) in enumerate(yield_cases()):
        random = np.random.default_rng((config.seed, number))
        labels = {"over": over, "shape": shape, "exponent": model.exponent, "seeds": model.seeds, "rates": model.rates}
        # Estimates of all sweeps, each with whether one of its best rates lies at the end of a grid.
        estimates: dict[tuple[str, int], list[tuple[Estimate, bool]]] = {}
        for place, pairs in enumerate(draw_sweeps(model, config.sweeps, random)):
            methods = METHODS if place < config.registrations else METHODS[:-1]
            edges = [any(curve.edge for curve in pair) for pair in pairs]
            for key, estimate in measure_exponents(pairs, model.ratio, methods).items():
                estimates.setdefault(key, []).append((estimate, any(edges[: key[1]])))
        # Accuracy of each estimator, and verdicts of each rule on its estimates.
        for (method, ranks), sample in estimates.items():
            named = labels | {"estimate": method, "ranks": ranks}
            estimator_rows.append(named | accuracy(model.exponent, sample))
            for rule in RULES:
                if rule.over == over and method != "registration":
                    judged = [rule.judge(value, edge=edge, seeds=model.seeds) for value, edge in sample]
                    low, high = rule.prediction
                    claim = "true" if low <= model.exponent <= high else "false"
                    rule_rows.append({"rule": rule.name} | named | {"claim": claim} | shares(judged))
            if over == "rank" and method != "registration":
                judged = [judge_trend(value, edge=edge) for value, edge in sample]
                claim = "true" if abs(model.exponent) <= BAND else "false"
                rule_rows.append({"rule": TREND} | named | {"claim": claim} | shares(judged))
    return frames.from_rows(rule_rows, list(rule_rows[0])), frames.from_rows(estimator_rows, list(estimator_rows[0]))


def accuracy(truth: float, sample: list[tuple[Estimate, bool]]) -> dict[str, Any]:
    """Compute bias, spread and coverage of estimates.

    Estimates with a best rate at the end of a grid are left out, as are those of a curve without a minimum.
    """
    inner = [estimate for estimate, edge in sample if not edge and math.isfinite(estimate.value)]
    errors = np.array([estimate.value - truth for estimate in inner])
    widths = np.array([estimate.half_width() for estimate in inner])
    return {
        "sweeps": len(inner),
        "at_edge": 1 - len(inner) / len(sample),
        "bias": float(np.mean(errors)) if inner else None,
        "spread": float(np.std(errors, ddof=1)) if len(inner) > 1 else None,
        "coverage": float(np.mean(np.abs(errors) <= widths)) if inner else None,
        "half_width": float(np.median(widths)) if inner else None,
    }


def judge_trend(slope: Estimate, *, edge: bool) -> Outcome:
    """Classify a slope by `slopes.trend`; a best rate at the end of a grid is left out of the slopes."""
    if edge or not slope.has_error:
        return "undecided"
    trends: dict[str, Outcome] = {"flat": "agrees", "undecided": "undecided"}
    return trends.get(trend(SlopeFit(**vars(slope))), "contradicts")


def shares(judged: list[Outcome]) -> dict[str, Any]:
    """Return the number of verdicts and the share of each."""
    outcomes: tuple[Outcome, ...] = ("agrees", "contradicts", "undecided")
    return {"trials": len(judged)} | {outcome: judged.count(outcome) / len(judged) for outcome in outcomes}


def power_table(config: VerdictRulesOptions) -> pd.DataFrame:
    """Measure how often sweeps of several sizes decide on the displacement law, by the true exponent.

    Returns:
      A row for each shape of the curves, estimate (three points as the verdicts use them, or the whole curve), true
      exponent and size of the sweep: ``runs``, the number of training runs; ``claim``, whether the law's prediction
      contains the exponent; the share of each verdict; and ``decided`` and ``right``, the shares of sweeps that decide,
      and that decide rightly.
    """
    rule = next(rule for rule in RULES if rule.name == "displacement, rivals")
    low, high = rule.prediction
    rows: list[dict[str, Any]] = []
    settings = product(SHAPES, POWER_EXPONENTS, POWER_DESIGNS)
    for number, (shape, exponent, (seeds, rates, ranks)) in enumerate(settings):
        random = np.random.default_rng((config.seed, 2 * 10**6 + number))
        model = SweepModel(exponent, rule.ratio, seeds, rates, ranks, **SHAPES[shape])  # type: ignore[arg-type]
        judged: dict[str, list[Outcome]] = {"three points": [], "whole curve": []}
        for pairs in draw_sweeps(model, config.sweeps, random):
            edge = any(curve.edge for pair in pairs for curve in pair)
            curves = [curve for pair in pairs for curve in pair]
            # Mean over ranks of the difference of each pair, whose runs share seeds and records.
            weights = [sign / (ranks * math.log2(rule.ratio)) for _ in pairs for sign in (-1.0, 1.0)]
            for name, estimator in (("three points", weighted_log2_rates), ("whole curve", whole_curve_log2_rates)):
                judged[name].append(rule.judge(estimator(weights, *curves), edge=edge, seeds=seeds))
        claim = "true" if low <= exponent <= high else "false"
        for name, outcomes in judged.items():
            verdicts = shares(outcomes)
            right = verdicts["agrees" if claim == "true" else "contradicts"]
            rows.append(
                {"shape": shape, "estimate": name, "exponent": exponent, "claim": claim}
                | {"seeds": seeds, "rates": rates, "ranks": ranks, "runs": 2 * seeds * rates * ranks}
                | verdicts
                | {"decided": 1 - verdicts["undecided"], "right": right}
            )
    return frames.from_rows(rows, list(rows[0]))


def other_rules(config: VerdictRulesOptions) -> pd.DataFrame:
    """Apply the rules of the coordinate check, the regime and the paper's equations to their own kind of data.

    Returns:
      A row for each rule, ``truth`` (slope or ratio), ``error`` (spread of a seed's slope, or relative standard error)
      and ``samples`` (seeds or adapters), with the share of each verdict. The ``claim`` that the ratio is 1 or the
      slope is 0 is true, false, or "near" if the truth deviates by less than the rule's resolution, where neither
      verdict is wrong.
    """
    random = np.random.default_rng((config.seed, 10**6))
    rows: list[dict[str, Any]] = []
    # Coordinate check: sizes at four ranks, with a slope of its own for every seed.
    ranks = np.array([2.0, 8.0, 32.0, 128.0])
    for slope, spread, seeds in product((0.0, 0.1, 0.2, 0.5), (0.024, 0.1), (2, 3, 4)):
        slopes = slope + spread * random.normal(size=(config.sweeps, seeds, 1))
        fits = [seed_fit(ranks, ranks**by_seed) for by_seed in slopes]
        judged = [judge_trend(Estimate(fit.value, fit.error, seeds, "seeds"), edge=False) for fit in fits]
        labels = {"rule": "coordinate check, flat", "truth": slope, "error": spread, "samples": seeds}
        rows.append(labels | {"claim": "true" if abs(slope) <= BAND else "false"} | shares(judged))
    # Regime: 360 ratios of a run, with errors estimated from the adapters. One verdict covers all: fewer runs suffice.
    comparisons, runs = 360, max(config.sweeps // 4, 1)
    as_outcome: dict[str, Outcome] = {"holds": "agrees", "fails": "contradicts", "undecided": "undecided"}
    for ratio, error, adapters in product((1.0, 1.02, 1.05, 1.25), (0.013, 0.05), (16, 64)):
        judged = []
        for _ in range(runs):
            measured = ratio * (1 + error * random.normal(size=comparisons))
            errors = error * np.sqrt(random.chisquare(adapters - 1, comparisons) / (adapters - 1))
            table = pd.DataFrame({"measured": measured, "standard_error": errors, "predicted": 1.0})
            table = table.assign(adapters=adapters, module="m", split="heldout", optimizer="sgd", init="i", rank=8)
            verdict = judge_regime(table)
            judged.append(as_outcome[verdict["verdict"]] if verdict else "undecided")
        labels = {"rule": "regime, all ratios", "truth": ratio, "error": error, "samples": adapters}
        rows.append(labels | {"claim": claim_of(ratio - 1, RESOLUTION)} | shares(judged))
    # Equations of the paper: one ratio of second moments and one slope, each with a known error.
    z = threshold(FALSE_ALARM, 32)
    for ratio, error in product((1.0, 1.02, 1.05, 1.25), (0.005, 0.02, 0.06)):
        gaps = np.abs(ratio - 1 + error * random.normal(size=config.sweeps))
        judged = judge_gaps(gaps, np.full(config.sweeps, z * error))
        labels = {"rule": "equations, ratio", "truth": ratio, "error": error, "samples": None}
        rows.append(labels | {"claim": claim_of(ratio - 1, RESOLUTION)} | shares(judged))
    for off, error in product((0.0, 0.05, 0.1, 0.5), (0.002, 0.01, 0.02)):
        gaps = np.abs(off + error * random.normal(size=config.sweeps))
        widths = np.full(config.sweeps, z * error)
        judged = judge_gaps(gaps, widths, tolerance=SLOPE_TOLERANCE, resolution=SLOPE_RESOLUTION)
        labels = {"rule": "equations, slope", "truth": off, "error": error, "samples": None}
        rows.append(labels | {"claim": claim_of(off, SLOPE_RESOLUTION)} | shares(judged))
    return frames.from_rows(rows, list(rows[0]))


def claim_of(deviation: float, resolution: float) -> str:
    """Return whether a claim that is off by a deviation is true, false, or too near the truth to count as either."""
    return "true" if not deviation else "false" if deviation >= resolution else "near"


def summarise_rules(rules: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and the largest false verdicts of every rule over its cases.

    Args:
      rules: First table of `exponent_tables`, of which the rows with the estimate "as judged" are used.
      other: `other_rules`.

    Returns:
      A row for each rule: ``true_cases`` and ``false_cases``, the number of cases in which the prediction is true and
      false; ``false_contradicts`` and ``worst_false_contradicts``, and ``true_undecided``, over the true cases;
      ``false_agrees``, ``worst_false_agrees`` and ``false_undecided`` over the false ones.
    """
    rows = []
    columns = ["rule", "claim", "agrees", "contradicts", "undecided"]
    table = pd.concat([rules[rules["estimate"] == "as judged"][columns], other[columns]])
    for rule, group in table.groupby("rule", sort=False):
        true, false = (group[group["claim"] == claim] for claim in ("true", "false"))
        rows.append(
            {"rule": rule, "true_cases": len(true), "false_contradicts": true["contradicts"].mean()}
            | {"worst_false_contradicts": true["contradicts"].max(), "true_undecided": true["undecided"].mean()}
            | {"false_cases": len(false), "false_agrees": false["agrees"].mean()}
            | {"worst_false_agrees": false["agrees"].max(), "false_undecided": false["undecided"].mean()}
        )
    return frames.from_rows(rows, list(rows[0]))


def summarise_estimators(estimators: pd.DataFrame) -> pd.DataFrame:
    """Return bias, spread and coverage of every estimator by shape, as means over the cases.

    The largest bias and the smallest coverage are those of a single case. Cases in which fewer than `FEWEST` sweeps
    have all best rates inside their grids are left out.
    """
    by_case = estimators[estimators["sweeps"] >= FEWEST].groupby(["estimate", "ranks", "shape", "seeds"], sort=False)
    return by_case.agg(
        cases=("bias", "size"),
        bias=("bias", "mean"),
        largest_bias=("bias", lambda values: float(np.max(np.abs(values)))),
        spread=("spread", "mean"),
        coverage=("coverage", "mean"),
        lowest_coverage=("coverage", "min"),
        half_width=("half_width", "median"),
    ).reset_index()


def summary(config: VerdictRulesOptions, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the settings of the benchmark, and its key figures."""
    by_rule = tables["by_rule.csv"].set_index("rule")
    judged = tables["rules.csv"].query("estimate == 'as judged'")
    intervals = tables["estimators.csv"].query("estimate == 'as judged' and sweeps >= @FEWEST")
    return {
        "settings": {key: value for key, value in asdict(config).items() if key != "out"},
        "model": asdict(SweepModel(-0.65, GAINS[1] / GAINS[0], 2, 3)),
        "predictions": {"constant gradient": CONSTANT_GRADIENT, "displacement": DISPLACEMENT},
        "coverage": {
            str(seeds): {"mean": float(group["coverage"].mean()), "lowest": float(group["coverage"].min())}
            for seeds, group in intervals.groupby("seeds")
        },
        "false_agrees": by_rule["false_agrees"].to_dict(),
        "false_contradicts": by_rule["false_contradicts"].to_dict(),
        "undecided": {
            str(seeds): float(group["undecided"].mean())
            for seeds, group in judged[judged["rule"].str.contains("rivals")].groupby("seeds")
        },
        "standard_error_of_a_share": 0.5 / math.sqrt(config.sweeps),
    }


def measure_rules(config: VerdictRulesOptions) -> dict[str, pd.DataFrame]:
    """Return all tables by the names of their files."""
    rules, estimators = exponent_tables(config)
    other = other_rules(config)
    return {
        "rules.csv": rules,
        "power.csv": power_table(config),
        "estimators.csv": estimators,
        "other_rules.csv": other,
        "by_rule.csv": summarise_rules(rules, other),
        "by_estimator.csv": summarise_estimators(estimators),
    }


def main(config: VerdictRulesOptions) -> None:
    """Measure the error rates, print the summaries and write the files."""
    tables = measure_rules(config)
    columns = {"rule": "{rule}", "false contradicts": "{false_contradicts:.1%} (worst {worst_false_contradicts:.1%})"}
    columns |= {"false agrees": "{false_agrees:.1%} (worst {worst_false_agrees:.1%})"}
    columns |= {"undecided if true": "{true_undecided:.0%}", "if false": "{false_undecided:.0%}"}
    print_records("False verdicts", tables["by_rule.csv"], columns, left=1)
    columns = {"estimate": "{estimate}", "exponent": "{exponent}", "seeds": "{seeds}", "rates": "{rates}"}
    columns |= {"ranks": "{ranks}", "decided": "{decided:.0%}", "rightly": "{right:.0%}"}
    print_records("Power: sweeps that decide on the displacement law", tables["power.csv"], columns, left=1)
    columns = {"estimate": "{estimate}", "ranks": "{ranks}", "shape": "{shape}", "seeds": "{seeds}"}
    columns |= {"bias": "{bias:+.3f}", "spread": "{spread:.3f}", "coverage": "{coverage:.1%}"}
    columns |= {"lowest": "{lowest_coverage:.1%}", "half-width": "{half_width:.2f}"}
    print_records("Estimators of an exponent", tables["by_estimator.csv"], columns, left=1)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_whole(config.out / name, frames.to_csv(table))
        write_whole(config.out / "summary.json", json.dumps(summary(config, tables), indent=2) + "\n")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse(VerdictRulesOptions, description=__doc__ or "")))
