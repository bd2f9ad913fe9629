"""Best rates of curves, their slopes in the rank, and rules against each other at their best rates."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rora_theory.stats import rate_curves
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.rate_curves import Curve

RATES = np.array([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
DECADES = np.array([0.1, 1.0, 10.0])


def curve(losses: Any, rates: np.ndarray = RATES, *, rule: str = "lora", rank: int = 8, **fields: Any) -> Curve:
    """Return a curve at gamma = 16 / r^kappa of AdamW on both factors, with changed fields."""
    kappa = 0.5 if rule == "rora" else 1.0
    fields = {"optimizer": "adamw", "trained": "both", "scaling": 16 / rank**kappa} | fields
    return Curve(rule=rule, kappa=kappa, rank=rank, rates=rates, losses=np.atleast_2d(losses), **fields)


def bowl(
    rule: str, rank: int, centre: float | np.ndarray, *, lowest: float = 1.0, seeds: int = 3, **fields: Any
) -> Curve:
    """Return parabolas in the log loss around ``centre``, on the grid `RATES`, different for each seed."""
    level = lowest * (1 + 0.01 * np.arange(seeds))[:, None]
    return curve(level * np.exp(0.1 * np.log(RATES / centre) ** 2), rule=rule, rank=rank, **fields)


def levels(by_seed: list[float], by_draw: list[float] | None = None, seeds: tuple[int, ...] = ()) -> Curve:
    """Return flat curves with given lowest losses for the seeds, and for resamples of four records."""
    drawn = None if by_draw is None else np.repeat(np.outer(by_draw, np.ones(3))[:, None], len(by_seed), axis=1)
    return curve(np.outer(by_seed, np.ones(3)), DECADES, rank=4, resampled=drawn, records=4, seeds=seeds)


def slopes_of(curves: Sequence[Curve]) -> list[dict]:
    return rate_curves.rate_slopes(curves).to_dict("records")


def compare(first: Curve, second: Curve) -> rate_curves.Comparison:
    (comparison,) = rate_curves.compare_rules([first, second])
    return comparison


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.001, -0.001, 0.0], "equal to 1%"),
        ([-0.2, -0.21, -0.19], "lora is better by 20.00%"),
        ([0.2, 0.21, 0.19], "rora is better by 20.00%"),
        ([0.2, -0.1, 0.05], "undecided"),  # 2 standard errors are no interval at three seeds
        ([0.1, 0.3, 0.14], "undecided"),
    ],
)
def test_a_comparison_s_verdict(differences, word):
    """Student's t over seeds decides: better, equal within 1%, or undecided."""
    differences = 4 * np.array(differences)
    second = np.tile([4.008, 4.0, 4.008], (3, 1))  # a grid that may hide 0.06%
    first = second + differences[:, None]
    curves = [
        curve(losses, DECADES, rule=rule, optimizer="sgd") for rule, losses in (("lora", first), ("rora", second))
    ]
    comparison = compare(*curves)
    assert comparison.verdict.startswith(word)
    assert comparison.grid_error == pytest.approx(0.0024, rel=2e-3)
    half = over_seeds(differences).half_width() + comparison.grid_error
    assert comparison.half_width == pytest.approx(half, rel=1e-9)
    assert comparison.scaling_ratio == pytest.approx(8), "gamma squared, to which an SGD step is proportional"
    assert (comparison.first_loss, comparison.second_loss) == pytest.approx((4 + np.mean(differences), 4.0))


