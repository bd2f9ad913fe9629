"""Simulate the variance of the first step against the rank, and test the exact law and the paper's Eq. 1-15.

The simulated quantity is w = dM x', the change of an adapted layer's output after one optimizer step, for every
optimizer, initialisation, overlap of the inputs, scaling rule and rank. It is compared with the exact law and with the
paper's Eq. 9, its log-log exponents are fitted, and Eq. 1-15 each get a verdict. One simulation serves all rules,
because w is proportional to gamma^2 (SGD) or gamma (Adam). On a part of the grid, the direct sampler checks this with a
separate step for each rule, from the same draws of A and the inputs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.laws.sampling import StreamMoments
from rora_theory.paper import simulation, verdicts
from rora_theory.paper.simulation import SimulationCell, SimulationConfig
from rora_theory.runs import devices
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from sims.common import answers, cli, tables
from sims.common.cells import run_with_bar
from sims.common.summaries import summarised

NAME = "variance_sweep"


@dataclass(frozen=True)
class VarianceSweepOptions:
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None
    devices: int | None = None
    """Number of devices, without effect beyond rounding; by default all accelerators, or one host device per core"""


def sweep_variance(config: VarianceSweepOptions) -> None:
    """Run the cells that the run folder lacks, then compare the equations with the samples and report."""
    simulation_config, runner = config.simulation, config.cluster.runner()
    chosen_devices = devices.pick(count := config.devices)  # before any other work of JAX, which would fix the devices
    extra = {"units": simulation.UNITS, "device": devices.describe_devices(chosen_devices)}
    identity, seed = flatten(simulation_config), simulation_config.seed
    folder = RunFolder.open(NAME, identity, out=config.out, seed=seed, extra=extra)
    cells = simulation.simulation_cells(simulation_config)

    def work(cell: SimulationCell, _: Path) -> dict[str, Any]:
        moments = simulation.draw_cell(simulation_config, cell, devices.pick(count))
        rows = simulation.simulation_rows(simulation_config, cell, moments)
        return {"rows": rows, "direct": bool(cell.steps), "sums": [cell_sums.to_json() for cell_sums in moments]}

    def write(values: list[Any]) -> None:
        for name, direct in (("results.csv", False), ("direct_check.csv", True)):
            folder.write_frame(frame_of(values, direct=direct), name)

    values = run_with_bar(cells, work, folder, runner=runner, title="variance sweep", write=write)
    # The verdicts use the sums of the grid's cells, not those of the direct check.
    sums_of_grid = {
        cell.setting: StreamMoments.from_json(value["sums"][0])
        for cell, value in zip(cells, values, strict=True)
        if not cell.steps
    }
    judged = simulation.judge_simulation(simulation_config, sums_of_grid, chosen_devices)
    folder.write("verdicts.json", json.dumps([vars(verdict) for verdict in judged], indent=2) + "\n")
    results, check = frame_of(values), frame_of(values, direct=True)
    # Key figures, and the report.
    slopes, scope = simulation.simulated_exponents(results), (*simulation.GROUP, "low", "high")
    exponents = key_figures(slopes, "exponent of the rms norm in the rank", "slope", over="draws", scope=scope)
    with summarised(folder, exponents):
        report(results, check, judged)
    folder.finish()
    answers.print_files(folder.path)
    tables.print_text(verdicts.describe_verdicts(judged))  # again, because the tables do not fit on a screen


def frame_of(values: list[Any], *, direct: bool = False) -> pd.DataFrame:
    """Return the table of the finished cells: those of the grid, or those of the direct check."""
    return simulation.simulation_table(row for value in values if value["direct"] == direct for row in value["rows"])


def report(results: pd.DataFrame, check: pd.DataFrame, judged: Sequence[verdicts.Verdict]) -> None:
    """Print how many equations hold, then the exponents, the verdicts and the result of the direct check."""
    answers.print_answer(verdicts.describe_verdicts(judged))
    # Exponents of the norm, in a table for each optimizer and init.
    slopes = simulation.simulated_exponents(results)
    for (optimizer, init), group in slopes.groupby(["optimizer", "init"], sort=False):
        ranges = group[["low", "high"]].drop_duplicates()
        tables.print_table(
            f"{optimizer}, A {init}: exponent of the rms norm |w| in the rank, fitted, with its standard error "
            "in brackets, and that of the exact law in the same fit",
            ["overlap", "rule", *(f"r = {low}..{high}" for low, high in ranges.itertuples(index=False))],
            [
                [f"{overlap:g}", rule, *map(tables.format_slope, line.to_dict("records"))]
                for (overlap, rule), line in group.groupby(["overlap", "rule"], sort=False)
            ],
            left=2,
        )
    tables.print_table(
        "Verdicts on the paper's equations",
        ["Eq.", "verdict", "claim; conditions; evidence"],
        verdicts.verdict_rows(judged),
        left=3,
    )
    if len(check):
        tables.print_text(
            f"The direct sampler draws A, differentiates, takes a step with optax and evaluates it at x', with "
            f"{simulation.CHECK_DRAWS} draws for each rank and overlap. Over the {len(check)} rows of "
            f"direct_check.csv, the largest |z| against the exact law is {simulation.largest_score(check):.2f}."
        )


main = cli.command(VarianceSweepOptions, sweep_variance, __doc__)

if __name__ == "__main__":
    main()
