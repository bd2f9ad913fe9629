"""Best rates of curves, their slopes in the rank, and rules against each other at their best rates."""

import dataclasses
import math

import numpy as np
import pytest

from rora_theory.stats import rate_curves
from rora_theory.stats.estimate import Estimate, over_seeds

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


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
    """Student's t over seeds: better, equal within 1%, or undecided."""
    rates = np.array([0.1, 1.0, 10.0])
    second = np.tile([1.002, 1.0, 1.002], (3, 1))  # a grid that may hide 0.06%
    first = second + np.array(differences)[:, None]
    kinds = (("lora", 1.0, 0.5, first), ("rora", 0.5, 1.0, second))
    curves = [
        rate_curves.Curve("sgd", "both", rule, kappa, 4, gamma, rates, losses) for rule, kappa, gamma, losses in kinds
    ]
    (comparison,) = rate_curves.compare_rules(curves)
    assert comparison.verdict.startswith(word)
    assert comparison.grid_error == pytest.approx(0.0006, rel=2e-3)
    half = over_seeds(np.array(differences)).half_width() + comparison.grid_error
    assert comparison.half_width == pytest.approx(half, rel=1e-9)
    assert comparison.scaling_ratio == 4, "gamma squared: what an SGD step is proportional to"
    assert (comparison.first_loss, comparison.second_loss) == pytest.approx((1 + np.mean(differences), 1.0))


def bowl(
    rule: str, kappa: float, rank: int, centre: float, *, lowest: float = 1.0, seeds: int = 3
) -> rate_curves.Curve:
    """Parabolas in log loss around ``centre``, on the grid `RATES`, no two seeds alike."""
    level = lowest * (1 + 0.01 * np.arange(seeds))[:, None]
    losses = level * np.exp(0.1 * np.log(np.array(RATES) / centre) ** 2)
    return rate_curves.Curve("adamw", "both", rule, kappa, rank, 16 / rank**kappa, np.array(RATES), losses)


def slopes_of(curves: list[rate_curves.Curve]) -> list[dict]:
    return rate_curves.rate_slopes(curves).to_dict("records")


def test_a_rank_whose_best_rate_is_at_the_edge_is_in_no_slope():
    """Three ranks on the line rate = r^-1/2; two more whose best rates lie beyond the grid, below and above."""
    inside = [bowl("rora", 0.5, rank, 4e-3 * rank**-0.5) for rank in (4, 16, 64)]
    beyond = [bowl("rora", 0.5, 4096, 1e-6), bowl("rora", 0.5, 1, 1.0)]
    assert [curve.edge for curve in beyond] == ["low", "high"]
    (row,) = slopes_of([*inside, *beyond])
    assert (row["ranks"], row["slope"], row["verdict"]) == ("4 16 64", pytest.approx(-0.5, abs=1e-4), "shrinks")
    assert row["nearest"] == "signal"
    assert row["standard_error"] == pytest.approx(0, abs=1e-9)
    assert slopes_of([inside[0], *beyond]) == []
    (single,) = slopes_of([bowl("rora", 0.5, rank, 4e-3 * rank**-0.5, seeds=1) for rank in (4, 16, 64)])
    assert (single["standard_error"], single["half_width"], single["verdict"]) == (None, None, "undecided")
    (pair,) = slopes_of([bowl("rora", 0.5, rank, 4e-3 * rank**-0.5, seeds=2) for rank in (4, 16, 64)])
    assert (pair["standard_error"], pair["verdict"]) == (pytest.approx(0, abs=1e-9), "shrinks")


@pytest.mark.parametrize("edge", ["first", "second", "both"])
def test_a_comparison_with_a_best_rate_at_the_edge_is_not_settled(edge):
    """However large the difference is, the loss at the edge may be lower beyond it."""
    kinds = {"first": (1e-6, 1e-3), "second": (1e-3, 1.0), "both": (1e-6, 1.0)}[edge]
    first, second = (
        bowl(rule, 1.0, 8, centre, lowest=lowest)
        for rule, centre, lowest in zip(("lora", "rora"), kinds, (1, 3), strict=True)
    )
    (comparison,) = rate_curves.compare_rules([first, second])
    assert comparison.verdict.endswith("; a best rate at the grid's edge, so not settled")
    (settled,) = rate_curves.compare_rules([bowl("lora", 1.0, 8, 1e-3), bowl("rora", 1.0, 8, 1e-3, lowest=3)])
    assert "settled" not in settled.verdict


