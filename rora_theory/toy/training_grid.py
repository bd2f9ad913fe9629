"""The controlled problem trained by rank, scaling rule and optimizer: what is measured after some steps.

grid = TrainingGrid(ranks=(4, 64), optimizers=("sgd",), models=("linear",))
rows = [row for cell in training_cells(grid) for row in training_rows(grid, cell)]
found = exponents.exponent_fits(frames.of(rows, COLUMNS))
grid_answers(grid, found)
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import Rule, exponent, scaling_factor
from rora_theory.toy import ensemble, exponents
from rora_theory.toy.dynamics import MODELS, STARTS, Model, ProblemConfig, ProblemSize, Start
from rora_theory.toy.exponents import CELL, QUANTITIES, Answer
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import (
    alpha_at,
    check_alphas,
    check_choices,
    check_ranks,
    check_rules,
    check_seeds,
    check_steps,
    name_of,
)

COLUMNS = (*CELL, "seed", "step", "diverged", *QUANTITIES)
UNITS = {
    "loss": "squared error / 2, summed over outputs, averaged over inputs",
    "output_train, output_held_out": "root mean square of the change of the model's output",
    "delta_frobenius, delta_spectral": "|gamma B A|_F over layers together, largest |gamma B A|_2 of a layer",
    "inner": "root mean square of A x on training inputs",
    "grad_A, grad_B": "Frobenius norm of the gradient at that step's parameters",
    "_se": "standard error of the mean over the seeds that did not diverge",
    "loss_left": "least training loss among the fitted ranks, over its start: near 0 the output can grow no more",
    "trained": "both factors, or B alone with A frozen",
}


@dataclass(frozen=True)
class TrainingGrid:
    """What to train.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = (4, 16, 64, 256, 1024)
    """ranks of the adapter, at least two; they may exceed the layer's width"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZER_NAMES
    """optimizers: momentum is 0.9; adamw decays by 0.01"""
    models: tuple[Model, ...] = MODELS
    """the problems: linear [p_out, p_in], and mlp [p_out, hidden] tanh [hidden, p_in]"""
    starts: tuple[Start, ...] = STARTS
    """the factor that starts random; the other starts at zero"""
    freeze_control: bool = True
    """train from A random once more with A frozen"""
    steps: tuple[int, ...] = (1, 2, 5, 10, 30, 100)
    """updates after which to measure, ascending; the start is measured too"""
    seeds: tuple[int, ...] = tuple(range(8))
    """of problems and adapters, 2 or more, for error bars"""
    gamma: float = 1.0
    """scaling of every rule at the reference rank"""
    reference_rank: int = 4
    """rank at which the rules meet"""
    sgd_lr: Positive = 0.003
    """learning rate of sgd"""
    momentum_lr: Positive = 3e-4
    """learning rate of momentum"""
    adam_lr: Positive = 1e-4
    """learning rate of adam and adamw"""
    init: Init = "kaiming_uniform"
    """law of A where it starts random"""
    problem: ProblemSize = field(default_factory=ProblemSize)
    seed: int = 0
    """seed of all draws"""

    def __post_init__(self) -> None:
        check_ranks(self.ranks)
        check_rules(self.rules)
        check_alphas(self.rules, gamma=self.gamma, reference_rank=self.reference_rank)
        for name, accepted in (("optimizers", OPTIMIZER_NAMES), ("models", MODELS), ("starts", STARTS)):
            check_choices(f"--{name}", getattr(self, name), accepted)
        if self.init not in INITS:
            raise InputError(f"--init is {self.init!r}; accepted are {', '.join(INITS)}")
        check_steps(self.steps)
        check_ranges(self)
        check_seeds(self.seeds, fewest=2)
        check_seed(self.seed, "--seed")
        self.problem.check_ranks(self.ranks)

    def lr(self, optimizer: OptimizerName) -> float:
        """The learning rate of an optimizer."""
        return {"sgd": self.sgd_lr, "momentum": self.momentum_lr}.get(optimizer, self.adam_lr)

    def trained(self, start: Start) -> tuple[Literal["both", "B"], ...]:
        """Which factors are trained, in each of a start's runs: B alone where A is frozen."""
        return ("both", "B") if self.freeze_control and start == "A" else ("both",)


@dataclass(frozen=True)
class TrainingCell:
    """One compiled scan over all seeds; ``trained`` is both factors, or B alone with A frozen."""

    model: Model
    start: Start
    trained: Literal["both", "B"]
    optimizer: OptimizerName
    rank: int
    rule: Rule

    def __str__(self) -> str:
        return f"{self.model}, {self.optimizer}, {self.start} random, r = {self.rank}"


def training_cells(grid: TrainingGrid) -> list[TrainingCell]:
    """All of a grid; those that share a compiled function follow each other."""
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
    """What a cell shows: a row a seed and recorded step."""
    alpha = alpha_at(cell.rule, gamma=grid.gamma, reference_rank=grid.reference_rank)
    scaling, lr = scaling_factor(cell.rule, alpha=alpha, rank=cell.rank), grid.lr(cell.optimizer)
    adapters, problems = ensemble.draw_ensemble(
        ProblemConfig(model=cell.model, **asdict(grid.problem)),
        rank=cell.rank,
        seeds=grid.seeds,
        seed=grid.seed,
        start=cell.start,
        init=grid.init,
    )
    values, diverged = ensemble.ensemble_trajectories(
        adapters,
        problems,
        scaling=scaling,
        learning_rate=lr,
        optimizer=cell.optimizer,
        steps=grid.steps,
        frozen=cell.start if cell.trained == "B" else None,
    )
    named = asdict(cell) | {"rule": name_of(cell.rule), "kappa": exponent(cell.rule)}
    named |= {"scaling": scaling, "learning_rate": lr}
    return [
        {name: named[name] for name in CELL}
        | {"seed": seed, "step": step, "diverged": int(diverged[line, index])}
        | {name: float(value[line, index]) for name, value in values.items()}
        for line, seed in enumerate(grid.seeds)
        for index, step in enumerate((0, *grid.steps))
    ]


def grid_answers(grid: TrainingGrid, found: pd.DataFrame) -> list[Answer]:
    """What the slopes of `exponents.exponent_fits` say of the claims in the literature, where A began at random."""
    return exponents.answers(
        found,
        models=grid.models if "A" in grid.starts else (),
        optimizers=grid.optimizers,
        kappas=[exponent(rule) for rule in grid.rules],
        ranks=grid.ranks,
        overlap=grid.problem.overlap,
        freeze_control=grid.freeze_control,
    )
