"""Measurements during training on the controlled problem, by rank, scaling rule and optimizer.

grid = TrainingGrid(ranks=(4, 64), optimizers=("sgd",), models=("linear",))
rows = [row for cell in training_cells(grid) for row in training_rows(grid, cell)]
fits = rank_exponents.exponent_fits(frames.from_rows(rows, COLUMNS))
grid_answers(grid, fits)
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import pandas as pd

from rora_theory.inits import INITS, Init
from rora_theory.lab.sweep import controlled, rank_exponents
from rora_theory.lab.sweep.controlled import MODELS, STARTS, Model, ProblemConfig, ProblemSize, Start
from rora_theory.lab.sweep.rank_exponents import CELL, QUANTITIES, Answer
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.scaling import Rule, check_choice, check_integer, exponent, scaling_factor
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import (
    alpha_at,
    check_list,
    check_rules,
    check_steps,
    name_of,
)

COLUMNS = (*CELL, "seed", "step", "diverged", *QUANTITIES)
"""Columns of the table of measurements."""

UNITS = {
    "loss": "squared error / 2, summed over outputs, averaged over inputs",
    "output_train, output_held_out": "root mean square of the change of the model's output",
    "delta_frobenius, delta_spectral": "|gamma B A|_F over layers together, largest |gamma B A|_2 of a layer",
    "inner": "root mean square of A x on training inputs",
    "grad_A, grad_B": "Frobenius norm of the gradient at that step's parameters",
    "_se": "standard error of the mean over the seeds that did not diverge",
    "loss_left": "lowest training loss among the fitted ranks, relative to its start; near 0 the output cannot grow",
    "trained": "both factors, or B alone with A frozen",
}


@dataclass(frozen=True)
class TrainingGrid:
    """Settings of the runs.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = (4, 16, 64, 256, 1024)
    """Ranks of the adapter, at least two; they may exceed the layer's width"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZER_NAMES
    """Optimizers: sgd, momentum (0.9), adam, adamw (weight decay 0.01)"""
    models: tuple[Model, ...] = MODELS
    """Models: linear [p_out, p_in], and mlp [p_out, hidden] tanh [hidden, p_in]"""
    starts: tuple[Start, ...] = STARTS
    """Factors with a random initialisation; the other one starts at zero"""
    freeze_control: bool = True
    """Repeat the runs that start with A random, with A frozen"""
    steps: tuple[int, ...] = (1, 2, 5, 10, 30, 100)
    """Numbers of updates at which to measure, ascending; the start is also measured"""
    seeds: tuple[int, ...] = tuple(range(8))
    """Seeds of the problems and adapters, 2 or more for error bars"""
    gamma: float = 1.0
    """Scaling factor of every rule at the reference rank"""
    reference_rank: int = 4
    """Rank at which all rules have the same scaling factor"""
    sgd_lr: Positive = 0.003
    """Learning rate of sgd"""
    momentum_lr: Positive = 3e-4
    """Learning rate of momentum"""
    adam_lr: Positive = 1e-4
    """Learning rate of adam and adamw"""
    init: Init = "kaiming_uniform"
    """Initialisation of A, if A starts random"""
    problem: ProblemSize = field(default_factory=ProblemSize)
    """Sizes and distribution of the problem"""
    seed: int = 0
    """Seed from which all random draws are derived"""

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_list("--ranks", self.ranks, check_integer, fewest=2)
        # All rules have the same gamma at the reference rank.
        check_rules(self.rules, gamma=self.gamma, reference_rank=self.reference_rank)
        for name, choices in (("optimizers", OPTIMIZER_NAMES), ("models", MODELS), ("starts", STARTS)):
            check_list(f"--{name}", getattr(self, name), partial(check_choice, choices=choices))
        check_choice("--init", self.init, INITS)
        check_steps(self.steps)
        check_ranges(self)
        check_list("--seeds", self.seeds, check_seed, fewest=2)
        check_seed("--seed", self.seed)
        self.problem.check_ranks(self.ranks)

    def lr(self, optimizer: OptimizerName) -> float:
        """Return the learning rate of an optimizer."""
        return {"sgd": self.sgd_lr, "momentum": self.momentum_lr}.get(optimizer, self.adam_lr)

    def trained(self, start: Start) -> tuple[Literal["both", "B"], ...]:
        """Return the trained factors of each run with this start; B alone means that A is frozen."""
        return ("both", "B") if self.freeze_control and start == "A" else ("both",)


@dataclass(frozen=True)
class TrainingCell:
    """Runs of one compiled scan over all seeds.

    Attributes:
      model: Model of teacher and student.
      start: Factor with a random initialisation.
      trained: Trained factors: both, or B alone with A frozen.
      optimizer: Optimizer of the runs.
      rank: Rank of the adapters.
      rule: Scaling rule.
    """

    model: Model
    start: Start
    trained: Literal["both", "B"]
    optimizer: OptimizerName
    rank: int
    rule: Rule

    def __str__(self) -> str:
        """Return the label of the cell, as progress messages show it."""
        return f"{self.model}, {self.optimizer}, {self.start} random, r = {self.rank}"


def training_cells(grid: TrainingGrid) -> list[TrainingCell]:
    """Return the cells of a grid; cells that share a compiled function are adjacent."""
    return [
        TrainingCell(model, start, trained, optimizer, rank, rule)
        for model in grid.models
        for optimizer in grid.optimizers
        for rank in sorted(grid.ranks)
        for start in grid.starts
        for trained in grid.trained(start)
        for rule in grid.rules
    ]


def training_rows(grid: TrainingGrid, cell: TrainingCell) -> list[dict[str, Any]]:
    """Train a cell and return one row per seed and recorded step."""
    alpha = alpha_at(cell.rule, gamma=grid.gamma, reference_rank=grid.reference_rank)
    scaling, lr = scaling_factor(cell.rule, alpha=alpha, rank=cell.rank), grid.lr(cell.optimizer)
    # One compiled scan trains all seeds.
    adapters, problems = controlled.draw_ensemble(
        ProblemConfig(model=cell.model, **asdict(grid.problem)),
        rank=cell.rank,
        seeds=grid.seeds,
        seed=grid.seed,
        start=cell.start,
        init=grid.init,
    )
    # Arrays [seeds, 1 + steps], with the start as the first recorded step.
    values, diverged = controlled.ensemble_trajectories(
        adapters,
        problems,
        scaling=scaling,
        learning_rate=lr,
        optimizer=cell.optimizer,
        steps=grid.steps,
        frozen=cell.start if cell.trained == "B" else None,
    )
    # Tidy rows: the cell's columns, then seed, step and measurements.
    labels = asdict(cell) | {"rule": name_of(cell.rule), "kappa": exponent(cell.rule)}
    labels |= {"scaling": scaling, "learning_rate": lr}
    return [
        {name: labels[name] for name in CELL}
        | {"seed": seed, "step": step, "diverged": int(diverged[seed_index, step_index])}
        | {name: float(value[seed_index, step_index]) for name, value in values.items()}
        for seed_index, seed in enumerate(grid.seeds)
        for step_index, step in enumerate((0, *grid.steps))
    ]


def grid_answers(grid: TrainingGrid, fits: pd.DataFrame) -> list[Answer]:
    """Answer the questions about claims in the literature from the slopes of `rank_exponents.exponent_fits`."""
    return rank_exponents.answers(
        fits,
        models=grid.models if "A" in grid.starts else (),
        optimizers=grid.optimizers,
        kappas=[exponent(rule) for rule in grid.rules],
        ranks=grid.ranks,
        overlap=grid.problem.overlap,
        freeze_control=grid.freeze_control,
    )
