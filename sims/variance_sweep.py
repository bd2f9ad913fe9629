"""First-step variance against rank and scaling: simulated, exact and printed, and a verdict on every equation.

Simulates w = dM x', the increment of an adapted layer after one optimizer step, for every optimizer, init, overlap of
the inputs, scaling rule and rank; compares with the exact law and with the paper's Eq. 9; fits log-log exponents;
judges Eq. 1-15. One simulation serves all rules: w carries gamma^2 (SGD) or gamma (Adam) as a factor. The direct
sampler checks this on part of the grid, where it takes each rule's own step from the same draws of A and the inputs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.cluster import ClusterConfig
from rora_theory.errors import InputError
from rora_theory.paper import simulation, verdicts
from rora_theory.paper.simulation import SimulationCell, SimulationConfig
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flat
from rora_theory.runs.summary import key_figures
from rora_theory.theory.sampling import Sums
from rora_theory.validation.rules import check_unread
from sims.common import answers, cli, layer_sweep, tables
from sims.common.cells import run_with_bar
from sims.common.summaries import summarised

NAME = "variance_sweep"


@dataclass(frozen=True)
class Config:
    """What to sweep. Lists are separated by spaces."""

    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None
    devices: int | None = None
    """devices to use; by default all accelerators, or one host device a core. Does not change the results"""
    layer_data: Path | None = None
    """an .npz of real layers' gradients and inputs: sweep these with the data held fixed instead of random inputs"""

    def __post_init__(self) -> None:
        if self.layer_data is not None and self.simulation.sampler == "reduced":
            raise InputError("--sampler reduced has no fixed data; accepted with --layer-data are direct and auto")
        if self.layer_data is not None:
            check_unread(self, "devices", conflicts_with="--layer-data")
            check_unread(self.simulation, "p_in", "p_out", "overlaps", conflicts_with="--layer-data")


def run(config: Config) -> None:
    """Run the sweep that ``config`` describes, or go on with it."""
    simulated, runner = config.simulation, config.cluster.runner()
    if config.layer_data is not None:
        layer_sweep.run(config.layer_data, simulated.grid, out=config.out, runner=runner)
        return
    places = devices.pick(count := config.devices)
    extra = {"units": simulation.UNITS, "device": devices.describe(places)}
    folder = RunFolder.open(NAME, flat(simulated), out=config.out, seed=simulated.grid.seed, extra=extra)
    cells = simulation.simulation_cells(simulated)

    def work(cell: SimulationCell, _: Path) -> dict[str, Any]:
        sums = simulation.draw_cell(simulated, cell, devices.pick(count))
        rows = simulation.simulation_rows(simulated, cell, sums)
        return {"rows": rows, "direct": bool(cell.steps), "sums": [one.to_json() for one in sums]}

    def write(values: list[Any]) -> None:
        for name, direct in (("results.csv", False), ("direct_check.csv", True)):
            folder.write_frame(frame_of(values, direct=direct), name)

    values = run_with_bar(cells, work, folder, runner=runner, title="variance sweep", write=write)
    drawn = ((cell, one["sums"][0]) for cell, one in zip(cells, values, strict=True) if not cell.steps)
    known = {cell.setting: Sums.from_json(sums) for cell, sums in drawn}
    judged = simulation.judge_simulation(simulated, known, places)
    folder.write("verdicts.json", json.dumps([vars(verdict) for verdict in judged], indent=2) + "\n")
    results, check = frame_of(values), frame_of(values, direct=True)
    folder.write_frame(simulation.second_moments(results), "second_moments.csv")
    slopes, scope = simulation.simulated_exponents(results), (*simulation.GROUP, "low", "high")
    exponents = key_figures(slopes, "exponent of the rms norm in the rank", "slope", over="draws", scope=scope)
    with summarised(folder, exponents):
        report(results, check, judged)
    folder.finish()
    answers.tell_files(folder.path)
    tables.print_text(verdicts.verdicts_in_words(judged))  # again, below more lines than a screen has


def frame_of(values: list[Any], *, direct: bool = False) -> pd.DataFrame:
    """The table of finished cells: those of the grid, or of the direct check."""
    return simulation.simulation_table(row for one in values if one["direct"] == direct for row in one["rows"])


def report(results: pd.DataFrame, check: pd.DataFrame, judged: Sequence[verdicts.Verdict]) -> None:
    """Print how many equations hold, then the exponents, the verdicts and what the direct sampler says of the law."""
    answers.say(verdicts.verdicts_in_words(judged))
    slopes = simulation.simulated_exponents(results)
    for (optimizer, init), group in slopes.groupby(["optimizer", "init"], sort=False):
        ranges = group[["low", "high"]].drop_duplicates()
        tables.print_table(
            f"{optimizer}, A {init}: exponent of the rms norm |w| in the rank, fitted ± s.e. (exact law, same fit)",
            ["overlap", "rule", *(f"r = {low}..{high}" for low, high in ranges.itertuples(index=False))],
            [
                [f"{overlap:g}", rule, *map(tables.slope, line.to_dict("records"))]
                for (overlap, rule), line in group.groupby(["overlap", "rule"], sort=False)
            ],
            left=2,
        )
    tables.print_table(
        "Verdicts on the paper's equations",
        ["Eq.", "verdict", "claim; where it holds; figures"],
        verdicts.verdict_rows(judged),
        left=3,
    )
    if len(check):
        score = simulation.second_moments(check)["z"].abs().max(skipna=False)
        tables.print_text(
            f"The direct sampler draws A, differentiates, steps with optax and reads at x': {simulation.CHECK_DRAWS} "
            f"draws for each rank and overlap, {len(check)} rows in direct_check.csv, largest |z| against the exact "
            f"law {score:.2f}."
        )


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