SHAPES = {
    "a parabola": lambda x: x**2,
    "steep above": lambda x: np.exp(2 * x) - 2 * x - 1,
    "steeper above": lambda x: np.exp(4 * x) - 4 * x - 1,
    "flattening": lambda x: np.sqrt(1 + x**2) - 1,
    "flat at the bottom": lambda x: x**4,
}
"""Curves with their minimum, 0, at 0."""


def shifted(rule: str, shape: str, centre: float, step: float) -> rate_curves.Curve:
    """Three seeds of one curve in the logarithm of the rate, on a grid with this step."""
    rates = np.exp(step * np.arange(-6, 7))
    losses = (1 + 0.01 * np.arange(3))[:, None] * (1 + 0.05 * np.minimum(SHAPES[shape](np.log(rates / centre)), 1e3))
    return rate_curves.Curve("adamw", "both", rule, 1.0, 8, 1.0, rates, losses)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [np.log(10) / 2, np.log(2) / 2])
def test_a_shift_of_the_rate_is_no_more_than_that(shape, step):
    """Curves shifted by parts of a grid step differ in their measured lowest losses, but not in the true ones."""
    curves = [shifted(f"{part:g}", shape, np.exp(part * step), step) for part in np.linspace(0, 1, 9)]
    comparisons = rate_curves.compare_rules(curves)
    assert len(comparisons) == 36
    assert [comparison.verdict for comparison in comparisons if "more than a shift" in comparison.verdict] == []
    assert all(abs(comparison.difference) <= comparison.grid_error for comparison in comparisons)


def test_more_than_a_shift_is_still_found():
    """A lowest loss 3% higher is detected on a half-decade grid with a bound of 2%."""
    first, second = (shifted(rule, "a parabola", centre, np.log(10) / 2) for rule, centre in (("a", 1.0), ("b", 2.0)))
    higher = rate_curves.Curve(*second.line, 8, 1.0, second.rates, second.losses + 0.03)
    (comparison,) = rate_curves.compare_rules([first, higher])
    assert comparison.verdict.startswith("a is better by")


def test_between_two_diverged_runs_nothing_is_decided():
    rates, losses = np.array([0.1, 0.5, 1.0, 3.0]), np.tile([np.inf, np.inf, 1.0, np.inf], (2, 1))
    curves = [rate_curves.Curve("sgd", "both", rule, 1.0, 4, 1.0, rates, losses) for rule in ("a", "b")]
    (comparison,) = rate_curves.compare_rules(curves)
    assert comparison.verdict == "undecided: a best rate lies between two that diverged"
    assert (comparison.half_width, comparison.grid_error) == (None, None)


def test_rules_are_compared_at_the_largest_rank_that_both_have():
    curves = [bowl("lora", 1.0, rank, 1e-3) for rank in (4, 16, 64)] + [
        bowl("rora", 0.5, rank, 1e-3) for rank in (4, 16)
    ]
    (comparison,) = rate_curves.compare_rules(curves)
    assert (comparison.rank, comparison.first, comparison.second, comparison.scaling_ratio) == (16, "lora", "rora", 4)


def test_no_prediction_is_named_that_the_slope_is_far_from():
    """A best rate that rises, where all three predictions are that it falls or stays."""
    (row,) = slopes_of([bowl("rora", 0.5, rank, 5e-4 * rank**0.5) for rank in (4, 16)])
    assert (row["slope"], row["nearest"]) == (pytest.approx(0.5, abs=1e-4), "")


def test_predictions_that_are_one_number_are_all_named():
    """Under alpha / r both the first step and a long run in the signal regime predict a constant best rate for Adam."""
    (row,) = slopes_of([bowl("lora", 1.0, rank, 1e-3) for rank in (4, 16)])
    assert row["nearest"] == "signal or A moves"
    frozen = [dataclasses.replace(bowl("lora", 1.0, rank, 1e-3), trained="B") for rank in (4, 16)]
    (row,) = slopes_of(frozen)
    assert (row["nearest"], row["A moves"]) == ("signal", None), "A does not move"


