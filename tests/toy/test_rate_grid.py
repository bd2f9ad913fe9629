"""The grid of rates on the controlled problem: each loss in its own curve, which factor is trained, which rates."""

import jax
import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.optimizers import OPTIMIZER_NAMES
from rora_theory.toy import dynamics, rate_grid
from rora_theory.toy.dynamics import ProblemConfig
from rora_theory.toy.rate_grid import GridCell, RateGrid

PROBLEM = ProblemConfig(p_in=16, p_out=3, samples=5, held_out=7, overlap=0.3)


@pytest.mark.slow
def test_each_loss_has_its_own_curve():
    """Each loss has its own column and curve; at negligible rates it is the initial loss of the seed's problem."""
    rates, seeds = (1e-12, 2e-12, 3e-12), (0, 4)
    grid = RateGrid(
        ranks=(4, 8), rules=("lora",), optimizers=("adam",), freeze_control=False, adam_lrs=rates, steps=1,
        seeds=seeds, problem=PROBLEM,
    )  # fmt: skip
    table = rate_grid.losses(grid)
    for line, seed in enumerate(seeds):
        key = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))[0]
        drawn = dynamics.draw_problem(key, PROBLEM)
        for name, target in (("train", drawn.target_train), ("held_out", drawn.target_held_out)):
            expected = np.sum(np.square(target)) / (2 * len(target))
            curves = rate_grid.curves_of_losses(table, name)
            assert [curve.rank for curve in curves] == [4, 8]
            for curve in curves:
                assert curve.losses[line] == pytest.approx([expected] * 3, rel=1e-4), (seed, name)


@pytest.mark.slow
def test_b_alone_is_b_alone():
    """A control cell has the losses of training with A frozen; the other cell does not."""
    grid = RateGrid(ranks=(4, 8), optimizers=("sgd",), sgd_lrs=(0.1, 0.2, 0.3), steps=3, seeds=(0, 1), problem=PROBLEM)
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), seed)) for seed in range(2)]
    drawn = jax.tree.map(lambda *a: np.stack(a), *(dynamics.draw_problem(a, PROBLEM) for a, _ in keys))
    adapters = jax.tree.map(lambda *a: np.stack(a), *(dynamics.draw_adapters(b, PROBLEM, rank=4) for _, b in keys))
    rates = np.float32(grid.sgd_lrs)
    losses = {
        frozen: np.asarray(
            dynamics.final_losses(adapters, drawn, 1.0, rates, optimizer="sgd", steps=3, frozen=frozen)[0]
        )
        for frozen in ("A", None)
    }
    assert np.abs(losses["A"] / losses[None] - 1).min() > 1e-3
    for trained, frozen in (("B", "A"), ("both", None)):
        rows = rate_grid.cell_rows(grid, GridCell("sgd", trained, 4, "lora"))
        # Five digits are written.
        np.testing.assert_allclose([row["loss_train"] for row in rows], losses[frozen].ravel(), rtol=5e-5)


def test_rates_of_an_optimizer():
    grid = RateGrid(adam_lrs=(3.0, 1.0, 2.0), sgd_lrs=(30.0, 10.0, 20.0))
    rates = {name: grid.lrs(name).tolist() for name in OPTIMIZER_NAMES}
    assert rates == {"adam": [1, 2, 3], "adamw": [1, 2, 3], "sgd": [10, 20, 30], "momentum": [1, 2, 3]}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"adam_lrs": (1.0, 2.0)}, "--adam-lrs"),
        ({"sgd_lrs": (1.0, 2.0, -1.0)}, "--sgd-lrs"),
        ({"seeds": (1,)}, "--seeds"),
    ],
)
def test_settings_out_of_range(changed, option):
    with pytest.raises(InputError, match=option):
        RateGrid(**changed)


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
