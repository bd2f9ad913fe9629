"""Matrix of training runs of the controlled problem, by model, trained factors, optimizer, rank, scaling rule and rate.

grid = ControlledGrid(ranks=(4, 64), optimizers=("sgd",), model=("linear",))
rows = [row for cell in grid.cells() for row in train_cell(grid, cell)]
rank_exponents.exponent_fits(frames.from_rows(rows, COLUMNS))
tabulate_best_rates(curves_of_losses(frames.from_rows(losses_at_end(rows), LOSS_COLUMNS)))
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory.lab.sweep import controlled
from rora_theory.lab.sweep.controlled import MODELS, Model, ProblemConfig
from rora_theory.lab.sweep.grid import RunGrid, SweepCell
from rora_theory.lab.sweep.methods import check_scaling, find_method
from rora_theory.lab.sweep.rank_exponents import CELL, QUANTITIES
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.runs import frames
from rora_theory.scaling import check_choice, check_positive, exponent
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.trained_runs import TrainedRun, curves_of_runs
from rora_theory.validation.rules import alpha_at, check_list, check_rules, check_steps, name_of

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
class ControlledGrid(RunGrid):
    """Settings of the runs. All methods have the same scaling at a reference rank.

    Raises:
      InputError: If a value is out of range.
    """

    model: tuple[Model, ...] = MODELS
    """Models: linear [p_out, p_in], and mlp [p_out, hidden] tanh [hidden, p_in]"""
    methods: tuple[str, ...] = ("lora", "rora", "quarter")
    """Scalings of LoRA: lora, rora, rslora, quarter, or the exponent kappa of gamma = alpha / r^kappa"""
    ranks: tuple[int, ...] = (4, 16, 64, 256, 1024)
    """Ranks of the adapter, at least two; they may exceed the layer's width"""
    seeds: tuple[int, ...] = tuple(range(8))
    """Seeds of the runs, at least two for error bars"""
    read_at: tuple[int, ...] = (1, 2, 5, 10, 30, 100)
    optimizers: tuple[OptimizerName, ...] = OPTIMIZER_NAMES
    """Optimizers: sgd, momentum (0.9), adam, adamw (weight decay 0.01), at a constant learning rate"""
    freeze_control: bool = True
    """Repeat the runs with A frozen"""
    adam_lrs: tuple[float, ...] = (1e-4,)
    """Learning rates of adam and adamw"""
    sgd_lrs: tuple[float, ...] = (0.003,)
    """Learning rates of sgd, and ten times those of momentum"""
    gamma: float = 1.0
    """Scaling factor of every method at the reference rank"""
    reference_rank: int = 4
    """Rank at which all methods have the same scaling factor"""
    problem: ProblemConfig = field(default_factory=ProblemConfig)
    """Sizes and distribution of the problem"""
    seed: int = 0
    """Seed from which all random draws are derived"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_list("model", self.model, partial(check_choice, choices=MODELS))
        check_list("ranks", self.ranks, fewest=2)
        check_list("seeds", self.seeds, fewest=2)
        check_steps(self.read_at, "read_at")
        check_list("optimizers", self.optimizers, partial(check_choice, choices=OPTIMIZER_NAMES))
        for name in self.methods:
            check_scaling(name)
        rules = [find_method(name).rule for name in self.methods]
        check_rules(rules, "methods", gamma=self.gamma, reference_rank=self.reference_rank)
        for option, rates in (("adam_lrs", self.adam_lrs), ("sgd_lrs", self.sgd_lrs)):
            check_list(option, rates, check_positive)
        check_seed("seed", self.seed)
        self.problem.check_ranks(self.ranks)
        for cell in self.cells():
            _ = cell.gamma  # an exponent far from 0 has no scaling at some rank

    def rates(self, optimizer: OptimizerName) -> Float[np.ndarray, " rates"]:
        """Return the learning rates of an optimizer, ascending."""
        if optimizer in ("adam", "adamw"):
            return np.sort(self.adam_lrs)
        return np.sort(self.sgd_lrs) / (10 if optimizer == "momentum" else 1)

    @property
    def trained(self) -> tuple[Trained, ...]:
        """Trained factors of the runs; B alone means that A is frozen."""
        return ("both", "B") if self.freeze_control else ("both",)

    def cells(self) -> list[SweepCell]:
        """Return the cells, each with all rates and seeds; cells that share a compiled function are adjacent."""
        variants = [
            {"optimizer": optimizer, "trained": trained} for optimizer in self.optimizers for trained in self.trained
        ]
        settings = (setting for model in self.model for setting in self.settings(model, variants, self.alphas))
        return [replace(setting, read_at=self.read_at) for setting in settings]

    def alphas(self, method: str) -> tuple[float, ...]:
        """Return the alpha of a method, with which it has the scaling of the reference rank."""
        return (alpha_at(find_method(method).rule, gamma=self.gamma, reference_rank=self.reference_rank),)


def train_cell(grid: ControlledGrid, cell: SweepCell) -> list[dict[str, Any]]:
    """Train a cell and return a row for every seed, rate and recorded step, with the start as the first one.

    The problem of a seed is the same at every rank, and its adapters are nested over ranks. A run counts as diverged
    from the first recorded step on at which its training loss is not finite or more than `DIVERGED` times its start.
    """
    # The grid has checked the model, and all its methods have a rank.
    model, rank = cast(Model, cell.model), cast(int, cell.rank)
    optimizer, trained = cell.axes["optimizer"], cell.axes["trained"]
    rates = grid.rates(optimizer)
    # Two keys for each seed, [seeds, 2]: one of the problem and one of the adapters.
    keys = jax.vmap(lambda member: jax.random.split(jax.random.fold_in(jax.random.key(grid.seed), member)))(
        np.asarray(grid.seeds, np.uint32)
    )
    # Arrays [seeds, rates, 1 + steps].
    measured = controlled.trajectories(
        jax.vmap(lambda key: controlled.draw_adapters(key, grid.problem, model, rank=rank))(keys[:, 1]),
        jax.vmap(lambda key: controlled.draw_problem(key, grid.problem, model))(keys[:, 0]),
        cell.gamma,
        jnp.asarray(rates, jnp.float32),
        optimizer=optimizer,
        steps=cell.read_at,
        freeze_A=trained == "B",
    )
    values = {name: np.asarray(value, np.float64) for name, value in measured._asdict().items()}
    is_finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    is_bounded = values["loss_train"] <= DIVERGED * values["loss_train"][..., :1]
    # Along the steps, a run stays diverged once it has diverged.
    diverged = np.maximum.accumulate(~(is_finite & is_bounded), axis=-1)
    # Tidy rows: the cell's columns, then seed, step and measurements.
    rule = find_method(cell.method).rule
    labels = {"model": model, "trained": trained, "optimizer": optimizer, "rule": name_of(rule)}
    labels |= {"kappa": exponent(rule), "rank": rank, "scaling": cell.gamma}
    return [
        {name: (labels | {"learning_rate": float(rate)})[name] for name in CELL}
        | {"seed": seed, "step": step, "diverged": int(diverged[place])}
        | {name: float(values[name][place]) for name in QUANTITIES}
        for rate_index, rate in enumerate(rates)
        for seed_index, seed in enumerate(grid.seeds)
        for step_index, step in enumerate((0, *cell.read_at))
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
