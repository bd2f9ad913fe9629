"""Compare the law of the first step with measurements on real layers: fixed gradients and inputs, random adapters.

    python -m sims.layer_sweep --layers FILE.npz

For every layer in the file, adapters are drawn at each rank, and their first step is measured at the training and at
the held-out tokens. The result is compared with the exact law, and its slope against the rank is fitted. The file
contains `NAME/grad` (the gradient of the full weight, [p_out, p_in]), `NAME/x_train` and `NAME/x_heldout` (the inputs
at the tokens of each batch, [tokens, p_in]) for each layer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.laws.grid import StepGrid
from rora_theory.laws.layers import layer_data, layer_grid
from rora_theory.runs import digests
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.devices import describe_devices, pick
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from rora_theory.validation.rules import USUAL_RANKS
from sims.common import answers, cli, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "layer_sweep"


@dataclass(frozen=True)
class LayerSweepOptions:
    layers: Path
    """.npz file of the layers' gradients and inputs"""
    grid: StepGrid = field(default_factory=StepGrid)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None


def sweep_layers(config: LayerSweepOptions) -> None:
    """Run the cells that the run folder lacks, then report on all cells."""
    grid, runner = config.grid, config.cluster.runner()
    # The identity contains the digest of the data, not the path.
    layers = layer_data.read_layers(config.layers)
    identity = {"layers": digests.of_file(config.layers)} | flatten(grid)
    extra = {"units": layer_grid.UNITS, "device": describe_devices(pick(1)), "file": config.layers.name}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=grid.seed, extra=extra)
    # The law alone gives the crossing ranks; the cells draw adapters to test it.
    cells, crossings = layer_grid.layer_cells(grid, layers), layer_grid.crossings(grid, layers)
    folder.write_frame(crossings, layer_grid.CROSSINGS)

    def work(cell: layer_grid.LayerCell, _: Path) -> list[dict[str, Any]]:
        return layer_grid.layer_rows(grid, layers, cell)

    results = run_table(cells, work, folder, layer_grid.COLUMNS, runner=runner, title="real layers")
    bounds, scope = ("lower_quartile", "upper_quartile"), ("layer", "split", "optimizer")
    ranks = key_figures(crossings, "crossing rank", "crossing_rank", None, over="tokens", bounds=bounds, scope=scope)
    with summarised(folder, ranks):
        report(results, crossings)
    folder.finish()
    answers.print_files(folder.path)


def report(results: pd.DataFrame, crossings: pd.DataFrame) -> None:
    """Print the agreement between measurement and law, and the slopes of each layer."""
    answers.print_answer(layer_grid.describe_agreement(results))
    slopes = layer_grid.layer_exponents(results, low=USUAL_RANKS[0], high=USUAL_RANKS[1])
    # One table for each split, optimizer and init, with a line for each layer.
    format_quartiles = "{crossing_rank:.1f} ({lower_quartile:.1f}-{upper_quartile:.1f})".format_map
    crossings_by_layer = crossings.set_index(["layer", "split", "optimizer"])
    for split, optimizer in crossings[["split", "optimizer"]].drop_duplicates().itertuples(index=False):
        slopes_of_split = slopes[(slopes["split"] == split) & (slopes["optimizer"] == optimizer)]
        for init, group in slopes_of_split.groupby("init", sort=False):
            # A line has the layer's crossing rank, and the slope of each rule with that of the law.
            rows = []
            for layer, fits in group.groupby("layer", sort=False):
                crossing = format_quartiles(crossings_by_layer.T[layer, split, optimizer])
                rows.append(
                    [layer.removeprefix("model.layers."), crossing, *map(tables.format_slope, fits.to_dict("records"))]
                )
            tables.print_table(
                f"{optimizer}, A {init}, {split} tokens: crossing rank r* (quartiles over tokens), and slope of the "
                f"rms of w against the rank, r = {group['low'].iloc[0]}..{group['high'].iloc[0]}, for each rule: "
                "measured ± standard error (law)",
                ["layer", "r*", *dict.fromkeys(group["rule"])],
                rows,
            )


main = cli.command(LayerSweepOptions, sweep_layers, __doc__)

if __name__ == "__main__":
    main()