def levels(by_seed: list[float], by_draw: list[float] | None = None, seeds: tuple[int, ...] = ()) -> rate_curves.Curve:
    """Return flat curves with given lowest losses for the seeds, and for resamples of their mean."""
    three = np.ones(3)
    drawn = None if by_draw is None else np.repeat(np.outer(by_draw, three)[:, None], len(by_seed), axis=1)
    rates = np.array([0.1, 1.0, 10.0])
    return rate_curves.Curve("adamw", "both", "lora", 1.0, 4, 1.0, rates, np.outer(by_seed, three), drawn, seeds)


def test_a_draw_s_spread_is_the_error_itself():
    """The error over seeds is that of their mean, the error over resamples their deviation; both add in squares.

    The combined interval is not narrower than either alone.
    """
    values = [1.0, 2.0, 4.0, 9.0]
    wide, near = np.std(values, ddof=1), [3.999, 4.0, 4.001]
    lowest = rate_curves.Curve.lowest_losses
    assert rate_curves.estimate(lowest, levels(values)) == Estimate(4.0, wide / 2, 4, "seeds")
    assert rate_curves.estimate(lowest, levels([7.0], values)) == Estimate(4.0, wide, 4, "held-out records")
    assert rate_curves.estimate(lowest, levels([7.0])).over == ""
    narrow = np.std(near, ddof=1)
    both = rate_curves.estimate(lowest, levels(values, near))
    assert (both.value, both.over, both.n) == (4.0, "seeds and held-out records", 4)  # 3.0000 degrees of freedom
    assert both.error == pytest.approx(np.hypot(wide / 2, narrow), rel=1e-12)
    both = rate_curves.estimate(lowest, levels(near, values))
    assert both.error == pytest.approx(np.hypot(narrow / 3**0.5, wide), rel=1e-12)
    assert (both.value, both.n) == (4.0, 4)


@pytest.mark.parametrize(
    ("seeds", "records", "n", "over"),
    [
        ((0.3, 3), (0.2, 1000), 5, "seeds"),  # 4.17 degrees of freedom: sqrt(0.13) by 2.78 is less than 0.3 by 4.30
        ((0.3, 3), (0.1, 1000), 3, "seeds and held-out records"),
        ((0.3, 12), (0.3, 1000), 44, "seeds and held-out records"),  # 43.5
        ((0.1, 12), (0.5, 1000), 944, "seeds and held-out records"),
        ((0.0, 3), (0.2, 1000), 1000, "held-out records"),
        ((0.3, 3), (0.0, 1000), 3, "seeds"),
        ((math.inf, 1), (0.2, 1000), 1000, "held-out records"),
    ],
)
def test_seeds_and_records_are_two_sources_of_error(seeds, records, n, over):
    """Errors add in squares, degrees of freedom by Welch and Satterthwaite; the value is the mean over seeds."""
    by_seeds = Estimate(2.0, *seeds, "seeds" if seeds[1] > 1 else "")
    by_records = Estimate(2.1, *records, "held-out records")
    combined = rate_curves.combine_errors(by_seeds, by_records)
    assert (combined.value, combined.over) == (2.0, over)
    if over == "seeds and held-out records":
        assert (combined.error, combined.n) == (pytest.approx(np.hypot(seeds[0], records[0])), n)
    known = [source.half_width() for source in (by_seeds, by_records) if source.has_error]
    assert combined.half_width() >= max(known)


@pytest.mark.parametrize(
    ("seeds", "records", "n", "over"),
    [
        ((1e-16, 3), (0.2, 1000), 1000, "held-out records"),
        ((0.3, 3), (1e-16, 1000), 3, "seeds"),
        ((0.3129848800232429, 16), (0.3129848800232429, 16), 31, "seeds and held-out records"),  # float64: 29.999...
        ((0.7827003757293756, 22), (5.5e-9, 400), 22, "seeds and held-out records"),  # float64: 20.999...
    ],
)
def test_rounding_decides_neither_the_sources_nor_the_degrees_of_freedom(seeds, records, n, over):
    """Errors of equal values are 1e-16, not 0, and integer degrees of freedom may be computed slightly too low."""
    combined = rate_curves.combine_errors(Estimate(2.0, *seeds, "seeds"), Estimate(2.0, *records, "held-out records"))
    assert (combined.n, combined.over) == (n, over)