def test_a_rank_whose_best_rate_is_at_the_edge_is_in_no_slope():
    """Three ranks are on the line rate = r^-1/2; two more have best rates outside the grid, below and above."""
    inside, single, pair = (
        [bowl("rora", rank, 4e-3 * rank**-0.5, seeds=seeds) for rank in (4, 16, 64)] for seeds in (3, 1, 2)
    )
    beyond = [bowl("rora", 4096, 1e-6), bowl("rora", 1, 1.0)]
    assert [beyond_curve.edge for beyond_curve in beyond] == ["low", "high"]
    (row,) = slopes_of([*inside, *beyond])
    assert (row["ranks"], row["slope"], row["verdict"]) == ("4 16 64", pytest.approx(-0.5, abs=1e-4), "shrinks")
    assert row["nearest"] == "signal"
    assert row["standard_error"] == pytest.approx(0, abs=1e-9)
    assert slopes_of([inside[0], *beyond]) == []
    (row,) = slopes_of(single)
    assert (row["standard_error"], row["half_width"], row["verdict"]) == (None, None, "undecided")
    (row,) = slopes_of(pair)
    assert (row["standard_error"], row["verdict"]) == (pytest.approx(0, abs=1e-9), "shrinks")


@pytest.mark.parametrize(
    ("centres", "is_settled"),
    [((1e-6, 1e-3), False), ((1e-3, 1.0), False), ((1e-6, 1.0), False), ((1e-3, 1e-3), True)],
)
def test_a_comparison_with_a_best_rate_at_the_edge_is_not_settled(centres, is_settled):
    """However large the difference is, the loss at the edge may be lower beyond it."""
    comparison = compare(bowl("lora", 8, centres[0]), bowl("rora", 8, centres[1], lowest=3))
    assert comparison.verdict.endswith("; a best rate at the grid's edge, so not settled") != is_settled
    assert (comparison.ratio_log2_error is not None) == is_settled


SHAPES = {
    "a parabola": lambda x: x**2,
    "steep above": lambda x: np.exp(2 * x) - 2 * x - 1,
    "steeper above": lambda x: np.exp(4 * x) - 4 * x - 1,
    "flattening": lambda x: np.sqrt(1 + x**2) - 1,
    "flat at the bottom": lambda x: x**4,
}
"""Curves with their minimum, 0, at 0."""


def shifted(rule: str, shape: str, centre: float, step: float, higher: float = 0.0) -> Curve:
    """Return three seeds of one curve in the logarithm of the rate, on a grid with this step."""
    rates = np.exp(step * np.arange(-6, 7))
    depths = 1 + 0.05 * np.minimum(SHAPES[shape](np.log(rates / centre)), 1e3)
    return curve((1 + 0.01 * np.arange(3))[:, None] * depths + higher, rates, rule=rule)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [np.log(10) / 2, np.log(2) / 2])
def test_a_shift_of_the_rate_is_no_difference(shape, step):
    """Curves shifted by parts of a grid step differ in their measured lowest losses, but not in the true ones."""
    curves = [shifted(f"{part:g}", shape, np.exp(part * step), step) for part in np.linspace(0, 1, 9)]
    comparisons = rate_curves.compare_rules(curves)
    assert len(comparisons) == 36
    assert [comparison.verdict for comparison in comparisons if "more than a shift" in comparison.verdict] == []
    assert all(abs(comparison.difference) <= comparison.grid_error for comparison in comparisons)


def test_a_difference_beyond_a_shift_is_found():
    """A lowest loss 3% higher is detected on a half-decade grid with a bound of 2%."""
    step = np.log(10) / 2
    comparison = compare(shifted("a", "a parabola", 1.0, step), shifted("b", "a parabola", 2.0, step, higher=0.03))
    assert comparison.verdict.startswith("a is better by")


def test_between_two_diverged_runs_nothing_is_decided():
    rates, losses = np.array([0.1, 0.5, 1.0, 3.0]), np.tile([np.inf, np.inf, 1.0, np.inf], (2, 1))
    comparison = compare(*(curve(losses, rates, rule=rule) for rule in ("a", "b")))
    assert comparison.verdict == "undecided: a best rate lies between two that diverged"
    assert (comparison.half_width, comparison.grid_error) == (None, None)


def test_rules_are_compared_at_the_largest_rank_that_both_have():
    curves = [bowl(rule, rank, 1e-3) for rule, ranks in (("lora", (4, 16, 64)), ("rora", (4, 16))) for rank in ranks]
    (comparison,) = rate_curves.compare_rules(curves)
    assert (comparison.rank, comparison.first, comparison.second, comparison.scaling_ratio) == (16, "lora", "rora", 4)


