"""The grid of rates in the controlled problem: losses of each curve, the trained factor, and the rates."""

import jax
import numpy as np
import pytest

from rora_theory.lab.sweep import controlled, rate_grid
from rora_theory.lab.sweep.controlled import ProblemConfig
from rora_theory.lab.sweep.rate_grid import RateGrid
from rora_theory.optimizers import OPTIMIZER_NAMES

PROBLEM = ProblemConfig(p_in=16, p_out=3, samples=5, held_out=7, overlap=0.3)


@pytest.mark.slow
def test_curves_hold_the_losses_of_the_training_that_they_name():
    """Training and held-out losses at rank 4 are compared, with A trained and frozen."""
    grid = RateGrid(
        ranks=(4, 8), rules=("lora",), optimizers=("sgd",), sgd_lrs=(0.1, 0.2, 0.3), steps=3, seeds=(0, 4),
        problem=PROBLEM,
    )  # fmt: skip
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), seed)) for seed in grid.seeds]
    drawn = jax.tree.map(lambda *a: np.stack(a), *(controlled.draw_problem(a, PROBLEM) for a, _ in keys))
    adapters = jax.tree.map(lambda *a: np.stack(a), *(controlled.draw_adapters(b, PROBLEM, rank=4) for _, b in keys))
    table, rates = rate_grid.losses(grid), np.float32(grid.sgd_lrs)
    train_losses = []
    for trained, frozen in (("both", None), ("B", "A")):
        losses = controlled.final_losses(adapters, drawn, 1.0, rates, optimizer="sgd", steps=3, frozen=frozen)
        train_losses.append(np.asarray(losses[0]))
        for name, expected in zip(("train", "held_out"), losses, strict=True):
            curves = {(curve.rank, curve.trained): curve for curve in rate_grid.curves_of_losses(table, name)}
            assert list(curves) == [(4, "both"), (8, "both"), (4, "B"), (8, "B")]
            # Five digits are written.
            np.testing.assert_allclose(curves[4, trained].losses, expected, rtol=5e-5)
    assert np.abs(train_losses[0] / train_losses[1] - 1).min() > 1e-3


def test_rates_of_an_optimizer():
    grid = RateGrid(adam_lrs=(3.0, 1.0, 2.0), sgd_lrs=(30.0, 10.0, 20.0))
    rates = {name: grid.lrs(name).tolist() for name in OPTIMIZER_NAMES}
    assert rates == {"adam": [1, 2, 3], "adamw": [1, 2, 3], "sgd": [10, 20, 30], "momentum": [1, 2, 3]}


def test_curves_keep_the_order_of_the_cells_and_of_the_rates():
    """Curves are in the order of the cells with ascending rates, and diverged runs stay infinite."""
    grid = RateGrid(
        ranks=(8, 4), rules=("rora", 0.25), optimizers=("sgd",), sgd_lrs=(1e9, 0.2, 0.1), steps=3, seeds=(1, 0),
        problem=PROBLEM,
    )  # fmt: skip
    curves = rate_grid.curves_of_losses(rate_grid.losses(grid))
    assert [(c.trained, c.rank, c.rule) for c in curves] == [
        (trained, rank, rule) for trained in ("both", "B") for rank in (4, 8) for rule in ("rora", "0.25")
    ]
    for curve in curves:
        assert curve.rates.tolist() == [0.1, 0.2, 1e9]
        assert np.isinf(curve.losses[:, 2]).all()
        assert np.isfinite(curve.losses[:, :2]).all()