@pytest.mark.slow
def test_both_errors_cover_what_seeds_and_records_draw():
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
    lora, rora = (bowl(rule, kappa, 8, 1e-3, seeds=2) for rule, kappa in (("lora", 1.0), ("rora", 0.5)))
    apart = [dataclasses.replace(lora, seeds=(0, 1)), dataclasses.replace(rora, seeds=(2, 3))]
    assert rate_curves.compare_rules(apart) == []
    turned = dataclasses.replace(rora, losses=rora.losses[::-1] + 0.5, seeds=(1, 0))
    (comparison,) = rate_curves.compare_rules([dataclasses.replace(lora, seeds=(0, 1)), turned])
    assert (comparison.difference, comparison.standard_error) == (pytest.approx(-0.5), pytest.approx(0, abs=1e-12))
    line = [bowl("rora", 0.5, rank, 4e-3 * rank**-0.5, seeds=2) for rank in (4, 16)]
    assert slopes_of([dataclasses.replace(rank_curve, seeds=(at, at + 2)) for at, rank_curve in enumerate(line)]) == []


def test_a_rare_draw_at_the_grid_s_end_is_no_edge():
    """A single seed is at the edge if 2.5% of its resampled curves are; several seeds are if one of them is."""
    rates = np.array([0.1, 1.0, 10.0])
    inside, end = [2.0, 1.0, 2.0], [3.0, 2.0, 1.0]

    def curve(losses: list[list[float]], draws: list[list[float]] | None) -> rate_curves.Curve:
        resampled = None if draws is None else np.repeat(np.array(draws)[:, None], len(losses), axis=1)
        return rate_curves.Curve("adamw", "both", "lora", 1.0, 4, 1.0, rates, np.array(losses), resampled)

    assert curve([inside], [inside] * 97 + [end] * 2).edge == ""
    assert curve([inside], [inside] * 97 + [end] * 3).edge == "high"
    assert curve([inside, inside, end], None).edge == "high"
    assert curve([inside, inside, end], [inside] * 100).edge == "high"
    assert curve([inside, inside], [inside] * 97 + [end] * 2).edge == ""
    assert curve([inside, inside], [inside] * 97 + [end] * 3).edge == "high", "the mean of the seeds may end there"


@pytest.mark.parametrize(
    ("by_seed", "records", "over"),
    [
        ((0.1, -0.1, 0.3), True, "seeds and held-out records"),
        ((0.1, 0.1001, 0.0999), True, "seeds and held-out records"),
        ((0.1,), True, "held-out records"),
        ((0.1, 0.3), False, "seeds"),
        ((0.1,), False, ""),
    ],
)
def test_both_errors_are_kept(by_seed, records, over):
    """Errors over seeds and over four records, computed by hand; no error for one seed without records."""
    tokens, noise = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, -2.0, 2.0, -1.0])
    second = np.full(len(by_seed), 2.0)
    first = second + np.array(by_seed)
    summed = (np.mean(first) * tokens + noise, 2 * tokens) if records else None
    difference = rate_curves.paired_losses(first, second, summed, tokens if records else None)
    assert (difference.over, difference.value) == (over, pytest.approx(np.mean(by_seed)))
    by_seeds = np.std(by_seed, ddof=1) / len(by_seed) ** 0.5 if len(by_seed) > 1 else np.inf
    by_records = np.sqrt(np.sum(noise**2) * 4 / 3) / 100
    both = {"held-out records": by_records, "seeds and held-out records": np.hypot(by_seeds, by_records)}
    expected = both.get(over, by_seeds)
    assert difference.error == pytest.approx(expected, rel=1e-9)


