"""The sweep on real layers (``sims.variance_sweep --layer-data``): data fixed, adapters drawn."""

from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.io import digests
from rora_theory.measure.layers import layer_data, layer_grid
from rora_theory.runs.devices import describe, pick
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flat
from rora_theory.runs.summary import key_figures
from rora_theory.theory.grid import StepGrid
from rora_theory.validation.rules import USUAL_RANKS
from sims.common import answers, tables
from sims.common.cells import Runner, in_process, run_table
from sims.common.summaries import summarised

NAME = "variance_sweep_layers"


def run(path: Path, grid: StepGrid, *, out: Path | None = None, runner: Runner = in_process) -> None:
    """Run the sweep on the layers of an .npz, or go on with it."""
    layers = layer_data.read_layers(path)
    identity = {"layer_data": digests.of_file(path)} | flat(grid)
    extra = {"units": layer_grid.UNITS, "device": describe(pick(1)), "layer_data": path.name}
    folder = RunFolder.open(NAME, identity, out=out, seed=grid.seed, extra=extra)
    cells, crossings = layer_grid.layer_cells(grid, layers), layer_grid.crossings(grid, layers)
    folder.write_frame(crossings, layer_grid.CROSSINGS)

    def work(cell: layer_grid.LayerCell, _: Path) -> list[dict[str, Any]]:
        return layer_grid.layer_rows(grid, layers, cell)

    results = run_table(cells, work, folder, layer_grid.COLUMNS, runner=runner, title="real layers")
    quartiles, scope = ("lower_quartile", "upper_quartile"), ("layer", "split", "optimizer")
    ranks = key_figures(crossings, "crossing rank", "crossing_rank", None, over="tokens", bounds=quartiles, scope=scope)
    with summarised(folder, ranks):
        report(results, crossings)
    folder.finish()
    answers.tell_files(folder.path)


def report(results: pd.DataFrame, crossings: pd.DataFrame) -> None:
    """Print how far measurement and law agree, and the exponents by layer."""
    answers.say(layer_grid.describe_agreement(results))
    slopes = layer_grid.layer_exponents(results, low=USUAL_RANKS[0], high=USUAL_RANKS[1])
    quartiles = "{crossing_rank:.1f} ({lower_quartile:.1f}-{upper_quartile:.1f})".format_map
    where = crossings.set_index(["layer", "split", "optimizer"])
    for split, optimizer in crossings[["split", "optimizer"]].drop_duplicates().itertuples(index=False):
        own = slopes[(slopes["split"] == split) & (slopes["optimizer"] == optimizer)]
        for init, group in own.groupby("init", sort=False):
            lines = []
            for layer, fits in group.groupby("layer", sort=False):
                at = quartiles(where.T[layer, split, optimizer])
                lines.append([layer.removeprefix("model.layers."), at, *map(tables.slope, fits.to_dict("records"))])
            tables.print_table(
                f"{optimizer}, A {init}, {split} tokens: r* (quartiles over tokens), and the exponent of the rms of w "
                f"in the rank, r = {group['low'].iloc[0]}..{group['high'].iloc[0]}, under each rule: measured ± s.e. "
                "(law)",
                ["layer", "r*", *dict.fromkeys(group["rule"])],
                lines,
            )