def test_the_spread_of_resamples_gives_the_error_over_records():
    """The error over seeds is that of their mean, the error over four records the deviation of the resamples times
    sqrt(4 / 3); both add in squares.

    The value is the mean over seeds; resamples have another mean, which is reported only for a single seed.
    """
    values, near = [1.0, 2.0, 4.0, 9.0], [5.999, 6.0, 6.001]
    wide, narrow = (over_seeds(np.array(by_seed)).error for by_seed in (values, near))
    wide_drawn, narrow_drawn = (np.std(drawn, ddof=1) * (4 / 3) ** 0.5 for drawn in (values, near))
    lowest = rate_curves.Curve.lowest_losses
    assert rate_curves.estimate(lowest, levels(values)) == Estimate(4.0, wide, 4, "seeds")
    single = rate_curves.estimate(lowest, levels([7.0], values))
    assert (single.value, single.n, single.over) == (4.0, 4, "held-out records")
    assert single.error == pytest.approx(wide_drawn, rel=1e-12)
    for without_error in (levels([7.0]), dataclasses.replace(levels([7.0], values), records=1)):
        assert rate_curves.estimate(lowest, without_error).over == ""
    both = rate_curves.estimate(lowest, levels(values, near))
    assert (both.value, both.over, both.n) == (4.0, "seeds and held-out records", 4)  # 3.0000 degrees of freedom
    assert both.error == pytest.approx(np.hypot(wide, narrow_drawn), rel=1e-12)
    both = rate_curves.estimate(lowest, levels(near, values))
    assert both.error == pytest.approx(np.hypot(narrow, wide_drawn), rel=1e-12)
    assert (both.value, both.n) == (pytest.approx(6.0), 4)


@pytest.mark.parametrize(
    ("seeds", "records", "n", "over"),
    [
        ((0.3, 3), (0.2, 1000), 3, "seeds"),  # 4.17 degrees of freedom: sqrt(0.13) by 2.78 is less than 0.3 by 4.30
        ((0.3, 3), (0.1, 1000), 3, "seeds and held-out records"),
        ((0.3, 12), (0.3, 1000), 44, "seeds and held-out records"),  # 43.5
        ((0.1, 12), (0.5, 1000), 944, "seeds and held-out records"),
        ((0.3, 2), (0.01, 1000), 2, "seeds and held-out records"),  # 1.002
        ((0.0, 3), (0.0, 1000), 1000, "held-out records"),
        ((0.0, 3), (0.2, 1000), 1000, "held-out records"),
        ((0.3, 3), (0.0, 1000), 3, "seeds"),
        ((math.inf, 1), (0.2, 1000), 1000, "held-out records"),
        # Errors of equal values are 1e-16, not 0, and integer degrees of freedom may be computed slightly too low.
        ((1e-16, 3), (0.2, 1000), 1000, "held-out records"),
        ((0.3, 3), (1e-16, 1000), 3, "seeds"),
        ((0.3129848800232429, 16), (0.3129848800232429, 16), 31, "seeds and held-out records"),  # float64: 29.999...
        ((0.7827003757293756, 22), (5.5e-9, 400), 22, "seeds and held-out records"),  # float64: 20.999...
    ],
)
def test_seeds_and_records_are_two_sources_of_error(seeds, records, n, over):
    """Errors add in squares, degrees of freedom by Welch and Satterthwaite; the value is the mean over seeds."""
    by_seeds = Estimate(2.0, *seeds, "seeds" if seeds[1] > 1 else "")
    by_records = Estimate(2.1, *records, "held-out records")
    combined = rate_curves.combine_errors(by_seeds, by_records)
    assert (combined.value, combined.n, combined.over) == (2.0, n, over)
    if over == "seeds and held-out records":
        assert combined.error == pytest.approx(np.hypot(seeds[0], records[0]))
    known = [source.half_width() for source in (by_seeds, by_records) if source.has_error]
    assert combined.half_width() >= max(known)