def test_best_rates_and_their_ratio():
    """Rates in numbers, errors in powers of two, and what the errors are over."""
    centres = np.array([1e-3, 2e-3])  # of two seeds: the mean of the logs is in between
    losses = np.exp(0.1 * np.log(np.array(RATES) / centres[:, None]) ** 2)
    by_seed = rate_curves.Curve("adamw", "both", "lora", 1.0, 8, 2.0, np.array(RATES), losses)
    drawn = rate_curves.Curve("adamw", "both", "lora", 1.0, 8, 2.0, np.array(RATES), losses[:1], losses[:, None])
    alone = rate_curves.Curve("adamw", "both", "rora", 0.5, 8, 4.0, np.array(RATES), losses[:1])
    rows = rate_curves.best_rates([by_seed, drawn, alone]).to_dict("records")
    assert rows[0]["best_rate"] == pytest.approx(2**0.5 * 1e-3, rel=1e-4)
    assert rows[0]["log2_error"] == pytest.approx(0.5)  # half of log2(2), over sqrt(2) by sqrt(2)
    assert [row["error_over"] for row in rows] == ["seeds", "held-out records", ""]
    assert [math.isnan(row["log2_error"]) for row in rows] == [False, False, True]
    (comparison,) = rate_curves.compare_rules(
        [alone, rate_curves.Curve("adamw", "both", "lora", 1.0, 8, 2.0, alone.rates, losses[1:])]
    )
    assert (comparison.first, comparison.ratio, comparison.ratio_log2_error) == (
        "rora",
        pytest.approx(0.5, rel=1e-3),
        None,
    )
    twice = rate_curves.Curve("adamw", "both", "rora", 0.5, 8, 4.0, np.array(RATES), losses[[0, 0]])
    (comparison,) = rate_curves.compare_rules([twice, by_seed])
    assert comparison.ratio == pytest.approx(2**-0.5, rel=1e-3)
    assert comparison.ratio_log2_error == pytest.approx(0.5, rel=1e-2)
    t = 12.706  # Student's, of two seeds
    assert comparison.ratio_log2_half_width == pytest.approx(t * 0.5, rel=1e-2)
    assert rows[0]["log2_half_width"] == pytest.approx(t * 0.5, rel=1e-2)
    assert math.isnan(rows[2]["log2_half_width"])


def test_a_best_rate_at_an_edge_has_no_error_and_beside_a_diverged_run_a_bound():
    """All seeds have one best rate, so that their spread is 0; the bound is not."""
    rates, kinds = np.array([1e-3, 2e-3, 4e-3, 8e-3]), [("lora", 1.0), ("rora", 0.5)]
    errors = {}
    for name, losses in (("edge", [4.0, 3.0, 2.0, 1.0]), ("beside", [3.0, 2.0, 1.0, np.inf]), ("in", [2.0, 1, 2, 3])):
        curves = [
            rate_curves.Curve("adamw", "both", rule, kappa, 8, 1.0, rates, np.tile(losses, (3, 1)))
            for rule, kappa in kinds
        ]
        (row, _), (comparison,) = rate_curves.best_rates(curves).to_dict("records"), rate_curves.compare_rules(curves)
        errors[name] = (row["edge"], row["log2_error"], row["log2_half_width"])
        errors[name] += (comparison.ratio_log2_error, comparison.ratio_log2_half_width)
    # Half a step of each of the two; the spread of the logs of equal rates is rounding.
    assert errors["beside"] == ("", *(pytest.approx(value, abs=1e-12) for value in (0, 0.5, 0, 1)))
    assert errors["in"] == ("", *(pytest.approx(0, abs=1e-12) for _ in range(4)))
    assert errors["edge"] == ("high", None, None, None, None)


def test_one_seed_does_not_tell_rules_apart():
    """However narrow the error over records is, it does not contain the variation between training runs."""
    curves = [
        bowl(rule, kappa, 8, 1e-3, seeds=1, lowest=lowest)
        for rule, kappa, lowest in (("lora", 1.0, 1), ("rora", 0.5, 2))
    ]
    curves = [dataclasses.replace(curve, resampled=np.stack([curve.losses, curve.losses + 1e-3])) for curve in curves]
    (comparison,) = rate_curves.compare_rules(curves)
    assert comparison.error_over == "held-out records"
    assert comparison.verdict.startswith("undecided: one seed (-")


def diverging_above(rate, rank, seeds=3):
    """Return a curve with its lowest loss at a rate whose upper neighbour diverged, for every seed."""
    losses = np.array(
        [[1 + 0.1 * math.log(grid_rate / rate) ** 2 if grid_rate <= rate else np.nan for grid_rate in RATES]] * seeds
    )
    return rate_curves.Curve("adamw", "both", "lora", 1.0, rank, 8 / rank, np.array(RATES), losses)


def test_a_slope_beside_runs_that_diverged_is_known_to_the_grid():
    """Three seeds at one grid point have no spread; the bound from the grid is part of the interval."""
    (row,) = rate_curves.rate_slopes([diverging_above(1e-3, rank) for rank in (8, 32)]).to_dict("records")
    hidden = 2 * math.log(1e-3 / 3e-4) / 2 / math.log(4)  # half of the wider step, at either end
    assert (row["slope"], row["half_width"]) == (pytest.approx(0, abs=1e-12), pytest.approx(hidden, abs=0.01))
    assert row["verdict"] == "undecided"


