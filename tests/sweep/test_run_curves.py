"""Curves of a real model's runs, and rules compared record by record."""

import numpy as np
import pytest

from rora_theory.sweep import run_curves
from rora_theory.sweep.trained_runs import TrainedRun

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@pytest.mark.parametrize(
    ("by_seed", "over"), [((0.1, -0.1, 0.3), "seeds"), ((0.1, 0.1001, 0.0999), "held-out records")]
)
def test_the_larger_error_is_reported(by_seed, over):
    """Two methods on four records, three seeds: the error by hand over seeds and over records, and the larger one."""
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
    assert found.error_over == over
    assert found.difference == pytest.approx(-np.mean(by_seed), rel=1e-9)
    expected = {"seeds": np.std(by_seed, ddof=1) / 3**0.5, "held-out records": np.sqrt(np.sum(noise**2) * 4 / 3) / 100}
    assert found.standard_error == pytest.approx(expected[over], rel=1e-6)


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
