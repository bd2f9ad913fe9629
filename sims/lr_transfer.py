"""Find the best learning rate at each rank, for each scaling rule, and test whether it depends on the rank.

    python -m sims.lr_transfer

A student is trained on a teacher over a grid of learning rates, ranks, rules and optimizers. A rule transfers if its
best rate does not depend on the rank.
At the largest rank, the best losses of two rules are compared, each at its own best rate: a remaining difference is
more than a shift of the rate.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.errors import InputError
from rora_theory.lab.sweep import controlled_grid
from rora_theory.lab.sweep.controlled import Model, ProblemConfig
from rora_theory.lab.sweep.controlled_grid import ControlledGrid, JudgedLoss
from rora_theory.lab.sweep.grid import SweepCell
from rora_theory.optimizers import OptimizerName
from rora_theory.runs import devices
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from rora_theory.scaling import check_positive
from rora_theory.stats.rate_curves import (
    UNITS,
    Comparison,
    compare_rules,
    describe_slopes,
    rate_slopes,
    tabulate_best_rates,
)
from rora_theory.validation.rules import check_list
from sims.common import answers, cli, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "lr_transfer"


@dataclass(frozen=True)
class RateGrid(ControlledGrid):
    """Settings of the runs. The rates contain every rule's best step at ranks that are powers of two times 4."""

    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    optimizers: tuple[OptimizerName, ...] = ("sgd", "adam")
    model: tuple[Model, ...] = ("linear",)
    adam_lrs: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-26, 7))
    sgd_lrs: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-14, 22))
    read_at: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = tuple(range(12))
    problem: ProblemConfig = field(
        default_factory=lambda: ProblemConfig(
            p_in=128, hidden=64, p_out=16, samples=256, held_out=256, overlap=0.3, teacher_rank=4, noise=0.1
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.model) > 1:
            raise InputError(f"model must be a single one, got {' '.join(self.model)}")
        for option in ("adam_lrs", "sgd_lrs"):
            check_list(option, getattr(self, option), check_positive, fewest=3)


@dataclass(frozen=True)
class LrTransferOptions:
    grid: RateGrid = field(default_factory=RateGrid)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    judge: JudgedLoss = "held_out"
    """Loss that determines the best rate"""
    out: cli.Out = None


def measure_rate_transfer(config: LrTransferOptions) -> None:
    """Train the cells that the run folder lacks, then find the best rates and report."""
    runner = config.cluster.runner()
    grid, extra = (
        config.grid,
        {"units": UNITS, "device": devices.describe_devices(devices.pick(1)), "judge": config.judge},
    )
    folder = RunFolder.open(NAME, flatten(grid), out=config.out, seed=grid.seed, extra=extra)

    def work(cell: SweepCell, _: Path) -> list[dict[str, Any]]:
        return controlled_grid.losses_at_end(controlled_grid.train_cell(grid, cell))

    losses = run_table(grid.cells(), work, folder, controlled_grid.LOSS_COLUMNS, runner=runner, title="rates")
    curves = controlled_grid.curves_of_losses(losses, config.judge)
    compared = compare_rules(curves)
    # Best rates, and their slopes against the rank.
    best, slopes = tabulate_best_rates(curves), rate_slopes(curves)
    folder.write_frame(best, "best.csv")
    folder.write_frame(slopes, "slopes.csv")
    folder.write("comparison.json", json.dumps([asdict(comparison) for comparison in compared], indent=2) + "\n")
    samples, scope = best["error_over"].iloc[0], ("optimizer", "trained", "rule", "ranks", "verdict")
    with summarised(folder, key_figures(slopes, "slope of the best rate", "slope", over=samples, scope=scope)):
        report(best, slopes, compared)
    folder.finish()
    answers.print_files(folder.path)


def report(best: pd.DataFrame, slopes: pd.DataFrame, compared: Sequence[Comparison]) -> None:
    """Print the best rates, their slopes against the rank, and the comparisons of rules."""
    answers.print_answer(describe_slopes(slopes))
    # A line for each optimizer, trained factors and rule; a column for each rank.
    ranks, line = sorted(set(best["rank"])), ["optimizer", "trained", "rule"]
    cells = best.assign(text=best.apply(format_best, axis=1))
    cells = cells.pivot(index=line, columns="rank", values="text").fillna("")
    tables.print_table(
        "Best learning rate (parabola through the three lowest losses), × / ÷ half of the 95% interval; < > at the "
        "edge of the grid",
        [*line, *[f"r = {rank}" for rank in ranks]],
        [[*key, *cells.loc[key]] for key in best[line].drop_duplicates().itertuples(index=False, name=None)],
        left=3,
    )
    # Slopes; a flat one means that the rate transfers between ranks.
    half = slopes["half_width"].astype(float).map("{:.2g}".format)
    words = slopes.assign(word=slopes["verdict"].replace("flat", "transfers"), half=half)
    tables.print_records(
        "Slope of the best rate against the rank, ± half of the 95% interval, and the slopes that preserve the step",
        words.fillna({"nearest": ""}),
        {name: f"{{{name}}}" for name in line}
        | {"slope": "{slope:+.3f} ± {half}", "verdict": "{word}"}
        | {name: f"{{{name}:+.2f}}" for name in ("signal", "cross-talk", "A moves")}
        | {"nearest": "{nearest}"},
        left=3,
    )
    # Rules at the largest rank, each at its own best rate: what differs then is more than a shift of the rate.
    tables.print_records(
        "Comparison of rules at the largest rank, each at its own best rate; ± half of the 95% interval and the error "
        "of the grid",
        [asdict(comparison) for comparison in compared],
        {
            "rules": "{first}, {second}",
            "trained": "{optimizer}, {trained}",
            "verdict": "{verdict}",
            "rank": "{rank}",
            "ratio of rates": "{ratio:.3g}",
            "losses": "{first_loss:.4g}, {second_loss:.4g}",
        },
        left=3,
    )


def format_best(row: Any) -> str:
    """Format a row of the best rates: < or > at the grid's edge, the rate, and the factor of half its interval."""
    mark = {"low": "<", "high": ">"}.get(row["edge"], "")
    has_error = row["log2_half_width"] is not None and not math.isnan(row["log2_half_width"])
    return f"{mark}{row['best_rate']:.3g}" + (f" ({2 ** row['log2_half_width']:.2f})" if has_error else "")


main = cli.command(LrTransferOptions, measure_rate_transfer, __doc__)

if __name__ == "__main__":
    main()
