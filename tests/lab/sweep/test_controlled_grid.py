"""The matrix of the controlled problem: its cells, their rows, and the curves of loss against rate."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from rora_theory.lab.sweep import controlled, controlled_grid
from rora_theory.lab.sweep.controlled import ProblemConfig
from rora_theory.lab.sweep.controlled_grid import ControlledGrid
from rora_theory.lab.sweep.grid import SweepCell
from rora_theory.lab.sweep.rank_exponents import QUANTITIES
from rora_theory.optimizers import OPTIMIZER_NAMES
from rora_theory.runs import frames
from rora_theory.runs.reading import key_of

GRID = ControlledGrid(
    ranks=(2, 8), optimizers=("sgd",), model=("linear", "mlp"), read_at=(1, 3), seeds=(0, 5), methods=("rora", "0"),
    problem=ProblemConfig(p_in=6, hidden=4, p_out=3, samples=2, held_out=2, teacher_rank=1), sgd_lrs=(0.05,),
)  # fmt: skip
SIZE = ProblemConfig(p_in=16, p_out=3, samples=5, held_out=7, overlap=0.3)


def losses_of(grid: ControlledGrid) -> Any:
    rows = [row for cell in grid.cells() for row in controlled_grid.train_cell(grid, cell)]
    return frames.from_rows(controlled_grid.losses_at_end(rows), controlled_grid.LOSS_COLUMNS)


def test_rates_of_an_optimizer() -> None:
    grid = ControlledGrid(adam_lrs=(3.0, 1.0, 2.0), sgd_lrs=(30.0, 10.0, 20.0))
    rates = {name: grid.rates(name).tolist() for name in OPTIMIZER_NAMES}
    assert rates == {"adam": [1, 2, 3], "adamw": [1, 2, 3], "sgd": [10, 20, 30], "momentum": [1, 2, 3]}


def cell_of(grid: ControlledGrid, rank: int, method: str, trained: str = "both") -> SweepCell:
    """Return the cell of the linear model with these settings."""
    (cell,) = [
        cell for cell in grid.cells()
        if (cell.model, cell.rank, cell.method, cell.axes["trained"]) == ("linear", rank, method, trained)
    ]  # fmt: skip
    return cell


def test_cells() -> None:
    """Methods of a rank are adjacent with one scaling at the reference rank, and B alone is trained as a control."""
    cells = GRID.cells()
    assert len({key_of(cell) for cell in cells}) == len(cells) == 2 * 2 * 2 * 2
    assert [(cell.rank, cell.method) for cell in cells[:4]] == [(2, "rora"), (2, "0"), (8, "rora"), (8, "0")]
    assert [cell.gamma for cell in cells[:4]] == pytest.approx([2**0.5, 1, 0.5**0.5, 1], rel=1e-15)
    other = replace(GRID, gamma=3.0, reference_rank=8)
    assert [cell.gamma for cell in other.cells()[:4]] == pytest.approx([6, 3, 3, 3], rel=1e-15)
    assert [(cell.model, cell.axes["trained"]) for cell in cells[::4]] == [
        (model, trained) for model in ("linear", "mlp") for trained in ("both", "B")
    ]
    assert {(cell.rate, cell.seed, cell.read_at) for cell in cells} == {(None, None, (1, 3))}, "all rates and seeds"
    assert {cell.axes["trained"] for cell in replace(GRID, freeze_control=False).cells()} == {"both"}
    same = replace(GRID, methods=("rslora", "0")).cells()
    assert [cell.gamma for cell in same] == [cell.gamma for cell in cells]
    assert str(cells[0]) == "linear: rora r=2 alpha=2 gamma=1.414 optimizer=sgd trained=both"


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["both", "B"])
def test_rows(trained: Any) -> None:
    """There is one row per seed and step, independent of other seeds and rates."""
    cell = cell_of(GRID, 8, "rora", trained)
    rows = controlled_grid.train_cell(GRID, cell)
    assert {tuple(row) for row in rows} == {controlled_grid.COLUMNS}
    table = frames.from_rows(rows, controlled_grid.COLUMNS)
    assert list(zip(table["seed"], table["step"], strict=True)) == [(s, t) for s in (0, 5) for t in (0, 1, 3)]
    assert table["scaling"].to_numpy() == pytest.approx((4 / 8) ** 0.5, rel=1e-15)
    other_grid = replace(GRID, seeds=(5, 6), sgd_lrs=(0.1, 0.05))
    other = frames.from_rows(controlled_grid.train_cell(other_grid, cell), controlled_grid.COLUMNS)
    same = other[(other["seed"] == 5) & (other["learning_rate"] == 0.05)]
    expected = table[table["seed"] == 5][list(QUANTITIES)]
    np.testing.assert_allclose(same[list(QUANTITIES)], expected, rtol=1e-4)


@pytest.mark.slow
def test_a_diverged_run_stays_diverged(monkeypatch) -> None:
    """A run counts as diverged from the first recorded step whose loss is too high, whatever follows."""
    losses = np.array([[1.0, 20.0, 0.5], [1.0, 9.0, 0.5]])[:, None]
    measures = controlled.Measures(*[losses] * len(controlled.Measures._fields))
    monkeypatch.setattr(controlled, "trajectories", lambda *_, **__: measures)
    rows = controlled_grid.train_cell(GRID, cell_of(GRID, 8, "rora"))
    assert [row["diverged"] for row in rows] == [0, 1, 1, 0, 0, 0]
    ends = controlled_grid.losses_at_end(rows)
    assert [row["loss_train"] for row in ends] == [np.inf, 0.5]


@pytest.mark.slow
def test_curves_hold_the_losses_of_the_training_that_they_name() -> None:
    """Training and held-out losses at rank 4 are those of each seed's own trajectory, with A trained and frozen."""
    grid = ControlledGrid(
        ranks=(4, 8), methods=("lora",), optimizers=("sgd",), model=("linear",), sgd_lrs=(0.1, 0.2, 0.3),
        read_at=(2, 4), seeds=(0, 4), problem=SIZE,
    )  # fmt: skip
    table = losses_of(grid)
    train_losses = []
    for trained in ("both", "B"):
        freeze_A, expected = trained == "B", {"train": [], "held_out": []}
        for seed in grid.seeds:
            problem_key, adapter_key = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
            problem = controlled.draw_problem(problem_key, SIZE, "linear")
            adapters = controlled.draw_adapters(adapter_key, SIZE, "linear", rank=4)
            paths = [
                controlled.trajectory(
                    adapters,
                    problem,
                    scaling=1.0,
                    learning_rate=rate,
                    optimizer="sgd",
                    steps=(4,),
                    freeze_A=freeze_A,
                )
                for rate in grid.sgd_lrs
            ]
            for name, losses in expected.items():
                losses.append([float(getattr(path, f"loss_{name}")[-1]) for path in paths])
        train_losses.append(np.array(expected["train"]))
        for name, losses in expected.items():
            curves = {(curve.rank, curve.trained): curve for curve in controlled_grid.curves_of_losses(table, name)}
            assert list(curves) == [(4, "both"), (8, "both"), (4, "B"), (8, "B")]
            np.testing.assert_allclose(curves[4, trained].losses, losses, rtol=5e-5)
    assert np.abs(train_losses[0] / train_losses[1] - 1).min() > 1e-3


def test_curves_keep_the_order_of_the_cells_and_of_the_rates() -> None:
    """Curves are in the order of the cells with ascending rates, and diverged runs stay infinite."""
    grid = ControlledGrid(
        ranks=(8, 4), methods=("rora", "quarter"), optimizers=("sgd",), model=("linear",),
        sgd_lrs=(1e9, 0.2, 0.1), read_at=(3,), seeds=(1, 0), problem=SIZE,
    )  # fmt: skip
    curves = controlled_grid.curves_of_losses(losses_of(grid))
    assert [(c.trained, c.rank, c.rule) for c in curves] == [
        (trained, rank, rule) for trained in ("both", "B") for rank in (8, 4) for rule in ("rora", "0.25")
    ]
    for curve in curves:
        assert curve.rates.tolist() == [0.1, 0.2, 1e9]
        assert np.isinf(curve.losses[:, 2]).all()
        assert np.isfinite(curve.losses[:, :2]).all()
