"""Curves of a real model's runs, and rules compared record by record."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.lab.sweep import run_curves
from rora_theory.stats.rate_curves import Comparison
from rora_theory.stats.trained_runs import TrainedRun

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TOKENS = np.array([10.0, 20.0, 30.0, 40.0])
NOISE = np.array([1.0, -2.0, 2.0, -1.0])
"""Differences between the records, which sum to 0."""


def valley(offset: float = 0.0, losses: Sequence[float] = (3.0, 2.0, 1.0, 2.0, 3.0)) -> dict[float, float]:
    """Return losses by rate, with the lowest in the middle."""
    return dict(zip(RATES, np.add(losses, offset).tolist(), strict=True))


def runs_of(method: str, losses: dict[int, dict[float, float]], records: bool = True) -> list[TrainedRun]:
    """Return runs at two ranks by seed and rate; those with a finite loss have four records that differ."""
    return [
        TrainedRun(method, rank, 16 / rank, rate, seed, loss, *by_record)
        for rank in (4, 8)
        for seed, by_rate in losses.items()
        for rate, loss in by_rate.items()
        for by_record in [(loss * TOKENS + NOISE * loss, TOKENS) if records and loss < np.inf else (None, None)]
    ]


def compare(lora: Sequence[TrainedRun], rora: Sequence[TrainedRun]) -> Comparison:
    runs = [*lora, *rora]
    (comparison,) = run_curves.compare_by_records(run_curves.curves_of_runs(runs), runs)
    return comparison


@pytest.mark.parametrize("by_seed", [(0.1, -0.1, 0.3), (0.1, 0.1001, 0.0999)])
def test_both_errors_are_reported(by_seed):
    """For two methods on four records with three seeds, errors over seeds and records are computed by hand."""
    runs = {"lora": [], "rora": []}
    for method, sign in (("lora", 0.0), ("rora", 1.0)):
        for seed, gap in enumerate(by_seed):
            for rate, excess in ((1e-3, 0.5), (3e-3, 0.0), (1e-2, 0.5)):
                records = (2 + excess + sign * gap) * TOKENS + sign * NOISE
                loss = records.sum() / TOKENS.sum()
                runs[method] += [
                    TrainedRun(method, rank, 16 / rank, rate, seed, loss, records, TOKENS) for rank in (4, 8)
                ]
    comparison = compare(runs["lora"], runs["rora"])
    assert comparison.error_over == "seeds and held-out records"
    assert comparison.difference == pytest.approx(-np.mean(by_seed), rel=1e-9)
    expected = np.hypot(np.std(by_seed, ddof=1) / 3**0.5, np.sqrt(np.sum(NOISE**2) * 4 / 3) / 100)
    assert comparison.standard_error == pytest.approx(expected, rel=1e-6)


def test_methods_of_other_records_are_not_compared():
    """The runs of each method share their records."""
    other = [replace(run, tokens=run.tokens + 1) for run in runs_of("rora", {0: valley()})]
    message = r"^lora of rank 8 at 0\.001, seed 0 and rora of rank 8 at 0\.001, seed 0 .*held-out records"
    with pytest.raises(InputError, match=message):
        compare(runs_of("lora", {0: valley()}), other)


def test_the_best_rate_is_that_of_the_seeds_mean():
    """Each seed alone would select a rate at which the methods differ by 0.2; at the best rate on average they
    differ by 0.3.
    """
    by_seed = {0: valley(losses=(4.0, 1.0, 1.1, 2.0, 4.0)), 1: valley(losses=(4.0, 2.0, 1.1, 1.0, 4.0))}
    gaps = valley(losses=(0.2, 0.2, 0.3, 0.2, 0.2))
    rora = {seed: {rate: loss + gaps[rate] for rate, loss in by_rate.items()} for seed, by_rate in by_seed.items()}
    assert compare(runs_of("lora", by_seed), runs_of("rora", rora)).difference == pytest.approx(-0.3)


def test_a_seed_without_a_curve_counts_where_it_ran_at_both_best_rates():
    lora = runs_of("lora", {0: valley(), 7: {1e-3: 1.2}, 8: {1e-3: 9.0}})
    rora = runs_of("rora", {0: valley(0.5), 7: {1e-3: 1.3}, 9: {1e-3: 0.1}})
    assert compare(lora, rora).difference == pytest.approx(-0.3)


@pytest.mark.parametrize("method", ["lora", "rora"])
def test_a_run_that_diverged_at_the_best_rate_settles_nothing_and_is_named(method):
    """The diverged seed has no curve; the figures are those of the seed that finished both, with its records' error."""
    losses = {"lora": {0: valley()}, "rora": {0: valley(0.5)}}
    plain = compare(*(runs_of(name, by_seed) for name, by_seed in losses.items()))
    assert plain.verdict.startswith("undecided: one seed (-")
    for name, by_seed in losses.items():
        by_seed[7] = {1e-3: np.inf if name == method else 1.0}
    diverged = compare(*(runs_of(name, by_seed) for name, by_seed in losses.items()))
    verdict = f"{plain.verdict}; diverged at the best rates: {method} at seed 7, so not settled"
    assert diverged == replace(plain, verdict=verdict)
    bare = compare(*(runs_of(name, by_seed, records=False) for name, by_seed in losses.items()))
    assert bare.verdict.startswith("not settled: one seed, no losses a record; diverged")


def test_where_every_seed_of_both_best_rates_diverged_the_lowest_losses_are_shown():
    """Each curve has a seed of its own. The shared seeds ran at the best rates alone, and none finished."""
    lora = runs_of("lora", {0: valley(), 7: {1e-3: np.inf}, 8: {1e-3: np.inf}})
    rora = runs_of("rora", {1: valley(0.5), 7: {1e-3: 1.0}, 8: {1e-3: np.inf}})
    comparison = compare(lora, rora)
    seeds = "lora at seed 7, lora at seed 8, rora at seed 8"
    assert comparison.verdict == f"diverged at the best rates: {seeds}, so not settled"
    assert comparison.difference == pytest.approx(-0.5, abs=0.05)
    assert (comparison.standard_error, comparison.half_width) == (None, None)


def test_a_curve_has_its_complete_seeds_in_order_and_their_draws():
    """A seed that lacks a rate has no curve.

    Each seed keeps its own loss over the draws; resampled losses are averaged.
    """
    runs = [
        TrainedRun("lora", rank, 16 / rank, rate, seed, float(seed), seed * TOKENS, TOKENS)
        for seed, rates in ((3, RATES), (1, RATES), (9, RATES[:4]))
        for rank in (4, 8)
        for rate in rates
    ]
    for curve in run_curves.curves_of_runs(runs):
        assert curve.seeds == (1, 3)
        np.testing.assert_allclose(curve.losses, [[1.0] * 5, [3.0] * 5])
        np.testing.assert_allclose(curve.resampled[:, 0], 1.0)
        np.testing.assert_allclose(curve.resampled[:, 1], 3.0)
        np.testing.assert_allclose(curve.over_resamples().losses, 2.0)


def test_the_table_has_every_run_and_the_exponent_of_its_method():
    runs = [
        TrainedRun(method, rank, 16 / rank**kappa, 1e-3, 0, 1.5, None, None)
        for method, kappa in (("lora", 1.0), ("rora", 0.5))
        for rank in (4, 8)
    ]
    table = run_curves.rate_loss_table(runs)
    assert table["kappa"].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert table["rank"].tolist() == [4, 8, 4, 8]
    assert table["loss_train"].isna().all()
    assert (table["loss_held_out"] == 1.5).all()
