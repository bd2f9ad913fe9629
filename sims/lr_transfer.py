"""The learning rate that trains best, against the rank, for each scaling rule.

    python -m sims.lr_transfer
    python -m sims.lr_transfer --matrix FOLDER

The first is a teacher and student over a full grid of rates, ranks, rules and optimizers, the second the same of a real
model's runs, from sims.rank_sweep. A rule transfers where the best rate does not move with the rank. At the largest
rank the best losses of two rules are compared, each at its own best rate: a difference that is left is more than a
shift of the rate.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from rora_theory.cluster import ClusterConfig
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.summary import key_figures
from rora_theory.stats.rate_curves import (
    COLUMNS,
    UNITS,
    Comparison,
    best_rates,
    compare_rules,
    describe_slopes,
    rate_slopes,
)
from rora_theory.sweep import run_curves, trained_runs
from rora_theory.toy import rate_grid
from rora_theory.toy.rate_grid import RateGrid
from rora_theory.validation.rules import check_unread
from sims.common import answers, cli, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "lr_transfer"


@dataclass(frozen=True)
class Config:
    """What to train. Lists are separated by spaces."""

    grid: RateGrid = field(default_factory=RateGrid)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    judge: rate_grid.JudgedLoss = "held_out"
    """which loss decides"""
    matrix: Path | None = None
    """a folder of sims.rank_sweep: analyse its runs and train nothing"""
    matrix_model: str | None = None
    """which of its models, where it has several"""
    matrix_loss: trained_runs.Loss = "validation"
    """its held-out loss on all tokens (validation), or on the answers alone (answer)"""
    out: cli.Out = None

    def __post_init__(self) -> None:
        if self.matrix is None:
            check_unread(self, "matrix_model", "matrix_loss", requires="--matrix")
        else:
            check_unread(self, "grid", "cluster", "judge", conflicts_with="--matrix")


def run(config: Config) -> None:
    """Train or read, find the best rates, compare, print."""
    if config.matrix is not None:
        runs = trained_runs.read_runs(config.matrix, model=config.matrix_model, loss=config.matrix_loss)
        curves = run_curves.curves_of_runs(runs)
        identity = {"matrix": trained_runs.runs_digest(runs), "loss": config.matrix_loss, "model": config.matrix_model}
        folder = RunFolder.open(NAME, identity, out=config.out, extra={"units": UNITS, "source": config.matrix.name})
        folder.write_frame(run_curves.rate_loss_table(runs))
        compared = run_curves.compare_by_records(curves, runs)
    else:
        runner = config.cluster.runner()
        grid, extra = config.grid, {"units": UNITS, "device": devices.describe(devices.pick(1)), "judge": config.judge}
        folder = RunFolder.open(NAME, asdict(grid), out=config.out, seed=grid.seed, extra=extra)
        cells = list(rate_grid.rate_cells(grid))
        work = lambda cell, _: rate_grid.cell_rows(grid, cell)  # noqa: E731
        losses = run_table(cells, work, folder, COLUMNS, runner=runner, title="rates")
        curves = rate_grid.curves_of_losses(losses, config.judge)
        compared = compare_rules(curves)
    found, slopes = best_rates(curves), rate_slopes(curves)
    folder.write_frame(found, "best.csv")
    folder.write_frame(slopes, "slopes.csv")
    folder.write("comparison.json", json.dumps([one._asdict() for one in compared], indent=2) + "\n")
    samples, scope = found["error_over"].iloc[0], ("optimizer", "trained", "rule", "ranks", "verdict")
    with summarised(folder, key_figures(slopes, "slope of the best rate", "slope", over=samples, scope=scope)):
        report(found, slopes, compared)
    folder.finish()
    answers.tell_files(folder.path)


def report(found: pd.DataFrame, slopes: pd.DataFrame, compared: Sequence[Comparison]) -> None:
    """Print where the best rate keeps still; best rates, slopes and comparisons."""
    answers.say(describe_slopes(slopes))
    ranks, line = sorted(set(found["rank"])), ["optimizer", "trained", "rule"]
    cells = found.assign(text=found.apply(run_curves.format_best, axis=1))
    cells = cells.pivot(index=line, columns="rank", values="text").fillna("")
    tables.print_table(
        "Best learning rate (parabola through the least three), × / ÷ half of the 95% interval; < > at the grid's edge",
        [*line, *[f"r = {rank}" for rank in ranks]],
        [[*key, *cells.loc[key]] for key in found[line].drop_duplicates().itertuples(index=False, name=None)],
        left=3,
    )
    half = slopes["half_width"].astype(float).map("{:.2g}".format)
    words = slopes.assign(word=slopes["verdict"].replace("flat", "transfers"), half=half)
    tables.print_records(
        "Slope in the rank of those best rates, ± half of the 95% interval, beside what would keep the step's size",
        words.fillna({"nearest": ""}),
        {name: f"{{{name}}}" for name in line}
        | {"slope": "{slope:+.3f} ± {half}", "verdict": "{word}"}
        | {name: f"{{{name}:+.2f}}" for name in ("signal", "cross-talk", "A moves")}
        | {"nearest": "{nearest}"},
        left=3,
    )
    tables.print_records(
        "The largest rank, each rule at its own best rate; ± half of the 95% interval and what the grid may hide",
        [one._asdict() for one in compared],
        {
            "rules": "{first}, {second}",
            "trained": "{optimizer}, {trained}",
            "verdict": "{verdict}",
            "rank": "{rank}",
            "rates' ratio": "{ratio:.3g}",
            "losses": "{first_loss:.4g}, {second_loss:.4g}",
        },
        left=3,
    )


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
