"""The grid of trajectories: its cells, and their trained factors."""

from typing import Any

import numpy as np
import pytest

from rora_theory.lab.sweep import rank_exponents, training_grid
from rora_theory.lab.sweep.controlled import ProblemSize
from rora_theory.lab.sweep.training_grid import TrainingCell, TrainingGrid
from rora_theory.runs import frames

GRID = TrainingGrid(
    ranks=(8, 2), optimizers=("sgd",), models=("linear", "mlp"), steps=(1, 3), seeds=(0, 5), rules=("rora", 0.0),
    problem=ProblemSize(p_in=6, hidden=4, p_out=3, samples=2, held_out=2, teacher_rank=1), sgd_lr=0.05,
)  # fmt: skip


def test_each_optimizer_has_its_rate() -> None:
    grid = TrainingGrid(sgd_lr=1.0, momentum_lr=2.0, adam_lr=3.0)
    assert [grid.lr(name) for name in ("sgd", "momentum", "adam", "adamw")] == [1, 2, 3, 3]


def test_cells() -> None:
    """Ranks ascend, and B alone is trained as a control if A starts random."""
    cells = training_grid.training_cells(GRID)
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 * 2
    assert [cell.rank for cell in cells[:12]] == [2] * 6 + [8] * 6
    assert [(cell.start, cell.trained) for cell in cells[:6:2]] == [("A", "both"), ("A", "B"), ("B", "both")]
    assert {cell.trained for cell in training_grid.training_cells(TrainingGrid(freeze_control=False))} == {"both"}


@pytest.mark.slow
@pytest.mark.parametrize(("start", "trained", "moves"), [("A", "both", True), ("A", "B", False), ("B", "both", True)])
def test_rows(start: Any, trained: Any, moves: bool) -> None:
    """There is one row per seed and step, independent of the other seeds; A x changes if A is trained."""
    cell = TrainingCell("linear", start, trained, "sgd", 8, "rora")
    rows = training_grid.training_rows(GRID, cell)
    assert {tuple(row) for row in rows} == {training_grid.COLUMNS}
    table = frames.from_rows(rows, training_grid.COLUMNS)
    assert list(zip(table["seed"], table["step"], strict=True)) == [(s, t) for s in (0, 5) for t in (0, 1, 3)]
    assert table["scaling"].to_numpy() == pytest.approx((4 / 8) ** 0.5, rel=1e-15)
    inner = table.pivot(index="seed", columns="step", values="inner")
    assert ((inner[3] != inner[0]) == moves).all()
    alone = TrainingGrid(**{**vars(GRID), "seeds": (5, 6)})
    other = frames.from_rows(training_grid.training_rows(alone, cell), training_grid.COLUMNS)
    expected = table[table["seed"] == 5][list(rank_exponents.QUANTITIES)]
    np.testing.assert_allclose(other[other["seed"] == 5][list(rank_exponents.QUANTITIES)], expected, rtol=1e-4)
