"""Measure how the change of an adapted layer depends on the rank after 1 to 100 steps, in a teacher-student problem.

A student with a low-rank adapter learns from a teacher, a linear layer or a small MLP, see
`rora_theory.lab.sweep.controlled`. The optimizers are SGD, SGD with momentum, Adam and AdamW. Both factors are trained,
or A stays frozen. All scaling rules have the same scaling at rank 4. The log-log slope of each quantity against the
rank is fitted for every seed; a rule aims at a slope of 0.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.lab.sweep import controlled_grid, rank_exponents
from rora_theory.lab.sweep.controlled_grid import ControlledGrid
from rora_theory.lab.sweep.grid import SweepCell
from rora_theory.lab.sweep.methods import find_method
from rora_theory.lab.sweep.rank_exponents import CELL, SATURATED
from rora_theory.runs import devices
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from rora_theory.validation.rules import name_of
from sims.common import answers, cli, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "training_dynamics"
QUANTITY_LABELS = {"output_train": "training", "output_held_out": "held-out", "delta_frobenius": "|dM|_F"}
"""Quantities in the printed tables, with their labels: output changes, and the Frobenius norm of the change dM."""


@dataclass(frozen=True)
class TrainingDynamicsOptions:
    grid: ControlledGrid = field(default_factory=ControlledGrid)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None


def measure_dynamics(config: TrainingDynamicsOptions) -> None:
    """Train the cells that the run folder lacks, then fit the slopes and report."""
    grid, runner = config.grid, config.cluster.runner()
    extra = {"units": controlled_grid.UNITS, "device": devices.describe_devices(devices.pick(1))}
    folder = RunFolder.open(NAME, flatten(grid), out=config.out, seed=grid.seed, extra=extra)

    def work(cell: SweepCell, _: Path) -> list[dict[str, Any]]:
        return controlled_grid.train_cell(grid, cell)

    # Rows of every seed, step and quantity.
    columns = controlled_grid.COLUMNS
    seed_rows = run_table(
        grid.cells(), work, folder, columns, runner=runner, title="training dynamics", name="seeds.csv"
    )
    # Means over seeds, and slopes in the rank.
    folder.write_frame(rank_exponents.summarise_seeds(seed_rows))
    fits = rank_exponents.exponent_fits(seed_rows)
    folder.write_frame(fits, "exponents.csv")
    ends = fits[(fits["step"] == grid.read_at[-1]) & (fits["range"] == "all") & fits["quantity"].isin(QUANTITY_LABELS)]
    scope = ("model", "trained", "optimizer", "rule", "quantity", "step", "ranks", "verdict")
    with summarised(folder, key_figures(ends, "slope in the rank", "slope", over="seeds", scope=scope)):
        report(grid, seed_rows, fits)
    folder.finish()
    answers.print_files(folder.path)


def report(grid: ControlledGrid, rows: pd.DataFrame, fits: pd.DataFrame) -> None:
    """Print the answer, the slopes at the first, a middle and the last step, and the diverged cells."""
    answers.print_answer(rank_exponents.describe_fits(fits))
    # First, middle and last step.
    steps = dict.fromkeys((grid.read_at[0], grid.read_at[len(grid.read_at) // 2], grid.read_at[-1]))
    rules = [name_of(find_method(method).rule) for method in grid.methods]
    lines = list(itertools.product(grid.optimizers, rules))
    # One table for each model and trained factors.
    for model, trained in itertools.product(grid.model, grid.trained):
        fits_of_kind = fits[(fits[["model", "trained", "range"]] == [model, trained, "all"]).all(axis=1)]
        table = {
            (row["optimizer"], row["rule"], row["quantity"], row["step"]): _slope(row, len(grid.ranks))
            for row in fits_of_kind.to_dict("records")
        }
        figures = [(quantity, step) for quantity in QUANTITY_LABELS for step in steps]
        tables.print_table(
            f"{model}, {trained} trained: slope of the output change and of |dM|_F against the rank, with its "
            "standard error in brackets, by step; * loss below half of its start, † without diverged ranks",
            ["optimizer", "rule", *[f"{QUANTITY_LABELS[quantity]} {step}" for quantity, step in figures]],
            [[*line, *(table.get((*line, *figure), "diverged") for figure in figures)] for line in lines],
            left=2,
        )
    # Diverged runs are excluded from the slopes, so they are listed.
    diverged = rows[(rows["step"] == grid.read_at[-1]) & (rows["diverged"] > 0)]
    if len(diverged):
        tables.print_text("Runs that diverged by the last step (model, trained, optimizer, rule, rank):")
        for cell in diverged[[*CELL[:4], "rank"]].drop_duplicates().itertuples(index=False):
            tables.print_text("  " + ", ".join(map(str, cell)))
    else:
        tables.print_text("No run diverged.")


def _slope(row: dict[Any, Any], ranks: int) -> str:
    marks = ("*" if row["loss_left"] < SATURATED else "") + ("†" if row["ranks"] < ranks else "")
    return f"{row['slope']:+.2f} ({row['standard_error']:.2f}){marks}"


main = cli.command(TrainingDynamicsOptions, measure_dynamics, __doc__)

if __name__ == "__main__":
    main()
