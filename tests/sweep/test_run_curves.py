"""Curves of a real model's runs, and rules compared record by record."""

from dataclasses import replace

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.stats.rate_curves import Comparison
from rora_theory.sweep import run_curves
from rora_theory.sweep.trained_runs import TrainedRun

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@pytest.mark.parametrize("by_seed", [(0.1, -0.1, 0.3), (0.1, 0.1001, 0.0999)])
def test_both_errors_are_reported(by_seed):
    """Two methods on four records, three seeds: the error by hand over seeds and over records."""
    tokens = np.array([10.0, 20.0, 30.0, 40.0])
    noise = np.array([1.0, -2.0, 2.0, -1.0])
    cells = []
    for method, sign in (("lora", 0.0), ("rora", 1.0)):
        for seed, gap in enumerate(by_seed):
            for rate, more in ((1e-3, 0.5), (3e-3, 0.0), (1e-2, 0.5)):
                records = (2 + more + sign * gap) * tokens + sign * noise
                loss = records.sum() / tokens.sum()
                cells += [TrainedRun(method, rank, 16 / rank, rate, seed, loss, records, tokens) for rank in (4, 8)]
    (found,) = run_curves.compare_by_records(run_curves.curves_of_runs(cells), cells)
    assert found.error_over == "seeds and held-out records"
    assert found.difference == pytest.approx(-np.mean(by_seed), rel=1e-9)
    expected = np.hypot(np.std(by_seed, ddof=1) / 3**0.5, np.sqrt(np.sum(noise**2) * 4 / 3) / 100)
    assert found.standard_error == pytest.approx(expected, rel=1e-6)


def runs_of(method: str, losses: dict[int, dict[float, float]], records: bool = True) -> list[TrainedRun]:
    """Of seeds and rates, at two ranks; of those that did not diverge four records that differ."""
    tokens, noise = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, -2.0, 2.0, -1.0])
    return [
        TrainedRun(method, rank, 16 / rank, rate, seed, loss, *found)
        for rank in (4, 8)
        for seed, by_rate in losses.items()
        for rate, loss in by_rate.items()
        for found in [(loss * tokens + noise * loss, tokens) if records and loss < np.inf else (None, None)]
    ]


def test_methods_of_other_records_are_not_compared():
    """Though each one's runs agree."""
    losses = {0: dict(zip(RATES, (3.0, 2.0, 1.0, 2.0, 3.0), strict=True))}
    other = [replace(run, tokens=run.tokens + 1) for run in runs_of("rora", losses)]
    with pytest.raises(
        InputError, match=r"^lora of rank 8 at 0\.001, seed 0 and rora of rank 8 at 0\.001, seed 0 must have"
    ):
        compared(*runs_of("lora", losses), *other)


def compared(*runs: TrainedRun) -> Comparison:
    (found,) = run_curves.compare_by_records(run_curves.curves_of_runs(runs), runs)
    return found


def test_the_best_rate_is_that_of_the_seeds_mean():
    """By itself either seed would take a rate at which the methods are 0.2 apart; at the best on average it is 0.3."""
    by_seed = {0: (4.0, 1.0, 1.1, 2.0, 4.0), 1: (4.0, 2.0, 1.1, 1.0, 4.0)}
    gaps = (0.2, 0.2, 0.3, 0.2, 0.2)
    lora = {seed: dict(zip(RATES, own, strict=True)) for seed, own in by_seed.items()}
    rora = {seed: dict(zip(RATES, np.add(own, gaps).tolist(), strict=True)) for seed, own in by_seed.items()}
    found = compared(*runs_of("lora", lora), *runs_of("rora", rora))
    assert found.difference == pytest.approx(-0.3)


def test_a_seed_beside_the_curves_counts_where_it_ran_at_both_best_rates():
    by_rate = dict(zip(RATES, (3.0, 2.0, 1.0, 2.0, 3.0), strict=True))
    lora = runs_of("lora", {0: by_rate, 7: {1e-3: 1.2}, 8: {1e-3: 9.0}})
    rora = runs_of("rora", {0: {rate: loss + 0.5 for rate, loss in by_rate.items()}, 7: {1e-3: 1.3}, 9: {1e-3: 0.1}})
    assert compared(*lora, *rora).difference == pytest.approx(-0.3)