def test_best_rates_that_turn_back_are_not_flat():
    """Best rates that rise and fall have a slope of zero, but are not on a line."""
    curves = [bowl("lora", 1.0, rank, best, seeds=3) for rank, best in ((4, 5e-4), (16, 4e-3), (64, 5e-4))]
    (row,) = rate_curves.rate_slopes(curves).to_dict("records")
    assert abs(row["slope"]) + row["half_width"] < 0.1
    assert row["verdict"] == "undecided"


def test_one_seed_decides_no_slope():
    flat = [levels_at(rank, seeds) for seeds in (2, 1) for rank in (8, 64)]
    assert [rate_curves.rate_slopes(curves)["verdict"].tolist() for curves in (flat[:2], flat[2:])] == [
        ["flat"],
        ["undecided"],
    ]


def levels_at(rank, seeds):
    """Return a parabola about 1e-3 for several seeds, with three similar resamples of the records."""
    losses = np.exp(0.1 * np.log(np.array(RATES) / 1e-3) ** 2)
    resampled = np.tile(losses, (3, seeds, 1)) * np.array([1.0, 1.001, 0.999])[:, None, None]
    return rate_curves.Curve(
        "adamw", "both", "lora", 1.0, rank, 8 / rank, np.array(RATES), np.tile(losses, (seeds, 1)), resampled
    )


@pytest.mark.parametrize(("slope", "nearest"), [(0.08, "signal or A moves"), (0.25, ""), (0.42, "cross-talk")])
def test_a_slope_is_near_what_lies_within_the_band(slope, nearest):
    """Predictions 0 and 1/2 under Adam and alpha / r, without spread over seeds: named within 0.1 and no further."""
    curves = [bowl("lora", 1.0, rank, 1e-3 * (rank / 8) ** slope, seeds=3) for rank in (8, 16, 32)]
    (row,) = rate_curves.rate_slopes(curves).to_dict("records")
    assert row["slope"] == pytest.approx(slope, abs=0.005)
    assert row["half_width"] < 0.01
    assert row["nearest"] == nearest


def test_a_slope_that_cannot_tell_names_all_that_it_leaves_room_for():
    first = bowl("lora", 1.0, 8, 1e-3, seeds=3)
    centres = [1e-3 * 4**power for power in (0.04, 0.24, 0.44)]
    losses = np.concatenate([bowl("lora", 1.0, 32, centre, seeds=1).losses for centre in centres])
    second = dataclasses.replace(bowl("lora", 1.0, 32, 1e-3, seeds=3), losses=losses)
    (row,) = rate_curves.rate_slopes([first, second]).to_dict("records")
    assert row["half_width"] > 0.3
    assert row["nearest"] == "signal or cross-talk or A moves"


def test_what_a_grid_hides_is_the_mean_over_seeds_or_draws():
    rates = np.array([1e-3, 3e-3, 1e-2])
    shallow, steep = np.array([1.1, 1.0, 1.1]), np.array([1.4, 1.0, 1.4])
    settings = {
        "optimizer": "adamw",
        "trained": "both",
        "rule": "lora",
        "kappa": 1.0,
        "rank": 8,
        "scaling": 1.0,
        "rates": rates,
    }
    alone = [rate_curves.Curve(**settings, losses=losses[None]).grid_error() for losses in (shallow, steep)]
    assert alone[0] < alone[1] / 2
    both = rate_curves.Curve(**settings, losses=np.array([shallow, steep]))
    assert both.grid_error() == pytest.approx(np.mean(alone), rel=1e-12)
    drawn = rate_curves.Curve(**settings, losses=shallow[None], resampled=np.array([[shallow], [steep], [steep]]))
    assert drawn.grid_error() == pytest.approx((alone[0] + 2 * alone[1]) / 3, rel=1e-12)


def test_the_value_is_the_mean_over_seeds_where_there_are_seeds():
    """Resamples of the records have another mean, which is reported only for a single seed."""
    losses, drawn = [1.0, 3.0], [5.0, 7.0, 9.0]
    assert rate_curves.estimate(rate_curves.Curve.lowest_losses, levels(losses, drawn)).value == 2.0
    assert rate_curves.estimate(rate_curves.Curve.lowest_losses, levels(losses[:1], drawn)).value == 7.0
