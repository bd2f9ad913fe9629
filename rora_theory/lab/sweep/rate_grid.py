"""Loss against learning rate on the controlled problem, by rank, scaling rule and optimizer.

    grid = RateGrid(ranks=(4, 16), rules=("lora", "rora"), optimizers=("adam",))
    table = best_rates(curves_of_losses(losses(grid)))

Tables are tidy, with one row per cell, seed and rate. `rora_theory.stats.rate_curves` computes and compares best rates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from jaxtyping import Float

from rora_theory.inits import INITS, Init
from rora_theory.lab.sweep import controlled
from rora_theory.lab.sweep.controlled import ProblemConfig
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.runs import frames
from rora_theory.scaling import Rule, check_choice, check_integer, check_positive, exponent, scaling_factor
from rora_theory.stats.rate_curves import COLUMNS, Curve
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import (
    alpha_at,
    check_list,
    check_rules,
    name_of,
)

if TYPE_CHECKING:
    import pandas as pd

JudgedLoss = Literal["held_out", "train"]
"""Loss by which learning rates are compared."""


@dataclass(frozen=True)
class RateGrid:
    """Settings of the runs.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Ranks of the adapter"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...] = ("sgd", "adam")
    """Optimizers: sgd, momentum, adam, adamw"""
    freeze_control: bool = True
    """Also train B alone, with A frozen"""
    adam_lrs: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-26, 7))
    """Learning rates of adam and adamw, three or more"""
    sgd_lrs: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-14, 22))
    """Learning rates of sgd, and ten times those of momentum. The default grid contains every rule's best step at ranks
    that are powers of two times the reference rank"""
    steps: Count = 100
    """Number of updates, each on all training inputs"""
    seeds: tuple[int, ...] = tuple(range(12))
    """Seeds of the problems and adapters, 2 or more"""
    gamma: float = 1.0
    """Scaling factor of every rule at the reference rank"""
    reference_rank: int = 4
    """Rank at which all rules have the same scaling factor"""
    init: Init = "kaiming_uniform"
    """Initialisation of A"""
    problem: ProblemConfig = field(
        default_factory=lambda: ProblemConfig(
            p_in=128, hidden=64, p_out=16, samples=256, held_out=256, overlap=0.3, teacher_rank=4, noise=0.1
        )
    )
    """Settings of the problem"""
    seed: int = 0
    """Seed from which all random draws are derived"""

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_list("--ranks", self.ranks, check_integer, fewest=2)
        # All rules have the same gamma at the reference rank.
        check_rules(self.rules, gamma=self.gamma, reference_rank=self.reference_rank)
        check_list("--optimizers", self.optimizers, partial(check_choice, choices=OPTIMIZER_NAMES))
        check_choice("--init", self.init, INITS)
        for option, rates in (("--adam-lrs", self.adam_lrs), ("--sgd-lrs", self.sgd_lrs)):
            check_list(option, rates, check_positive, fewest=3)
        check_list("--seeds", self.seeds, check_seed, fewest=2)
        check_ranges(self)
        check_seed("--seed", self.seed)
        self.problem.check_ranks(self.ranks)

    def lrs(self, optimizer: OptimizerName) -> Float[np.ndarray, " rates"]:
        """Return the learning rates of an optimizer, ascending."""
        if optimizer in ("adam", "adamw"):
            return np.sort(self.adam_lrs)
        return np.sort(self.sgd_lrs) / (10 if optimizer == "momentum" else 1)


@dataclass(frozen=True)
class GridCell:
    """Runs of one compiled call: all seeds and learning rates.

    Attributes:
      optimizer: Optimizer of the runs.
      trained: Trained factors: both, or B alone with A frozen.
      rank: Rank of the adapters.
      rule: Scaling rule.
    """

    optimizer: OptimizerName
    trained: Literal["both", "B"]
    rank: int
    rule: Rule

    def __str__(self) -> str:
        """Return the label of the cell, as progress messages show it."""
        return f"{self.optimizer}, {name_of(self.rule)}, r = {self.rank}"


def rate_cells(grid: RateGrid) -> Iterator[GridCell]:
    """Yield the cells of a grid."""
    trained_factors: tuple[Literal["both", "B"], ...] = ("both", "B") if grid.freeze_control else ("both",)
    for optimizer in grid.optimizers:
        for trained in trained_factors:
            for rank in sorted(grid.ranks):
                for rule in grid.rules:
                    yield GridCell(optimizer, trained, rank, rule)


def cell_rows(grid: RateGrid, cell: GridCell) -> list[dict[str, Any]]:
    """Compute the losses of a cell, one row per seed and rate; not finite if the run diverged."""
    alpha = alpha_at(cell.rule, gamma=grid.gamma, reference_rank=grid.reference_rank)
    scaling = scaling_factor(cell.rule, alpha=alpha, rank=cell.rank)
    # One compiled call trains all seeds at all rates.
    adapters, problems = controlled.draw_ensemble(
        grid.problem, rank=cell.rank, seeds=grid.seeds, seed=grid.seed, init=grid.init
    )
    # Arrays [seeds, rates].
    rates = grid.lrs(cell.optimizer)
    train_losses, held_out_losses = controlled.losses_at_rates(
        adapters,
        problems,
        scaling=scaling,
        rates=rates,
        optimizer=cell.optimizer,
        steps=grid.steps,
        frozen="A" if cell.trained == "B" else None,
    )
    # Tidy rows: the cell's columns, then rate, seed and losses.
    labels: dict[str, Any] = {"optimizer": cell.optimizer, "trained": cell.trained, "rule": name_of(cell.rule)}
    labels |= {"kappa": exponent(cell.rule), "rank": cell.rank, "scaling": scaling}
    return [
        labels
        | {"learning_rate": float(rate), "seed": seed}
        | {
            "loss_train": float(train_losses[seed_index, rate_index]),
            "loss_held_out": float(held_out_losses[seed_index, rate_index]),
        }
        for seed_index, seed in enumerate(grid.seeds)
        for rate_index, rate in enumerate(rates)
    ]


def losses(grid: RateGrid) -> "pd.DataFrame":
    """Compute the losses of all cells, one row per seed and rate."""
    return frames.from_rows([row for cell in rate_cells(grid) for row in cell_rows(grid, cell)], COLUMNS)


def curves_of_losses(table: "pd.DataFrame", judge: JudgedLoss = "held_out") -> list[Curve]:
    """Build the curves of `losses`, in the order of the cells.

    Args:
      table: Losses of complete cells.
      judge: Loss that the curves show: on held-out or on training inputs.

    Returns:
      One curve per cell.
    """
    curves = []
    for key, group in table.groupby(list(COLUMNS[:6]), sort=False):
        optimizer, trained, rule, kappa, rank, scaling = cast(tuple[Any, ...], key)
        by_rate = group.pivot(index="seed", columns="learning_rate", values=f"loss_{judge}")
        rates, values = by_rate.columns.to_numpy(float), by_rate.to_numpy(float)
        curves.append(Curve(optimizer, trained, rule, float(kappa), int(rank), float(scaling), rates, values))
    return curves
