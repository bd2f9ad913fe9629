"""Matrix of training runs of the controlled problem, by model, trained factors, optimizer, rank, scaling rule and rate.

grid = ControlledGrid(ranks=(4, 64), optimizers=("sgd",), models=("linear",))
rows = [row for cell in cells_of(grid) for row in train_cell(grid, cell)]
rank_exponents.exponent_fits(frames.from_rows(rows, COLUMNS))
tabulate_best_rates(curves_of_losses(frames.from_rows(losses_at_end(rows), LOSS_COLUMNS)))
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory.lab.sweep import controlled
from rora_theory.lab.sweep.controlled import MODELS, Model, ProblemConfig
from rora_theory.lab.sweep.rank_exponents import CELL, QUANTITIES
from rora_theory.laws.grid import RankGrid
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.runs import frames
from rora_theory.scaling import Rule, check_choice, check_positive, exponent, scaling_factor
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.trained_runs import TrainedRun, curves_of_runs
from rora_theory.validation.rules import check_list, name_of

COLUMNS = (*CELL, "seed", "step", "diverged", *QUANTITIES)
"""Columns of the table of measurements."""

LOSS_COLUMNS = (*CELL[1:], "seed", "loss_train", "loss_held_out")
"""Columns of the table of losses, from which curves are built."""

Trained = Literal["both", "B"]
"""Trained factors: both, or B alone with A frozen."""

JudgedLoss = Literal["held_out", "train"]
"""Loss by which learning rates are compared."""

DIVERGED = 10.0
"""Factor over its initial value at which a training loss counts as diverged, like a loss that is not finite."""

UNITS = {
    "loss": "squared error / 2, summed over outputs, averaged over inputs",
    "output_train, output_held_out": "root mean square of the change of the model's output",
    "delta_frobenius": "|gamma B A|_F over layers together",
    "_se": "standard error of the mean over the seeds that did not diverge",
    "loss_left": "lowest training loss among the fitted ranks, relative to its start; near 0 the output cannot grow",
    "trained": "both factors, or B alone with A frozen",
}


@dataclass(frozen=True)
class ControlledGrid(RankGrid):
    """Settings of the runs.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = (4, 16, 64, 256, 1024)
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    optimizers: tuple[OptimizerName, ...] = OPTIMIZER_NAMES
    steps: tuple[int, ...] = (1, 2, 5, 10, 30, 100)
    seeds: tuple[int, ...] = tuple(range(8))
    models: tuple[Model, ...] = MODELS
    """Models: linear [p_out, p_in], and mlp [p_out, hidden] tanh [hidden, p_in]"""
    freeze_control: bool = True
    """Repeat the runs with A frozen"""
    adam_lrs: tuple[float, ...] = (1e-4,)
    """Learning rates of adam and adamw"""
    sgd_lrs: tuple[float, ...] = (0.003,)
    """Learning rates of sgd, and ten times those of momentum"""
    problem: ProblemConfig = field(default_factory=ProblemConfig)
    """Sizes and distribution of the problem"""
    seed: int = 0
    """Seed from which all random draws are derived"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_list("models", self.models, partial(check_choice, choices=MODELS))
        for option, rates in (("adam_lrs", self.adam_lrs), ("sgd_lrs", self.sgd_lrs)):
            check_list(option, rates, check_positive)
        check_seed("seed", self.seed)
        self.problem.check_ranks(self.ranks)

    def rates(self, optimizer: OptimizerName) -> Float[np.ndarray, " rates"]:
        """Return the learning rates of an optimizer, ascending."""
        if optimizer in ("adam", "adamw"):
            return np.sort(self.adam_lrs)
        return np.sort(self.sgd_lrs) / (10 if optimizer == "momentum" else 1)

    @property
    def trained(self) -> tuple[Trained, ...]:
        """Trained factors of the runs; B alone means that A is frozen."""
        return ("both", "B") if self.freeze_control else ("both",)


@dataclass(frozen=True)
class ControlledCell:
    """Runs of one compiled call: all seeds and learning rates.

    Attributes:
      model: Model of teacher and student.
      trained: Trained factors: both, or B alone with A frozen.
      optimizer: Optimizer of the runs.
      rank: Rank of the adapters.
      rule: Scaling rule.
    """

    model: Model
    trained: Trained
    optimizer: OptimizerName
    rank: int
    rule: Rule

    def __str__(self) -> str:
        frozen = ", A frozen" if self.trained == "B" else ""
        return f"{self.model}, {self.optimizer}, {name_of(self.rule)}{frozen}, r = {self.rank}"


def cells_of(grid: ControlledGrid) -> list[ControlledCell]:
    """Return the cells of a grid; cells that share a compiled function are adjacent."""
    return [
        ControlledCell(model, trained, optimizer, rank, rule)
        for model in grid.models
        for optimizer in grid.optimizers
        for trained in grid.trained
        for rank in sorted(grid.ranks)
        for rule in grid.rules
    ]


def train_cell(grid: ControlledGrid, cell: ControlledCell) -> list[dict[str, Any]]:
    """Train a cell and return a row for every seed, rate and recorded step, with the start as the first one.

    The problem of a seed is the same at every rank, and its adapters are nested over ranks. A run counts as diverged
    from the first recorded step on at which its training loss is not finite or more than `DIVERGED` times its start.
    """
    scaling = scaling_factor(cell.rule, alpha=grid.alpha(cell.rule), rank=cell.rank)
    rates = grid.rates(cell.optimizer)
    # Two keys for each seed, [seeds, 2]: one of the problem and one of the adapters.
    keys = jax.vmap(lambda member: jax.random.split(jax.random.fold_in(jax.random.key(grid.seed), member)))(
        np.asarray(grid.seeds, np.uint32)
    )
    # Arrays [seeds, rates, 1 + steps].
    measured = controlled.trajectories(
        jax.vmap(lambda key: controlled.draw_adapters(key, grid.problem, cell.model, rank=cell.rank))(keys[:, 1]),
        jax.vmap(lambda key: controlled.draw_problem(key, grid.problem, cell.model))(keys[:, 0]),
        scaling,
        jnp.asarray(rates, jnp.float32),
        optimizer=cell.optimizer,
        steps=grid.steps,
        freeze_A=cell.trained == "B",
    )
    values = {name: np.asarray(value, np.float64) for name, value in measured._asdict().items()}
    is_finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    is_bounded = values["loss_train"] <= DIVERGED * values["loss_train"][..., :1]
    # Along the steps, a run stays diverged once it has diverged.
    diverged = np.maximum.accumulate(~(is_finite & is_bounded), axis=-1)
    # Tidy rows: the cell's columns, then seed, step and measurements.
    labels = asdict(cell) | {"rule": name_of(cell.rule), "kappa": exponent(cell.rule), "scaling": scaling}
    return [
        {name: (labels | {"learning_rate": float(rate)})[name] for name in CELL}
        | {"seed": seed, "step": step, "diverged": int(diverged[place])}
        | {name: float(values[name][place]) for name in QUANTITIES}
        for rate_index, rate in enumerate(rates)
        for seed_index, seed in enumerate(grid.seeds)
        for step_index, step in enumerate((0, *grid.steps))
        for place in [(seed_index, rate_index, step_index)]
    ]


def losses_at_end(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the losses after the last step with the columns `LOSS_COLUMNS`; infinite if the run diverged."""
    last = max(row["step"] for row in rows)
    diverged = dict.fromkeys(("loss_train", "loss_held_out"), math.inf)
    return [
        {name: (row | diverged if row["diverged"] else row)[name] for name in LOSS_COLUMNS}
        for row in map(dict, rows)
        if row["step"] == last
    ]


def curves_of_losses(table: pd.DataFrame, judge: JudgedLoss = "held_out") -> list[Curve]:
    """Build the curves of a table of `losses_at_end`, in the order of the cells."""
    return curves_of_runs(
        TrainedRun(
            row["rule"], row["rank"], row["scaling"], row["learning_rate"], row["seed"], row[f"loss_{judge}"],
            optimizer=row["optimizer"], trained=row["trained"], kappa=row["kappa"],
        )
        for row in frames.rows(table)
    )  # fmt: skip
