"""Plot exponents against the step, and output changes against the rank, from sims.training_dynamics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from figures import style
from rora_theory.runs import frames

QUANTITIES = {
    "output_train": "output change,\ntraining inputs",
    "output_held_out": "output change,\nheld-out inputs",
    "delta_frobenius": r"$\|\Delta M\|_F$",
}
BAND = 0.1
"""Largest absolute slope that counts as flat."""


@dataclass(frozen=True)
class TrainingDynamicsOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.training_dynamics."""
    model: Literal["linear", "mlp"] = "linear"
    """Problem: a linear layer or a small MLP."""
    out: Path | None = None
    """Folder for the figures; by default the run folder."""


def draw_training_dynamics(config: TrainingDynamicsOptions) -> Sequence[Path]:
    """Draw training_dynamics_MODEL_exponents and training_dynamics_MODEL_rms."""
    manifest, rows = style.read_frame(config.run, "training_dynamics")
    chosen = rows[rows["model"] == config.model]
    if chosen.empty:
        style.fail(f"{config.run}: has no {config.model}. Choose another --model.")
    fits = frames.read_csv(config.run / "exponents.csv", accepted="the file of a finished run")
    # Fits over all ranks of the chosen model; at step 0 nothing has changed.
    fits = fits[(fits[["model", "range"]] == [config.model, "all"]).all(axis=1) & (fits["step"] > 0)]
    name = f"training_dynamics_{config.model}"
    folder = config.out or config.run
    return [
        *style.save(draw_slope_panels(manifest, fits), folder, f"{name}_exponents"),
        *style.save(draw_size_panels(manifest, chosen), folder, f"{name}_rms"),
    ]


def draw_slope_panels(manifest: dict[str, Any], fits: pd.DataFrame) -> plt.Figure:
    """Draw slopes in the rank against the step: rows are optimizers, columns quantities, colours rules."""
    optimizers = [name for name in style.OPTIMIZERS if name in set(fits["optimizer"])]
    rules = list(dict.fromkeys(fits["rule"]))
    figure, axes = plt.subplots(
        len(optimizers),
        len(QUANTITIES),
        figsize=(style.WIDTH, 0.8 + 1.55 * len(optimizers)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    # A row of panels for each optimizer, a column for each quantity, a line for each rule.
    for axis_row, optimizer in zip(axes, optimizers, strict=True):
        for axis, (quantity, title) in zip(axis_row, QUANTITIES.items(), strict=True):
            axis.axhspan(-BAND, BAND, color=style.BAND_COLOUR, zorder=0)
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                for trained, dashes, face in (("both", "-", colour), ("frozen", (0, (3, 2)), "white")):
                    # Filled markers: both factors are trained; open ones: only one is.
                    selected = (fits[["optimizer", "quantity", "rule"]] == [optimizer, quantity, rule]).all(axis=1)
                    points = fits[selected & ((fits["trained"] == "both") == (trained == "both"))]
                    axis.errorbar(
                        points["step"],
                        points["slope"],
                        yerr=points["standard_error"],
                        color=colour,
                        marker=marker,
                        markerfacecolor=face,
                        linestyle=dashes,
                        label=label if trained == "both" else None,
                    )
            style.integer_ticks(axis, fits["step"], max_count=4)
            if optimizer == optimizers[0]:
                axis.set_title(title)
            if optimizer == optimizers[-1]:
                axis.set_xlabel("step")
        axis_row[0].set_ylabel(f"{style.OPTIMIZERS[optimizer]}\nslope in $r$")
    # Legend entries for line styles, which all rules share.
    handles = style.named(axes.flat)
    frozen = next(iter(set(fits["trained"]) - {"both"}), None)
    if frozen is not None:
        handles[f"only ${frozen}$ trained"] = plt.Line2D(
            [], [], color="black", linestyle=(0, (3, 2)), marker="o", markerfacecolor="white"
        )
    handles[f"flat: within ±{BAND:g}"] = style.band_handle()
    ranks = f"{fits['lowest_rank'].min()} to {fits['highest_rank'].max()}"
    style.legend(
        figure,
        handles,
        f"log-log slope over ranks {ranks}; bars: one standard error over {style.seeds_of(manifest)} seeds",
    )
    return figure


def draw_size_panels(manifest: dict[str, Any], rows: pd.DataFrame) -> plt.Figure:
    """Draw the output change against the rank: rows are optimizers, columns steps, colours rules."""
    optimizers = [name for name in style.OPTIMIZERS if name in set(rows["optimizer"])]
    rules = list(dict.fromkeys(rows["rule"]))
    # First, middle and last step.
    steps = sorted(set(rows["step"]) - {0})
    steps = list(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])))
    figure, axes = plt.subplots(
        len(optimizers),
        len(steps),
        figsize=(0.4 + 1.4 * len(steps), 0.8 + 1.55 * len(optimizers)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    # A row of panels for each optimizer, a column for each step, a line for each rule and kind of inputs.
    for axis_row, optimizer in zip(axes, optimizers, strict=True):
        for axis, step in zip(axis_row, steps, strict=True):
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                for quantity, dashes, face in (
                    ("output_train", "-", colour),
                    ("output_held_out", (0, (1, 1.5)), "white"),
                ):
                    selected = (rows[["optimizer", "rule", "trained", "step"]] == [optimizer, rule, "both", step]).all(
                        axis=1
                    )
                    points = rows[selected & rows[quantity].notna()].sort_values("rank")
                    axis.errorbar(
                        points["rank"],
                        points[quantity],
                        yerr=points[f"{quantity}_se"].fillna(0),
                        color=colour,
                        marker=marker,
                        markerfacecolor=face,
                        linestyle=dashes,
                        label=label if quantity == "output_train" else None,
                    )
            style.integer_ticks(axis, rows["rank"], max_count=4)
            axis.set_yscale("log")
            if optimizer == optimizers[0]:
                axis.set_title(f"step {step}")
            if optimizer == optimizers[-1]:
                axis.set_xlabel("rank $r$")
        axis_row[0].set_ylabel(f"{style.OPTIMIZERS[optimizer]}\nrms of output change")
    meeting = rows.groupby("rank")["scaling"].nunique().idxmin()
    # Legend entry for the line style of held-out inputs, which all rules share.
    handles = style.named(axes.flat)
    handles["held-out inputs"] = plt.Line2D(
        [], [], color="black", linestyle=(0, (1, 1.5)), marker="o", markerfacecolor="white"
    )
    style.legend(
        figure,
        handles,
        f"mean and standard error over {style.seeds_of(manifest)} seeds; rules meet at r = {meeting}; the "
        "target's rms is about 1",
    )
    return figure


if __name__ == "__main__":
    style.command(draw_training_dynamics, TrainingDynamicsOptions, __doc__)