def test_curves_are_paired_by_their_seeds():
    """Differences are paired by seed, in any order; a seed that one curve lacks is ignored."""
    first, second = levels([5.0, 1.0, 9.0], seeds=(1, 0, 2)), levels([0.5, 4.5], seeds=(0, 1))
    both = rate_curves.at_shared_seeds(first, second)
    assert [curve.seeds for curve in both] == [(1, 0)] * 2
    assert rate_curves.estimate_loss_difference(*both) == Estimate(0.5, 0.0, 2, "seeds")
    assert rate_curves.at_shared_seeds(first, levels([1.0], seeds=(3,))) == ()
    assert rate_curves.at_shared_seeds(first, levels([1.0]))[0].seeds == (0,), "unnamed seeds are numbered from 0"
    drawn = levels([5.0, 1.0], [1.0, 2.0], seeds=(4, 7)).select_seeds([7])
    assert (drawn.losses.tolist(), drawn.resampled.shape) == ([[1.0] * 3], (2, 1, 3))
    lora, rora = (
        dataclasses.replace(bowl(rule, 8, 1e-3, seeds=2), seeds=seeds)
        for rule, seeds in (("lora", (0, 1)), ("rora", (2, 3)))
    )
    assert rate_curves.compare_rules([lora, rora]) == []
    comparison = compare(lora, dataclasses.replace(rora, losses=rora.losses[::-1] + 0.5, seeds=(1, 0)))
    assert (comparison.difference, comparison.standard_error) == (pytest.approx(-0.5), pytest.approx(0, abs=1e-12))
    line = [bowl("rora", rank, 4e-3 * rank**-0.5, seeds=2) for rank in (4, 16)]
    assert slopes_of([dataclasses.replace(line[at], seeds=(at, at + 2)) for at in (0, 1)]) == []


def test_a_rare_draw_at_the_grid_s_end_is_no_edge():
    """A single seed is at the edge if 2.5% of its resampled curves are; several seeds are if one of them is."""
    inside, end = [2.0, 1.0, 2.0], [3.0, 2.0, 1.0]

    def edge(losses: list[list[float]], draws: list[list[float]] | None) -> str:
        resampled = None if draws is None else np.repeat(np.array(draws)[:, None], len(losses), axis=1)
        return curve(losses, DECADES, resampled=resampled).edge

    assert edge([inside], [inside] * 97 + [end] * 2) == ""
    assert edge([inside], [inside] * 97 + [end] * 3) == "high"
    assert edge([inside, inside, end], None) == "high"
    assert edge([inside, inside, end], [inside] * 100) == "high"
    assert edge([inside, inside], [inside] * 97 + [end] * 2) == ""
    assert edge([inside, inside], [inside] * 97 + [end] * 3) == "high", "the mean of the seeds may end there"


def test_best_rates_and_their_ratio():
    """Rates in numbers, errors in powers of two, and what the errors are over."""
    # Of two seeds: the mean of the logs is in between.
    by_seed = bowl("lora", 8, np.array([[1e-3], [2e-3]]), seeds=2)
    losses = by_seed.losses / np.array([[1.0], [1.01]])
    drawn = curve(losses[:1], resampled=losses[:, None], records=96)
    alone, twice = curve(losses[:1], rule="rora"), curve(losses[[0, 0]], rule="rora")
    rows = rate_curves.tabulate_best_rates([by_seed, drawn, alone]).to_dict("records")
    assert rows[0]["best_rate"] == pytest.approx(2**0.5 * 1e-3, rel=1e-4)
    assert rows[0]["log2_error"] == pytest.approx(0.5)  # half of log2(2), over sqrt(2) by sqrt(2)
    assert rows[0]["log2_half_width"] == pytest.approx(12.706 * 0.5, rel=1e-2)  # Student's t, of two seeds
    assert [row["error_over"] for row in rows] == ["seeds", "held-out records", ""]
    assert [math.isnan(row["log2_error"]) for row in rows] == [False, False, True]
    assert math.isnan(rows[2]["log2_half_width"])
    comparison = compare(alone, curve(losses[1:]))
    ratio = pytest.approx(0.5, rel=1e-3)
    assert (comparison.first, comparison.ratio, comparison.ratio_log2_error) == ("rora", ratio, None)
    comparison = compare(twice, by_seed)
    assert comparison.ratio == pytest.approx(2**-0.5, rel=1e-3)
    assert comparison.ratio_log2_error == pytest.approx(0.5, rel=1e-2)
    assert comparison.ratio_log2_half_width == pytest.approx(12.706 * 0.5, rel=1e-2)


