"""Plot what adapters of several ranks add to a model, against the rank, from sims.coordinate_check."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from figures import style
from figures.sweep import model_name
from rora_theory import plots
from rora_theory.runs import frames

SHORT = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
SPLITS = {"train": "training batch", "held_out": "held-out batch"}


@dataclass(frozen=True)
class CoordinateCheckOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.coordinate_check."""
    out: Path | None = None
    """Folder for the figures; by default the run folder."""


def draw_coordinate_check(config: CoordinateCheckOptions) -> Sequence[Path]:
    """Draw coordinate_check (sizes against the rank) and coordinate_check_slopes (slopes against the step)."""
    manifest = style.read_run_manifest(config.run, "coordinate_check")
    slopes = frames.read_csv(config.run / "slopes.csv", accepted="the file of a finished run")
    folder = config.out or config.run
    _, rows = style.read_frame(config.run)
    return [
        *style.save(draw_size_panels(manifest, rows), folder, "coordinate_check"),
        *style.save(draw_slope_panels(manifest, slopes), folder, "coordinate_check_slopes"),
    ]


CASE = ["optimizer", "rule", "init", "control"]


def case_title(case: Sequence[Any]) -> str:
    """Return the panel title of a case: optimizer, rule, initialisation and control."""
    optimizer, rule, init, control = case
    text = f"{style.OPTIMIZERS[optimizer]}, {style.look(rule)[0].removeprefix('LoRA, ').removeprefix('RoRA, ')}"
    text += "" if init == "kaiming_uniform" else f", A {style.INITS.get(init, init)}"
    return text + ("\n(control)" if control else "")


def panel_title(case: Sequence[Any], split: str, *, is_first: bool) -> str:
    """Return the title of a panel: its case, below the name of the column in the first row."""
    return f"{split}\n{case_title(case)}" if is_first else case_title(case)


def draw_size_panels(manifest: dict[str, Any], rows: pd.DataFrame) -> plt.Figure:
    """Draw the output of each module against the rank, at the first and last step: rows are cases, columns splits."""
    # Values of diverged runs are not finite, and would stretch the axis.
    rows = rows.assign(value=rows["value"].where(np.isfinite(rows["value"])))
    cases = dict(list(rows.groupby(CASE, sort=False)))
    modules = [module for module in SHORT if module in set(rows["module"])]
    steps = sorted(set(rows["step"]))
    shown = dict.fromkeys((steps[0], steps[-1]))
    figure, axes = plt.subplots(
        len(cases), len(SPLITS), figsize=(style.WIDTH, 0.8 + 1.6 * len(cases)), sharex=True, sharey=True, squeeze=False
    )
    # A row of panels for each case, a column for each split, a line for each module and drawn step (`shown`).
    for axis_row, (case, rows_of_case) in zip(axes, cases.items(), strict=True):
        for axis, (split, label) in zip(axis_row, SPLITS.items(), strict=True):
            selected = rows_of_case[(rows_of_case["split"] == split) & (rows_of_case["quantity"] == "output")]
            for position, module in enumerate(modules):
                colour, marker = style.COLOURS[position], style.MARKERS[position]
                for step in shown:
                    plots.draw_sizes(
                        axis,
                        selected[(selected["module"] == module) & (selected["step"] == step)],
                        colour=colour,
                        marker=marker,
                        is_first=step == steps[0],
                        label=SHORT[module] if step == steps[0] else None,
                    )
            style.integer_ticks(axis, rows["rank"], max_count=5)
            axis.set_yscale("log")
            axis.set_title(panel_title(case, label, is_first=axis.get_subplotspec().is_first_row()))
        axis_row[0].set_ylabel("rms of output")
    for axis in axes[-1]:
        axis.set_xlabel("rank $r$")
    style.legend(
        figure,
        style.named(axes.flat) | plots.step_handles(steps),
        f"{model_name(manifest['config']['model'])}, {manifest['config']['batches']} batch; "
        f"output of the adapters: mean and standard error over {style.seeds_of(manifest)} seeds; "
        f"rules meet at r = {manifest['config']['reference_rank']}",
    )
    return figure


def draw_slope_panels(manifest: dict[str, Any], slopes: pd.DataFrame) -> plt.Figure:
    """Draw slopes against the step: rows are cases, columns splits, lines modules; black lines are the whole model."""
    cases = dict(list(slopes.groupby(CASE, sort=False)))
    modules = [module for module in SHORT if module in set(slopes["module"])]
    lines = [("output", module, SHORT[module]) for module in modules]
    lines += [("hidden", "model", "final hidden state"), ("logits", "model", "logits")]
    # Slopes within the band count as flat.
    band = float(manifest["config"]["band"])
    figure, axes = plt.subplots(
        len(cases), len(SPLITS), figsize=(style.WIDTH, 0.8 + 1.6 * len(cases)), sharex=True, sharey=True, squeeze=False
    )
    # A row of panels for each case, a column for each split, a line for each module and for the whole model.
    for axis_row, (case, rows_of_case) in zip(axes, cases.items(), strict=True):
        for axis, (split, label) in zip(axis_row, SPLITS.items(), strict=True):
            selected = rows_of_case[(rows_of_case["split"] == split) & rows_of_case["slope"].notna()]
            axis.axhspan(-band, band, color=style.BAND_COLOUR, zorder=0)
            for position, (quantity, module, text) in enumerate(lines):
                points = selected[(selected["quantity"] == quantity) & (selected["module"] == module)]
                plots.draw_slopes(
                    axis,
                    points,
                    colour=style.COLOURS[position] if module != "model" else "black",
                    marker=style.MARKERS[position % len(style.MARKERS)],
                    is_open=quantity == "logits",
                    label=text,
                )
            style.integer_ticks(axis, slopes["step"], max_count=5)
            axis.set_title(panel_title(case, label, is_first=axis.get_subplotspec().is_first_row()))
        axis_row[0].set_ylabel("slope in $r$")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles = style.named(axes.flat) | {f"flat: within ±{band:g}": style.band_handle()}
    style.legend(
        figure,
        handles,
        f"{model_name(manifest['config']['model'])}, {manifest['config']['batches']} batch; "
        f"log-log slope ± half its 95% interval over {style.seeds_of(manifest)} seeds",
    )
    return figure


if __name__ == "__main__":
    style.command(draw_coordinate_check, CoordinateCheckOptions, __doc__)