@pytest.mark.parametrize("method", ["lora", "rora"])
def test_a_run_that_diverged_at_the_best_rate_settles_nothing_and_is_named(method):
    """Of a seed beside the curves; the figures are those of the seed that finished both, with its records' error."""
    by_rate = dict(zip(RATES, (3.0, 2.0, 1.0, 2.0, 3.0), strict=True))
    whole = {"lora": {0: by_rate}, "rora": {0: {rate: loss + 0.5 for rate, loss in by_rate.items()}}}
    plain = compared(*runs_of("lora", whole["lora"]), *runs_of("rora", whole["rora"]))
    assert plain.verdict.startswith("undecided: one seed (-")
    for name, own in whole.items():
        own[7] = {1e-3: np.inf if name == method else 1.0}
    found = compared(*runs_of("lora", whole["lora"]), *runs_of("rora", whole["rora"]))
    said = f"{plain.verdict}; diverged at the best rates: {method} at seed 7, so not settled"
    assert found == plain._replace(verdict=said)
    bare = compared(*runs_of("lora", whole["lora"], records=False), *runs_of("rora", whole["rora"], records=False))
    assert bare.verdict.startswith("not settled: one seed, no losses a record; diverged")


def test_where_every_seed_of_both_best_rates_diverged_once_the_least_losses_are_shown():
    """Each curve has a seed of its own; the ones that they share ran at the best rates alone, and none finished."""
    by_rate = dict(zip(RATES, (3.0, 2.0, 1.0, 2.0, 3.0), strict=True))
    lora = runs_of("lora", {0: by_rate, 7: {1e-3: np.inf}, 8: {1e-3: np.inf}})
    rora = runs_of("rora", {1: {rate: loss + 0.5 for rate, loss in by_rate.items()}, 7: {1e-3: 1.0}, 8: {1e-3: np.inf}})
    found = compared(*lora, *rora)
    assert found.verdict == "diverged at the best rates: lora at seed 7, lora at seed 8, rora at seed 8, so not settled"
    assert (found.difference, found.standard_error, found.half_width) == (pytest.approx(-0.5, abs=0.05), None, None)


def test_seeds_that_lack_a_rate_are_no_curve():
    whole = [TrainedRun("lora", r, 16 / r, rate, 0, 1.0 + rate, None, None) for r in (4, 8) for rate in RATES]
    part = [TrainedRun("lora", r, 16 / r, rate, 1, 9.0, None, None) for r in (4, 8) for rate in RATES[:4]]
    curves = run_curves.curves_of_runs([*whole, *part])
    assert [curve.losses.tolist() for curve in curves] == [[[1.0 + rate for rate in RATES]]] * 2
    assert [curve.seeds for curve in curves] == [(0,), (0,)]


def test_a_curve_has_the_draws_of_each_of_its_seeds():
    """In the order of the seeds, whatever the order of the runs; drawn, they are averaged."""
    tokens = np.array([10.0, 20.0, 30.0, 40.0])
    runs = [
        TrainedRun("lora", rank, 16 / rank, rate, seed, float(seed), seed * tokens, tokens)
        for seed in (3, 1)
        for rank in (4, 8)
        for rate in RATES
    ]
    for curve in run_curves.curves_of_runs(runs):
        assert curve.seeds == (1, 3)
        np.testing.assert_allclose(curve.losses, [[1.0] * 5, [3.0] * 5])
        np.testing.assert_allclose(curve.resampled[:, 0], 1.0)
        np.testing.assert_allclose(curve.resampled[:, 1], 3.0)
        np.testing.assert_allclose(curve.drawn().losses, 2.0)


def test_the_table_has_every_run_and_the_exponent_of_its_method():
    runs = [
        TrainedRun(method, rank, 16 / rank**kappa, 1e-3, 0, 1.5, None, None)
        for method, kappa in (("lora", 1.0), ("rora", 0.5))
        for rank in (4, 8)
    ]
    found = run_curves.rate_loss_table(runs)
    assert found["kappa"].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert found["rank"].tolist() == [4, 8, 4, 8]
    assert found["loss_train"].isna().all()
    assert (found["loss_held_out"] == 1.5).all()