def test_a_best_rate_at_an_edge_has_no_error_and_beside_a_diverged_run_a_bound():
    """All seeds have one best rate, so that their spread is 0; the bound is not."""
    rates, errors = np.array([1e-3, 2e-3, 4e-3, 8e-3]), {}
    for name, losses in (("edge", [4.0, 3.0, 2.0, 1.0]), ("beside", [3.0, 2.0, 1.0, np.inf]), ("in", [2.0, 1, 2, 3])):
        curves = [curve(np.tile(losses, (3, 1)), rates, rule=rule) for rule in ("lora", "rora")]
        (row, _), comparison = rate_curves.tabulate_best_rates(curves).to_dict("records"), compare(*curves)
        errors[name] = (row["edge"], row["log2_error"], row["log2_half_width"])
        errors[name] += (comparison.ratio_log2_error, comparison.ratio_log2_half_width)
    # Half a step of each of the two; the spread of the logs of equal rates is rounding.
    assert errors["beside"] == ("", *(pytest.approx(value, abs=1e-12) for value in (0, 0.5, 0, 1)))
    assert errors["in"] == ("", *(pytest.approx(0, abs=1e-12) for _ in range(4)))
    assert errors["edge"] == ("high", None, None, None, None)


def with_records(single: Curve) -> Curve:
    return dataclasses.replace(single, resampled=np.stack([single.losses, 1.001 * single.losses]), records=96)


def test_one_seed_cannot_distinguish_rules():
    """However narrow the error over records is, it does not contain the variation between training runs."""
    curves = [bowl(rule, 8, 1e-3, seeds=1, lowest=lowest) for rule, lowest in (("lora", 1), ("rora", 2))]
    comparison = compare(*map(with_records, curves))
    assert comparison.error_over == "held-out records"
    assert comparison.verdict.startswith("undecided: one seed (-")
    # Two seeds that agree exactly leave the error over records, but are two.
    pair = [dataclasses.replace(single, losses=np.tile(single.losses, (2, 1))) for single in curves]
    comparison = compare(*map(with_records, pair))
    assert comparison.error_over == "held-out records"
    assert comparison.verdict.startswith("lora is better by")


def test_one_seed_decides_no_slope():
    verdicts = [
        row["verdict"]
        for seeds in (2, 1)
        for row in slopes_of([with_records(bowl("lora", rank, 1e-3, seeds=seeds)) for rank in (8, 64)])
    ]
    assert verdicts == ["flat", "undecided"]


def test_a_slope_beside_runs_that_diverged_is_known_to_the_grid():
    """Three seeds at one grid point have no spread; the bound from the grid is part of the interval."""
    losses = np.where(RATES <= 1e-3, 1 + 0.1 * np.log(RATES / 1e-3) ** 2, np.nan)
    (row,) = slopes_of([curve(np.tile(losses, (3, 1)), rank=rank) for rank in (8, 32)])
    hidden = 2 * math.log(1e-3 / 3e-4) / 2 / math.log(4)  # half of the wider step, at either end
    assert (row["slope"], row["half_width"]) == (pytest.approx(0, abs=1e-12), pytest.approx(hidden, abs=0.01))
    assert row["verdict"] == "undecided"


def test_best_rates_that_rise_and_fall_are_not_flat():
    """Best rates that rise and fall have a slope of zero, but are not on a line."""
    (row,) = slopes_of([bowl("lora", rank, best) for rank, best in ((4, 5e-4), (16, 4e-3), (64, 5e-4))])
    assert abs(row["slope"]) + row["half_width"] < 0.1
    assert row["verdict"] == "undecided"


@pytest.mark.parametrize(("slope", "nearest"), [(0.08, "signal or A moves"), (0.25, ""), (0.42, "cross-talk")])
def test_the_nearest_prediction_lies_within_the_band(slope, nearest):
    """Predictions 0 and 1/2 under Adam and alpha / r, without spread over seeds: named within 0.1 and no further."""
    curves = [bowl("lora", rank, 1e-3 * (rank / 8) ** slope) for rank in (8, 16, 32)]
    (row,) = slopes_of(curves)
    assert row["slope"] == pytest.approx(slope, abs=0.005)
    assert row["half_width"] < 0.01
    assert row["nearest"] == nearest


def test_a_moves_is_no_prediction_where_a_is_frozen():
    (row,) = slopes_of([bowl("lora", rank, 1e-3, trained="B") for rank in (4, 16)])
    assert (row["nearest"], row["A moves"]) == ("signal", None)


def test_an_inaccurate_slope_names_all_predictions_in_its_interval():
    centres = 1e-3 * 4 ** np.array([[0.04], [0.24], [0.44]])
    (row,) = slopes_of([bowl("lora", 8, 1e-3), bowl("lora", 32, centres)])
    assert row["half_width"] > 0.3
    assert row["nearest"] == "signal or cross-talk or A moves"


def test_the_grid_error_is_the_mean_over_seeds_or_draws():
    shallow, steep = np.array([1.1, 1.0, 1.1]), np.array([1.4, 1.0, 1.4])
    alone = [curve(losses, DECADES).grid_error for losses in (shallow, steep)]
    assert alone[0] < alone[1] / 2
    assert curve([shallow, steep], DECADES).grid_error == pytest.approx(np.mean(alone), rel=1e-12)
    drawn = curve(shallow, DECADES, resampled=np.array([[shallow], [steep], [steep]]))
    assert drawn.grid_error == pytest.approx((alone[0] + 2 * alone[1]) / 3, rel=1e-12)


@pytest.mark.slow
def test_both_errors_cover_the_spread_over_seeds_and_records():
    """The mean over three seeds scored on the same records: its 95% interval holds the truth in 95% of 4000 worlds or
    more, in which either error alone holds it less often."""
    random, worlds, n = np.random.default_rng(0), 4000, 8
    seeds, shared = random.normal(size=(worlds, n)), random.normal(size=worlds) / n**0.5  # both errors alike
    held = {"both": 0, "seeds": 0}
    for values, common in zip(seeds, shared, strict=True):
        by_seeds = Estimate(values.mean() + common, values.std(ddof=1) / n**0.5, n, "seeds")
        both = rate_curves.combine_errors(by_seeds, Estimate(0.0, 1 / n**0.5, 1000, "held-out records"))
        for name, estimate in (("both", both), ("seeds", by_seeds)):
            held[name] += abs(estimate.value) <= estimate.half_width()
    assert held["both"] / worlds > 0.94  # 0.95 less three standard errors
    assert held["seeds"] / worlds < 0.90


def test_noise_of_repeated_runs_gives_an_error_around_the_measured_value() -> None:
    """Draws of the noise are not measurements: their mean is the value for records, not for repeated runs."""
    losses = np.array([[1.2, 1.0, 1.1]])
    drawn = losses * np.exp(0.01 * np.random.default_rng(1).normal(size=(300, 1, 3))) * 1.05
    by_records = curve(losses, DECADES, resampled=drawn, records=60)
    by_repeats = dataclasses.replace(by_records, resampled_over=rate_curves.REPEATS)
    mean = float(drawn.min(axis=2).mean())
    for sampled, value, over in ((by_records, mean, "held-out records"), (by_repeats, 1.0, rate_curves.REPEATS)):
        lowest = rate_curves.estimate(Curve.lowest_losses, sampled)
        assert (lowest.value, lowest.over, lowest.n) == (pytest.approx(value), over, 60)
        assert lowest.error == pytest.approx(np.std(drawn.min(axis=2), ddof=1) * np.sqrt(60 / 59))
