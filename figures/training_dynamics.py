"""Exponents against the step, and the quantities against the rank, from a run of sims.training_dynamics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import tyro

from figures import style

QUANTITIES = {
    "output_train": "output change,\ntraining inputs",
    "output_held_out": "output change,\nheld-out inputs",
    "delta_frobenius": r"$\|\Delta M\|_F$",
}
BAND = 0.1
"""Slopes shown as flat."""


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.training_dynamics."""
    model: Literal["linear", "mlp"] = "linear"
    """Which problem."""
    start: Literal["A", "B"] = "A"
    """Which factor starts random."""
    out: Path | None = None
    """Folder for the figures; by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """Two figures, training_dynamics_MODEL_START_exponents and _rms."""
    manifest, rows = style.read_run(config.run, "training_dynamics")
    chosen = [row for row in rows if (row["model"], row["start"]) == (config.model, config.start)]
    if not chosen:
        style.fail(f"{config.run}: has no {config.model} with {config.start} random at the start")
    fits = style.read_table(config.run / "exponents.csv", needed=True)
    fits = [row for row in fits if (row["model"], row["start"], row["range"]) == (config.model, config.start, "all")]
    name = f"training_dynamics_{config.model}_{config.start}"
    folder = config.out or config.run
    return [
        *style.save(exponents(manifest, fits), folder, f"{name}_exponents"),
        *style.save(sizes(manifest, chosen), folder, f"{name}_rms"),
    ]


def exponents(manifest: dict[str, Any], fits: list[dict[str, str]]) -> plt.Figure:
    """Slope in the rank against the step: a row an optimizer, a column a quantity, a colour a rule."""
    optimizers = [name for name in style.OPTIMIZERS if any(row["optimizer"] == name for row in fits)]
    rules = list(dict.fromkeys(row["rule"] for row in fits))
    figure, axes = plt.subplots(
        len(optimizers),
        len(QUANTITIES),
        figsize=(6.4, 0.8 + 1.45 * len(optimizers)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis_row, optimizer in zip(axes, optimizers, strict=True):
        for axis, (quantity, title) in zip(axis_row, QUANTITIES.items(), strict=True):
            axis.axhspan(-BAND, BAND, color=style.BAND_COLOUR, zorder=0)
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                for trained, dashes, face in (("both", "-", colour), ("frozen", (0, (3, 2)), "white")):
                    points = [
                        row
                        for row in fits
                        if (row["optimizer"], row["quantity"], row["rule"]) == (optimizer, quantity, rule)
                        and (row["trained"] == "both") == (trained == "both")
                        and int(row["step"]) > 0
                    ]
                    axis.errorbar(
                        [int(row["step"]) for row in points],
                        [float(row["slope"]) for row in points],
                        yerr=[float(row["standard_error"]) for row in points],
                        color=colour,
                        marker=marker,
                        markerfacecolor=face,
                        linestyle=dashes,
                        label=label if trained == "both" else None,
                    )
            style.whole_ticks(axis, (int(row["step"]) for row in fits if int(row["step"]) > 0))
            if optimizer == optimizers[0]:
                axis.set_title(title)
            if optimizer == optimizers[-1]:
                axis.set_xlabel("step")
        axis_row[0].set_ylabel(f"{style.OPTIMIZERS[optimizer]}\nslope in $r$")
    handles = style.named(axes.flat)
    frozen = next((row["trained"] for row in fits if row["trained"] != "both"), None)
    if frozen is not None:
        handles[f"only ${frozen}$ trained"] = plt.Line2D(
            [], [], color="black", linestyle=(0, (3, 2)), marker="o", markerfacecolor="white"
        )
    handles[f"flat: within ±{BAND:g}"] = style.band_handle()
    style.legend(figure, handles, f"log-log slope over ranks ± s.e. over {manifest['config']['seeds']} seeds")
    return figure


def sizes(manifest: dict[str, Any], rows: list[dict[str, str]]) -> plt.Figure:
    """Output change on training inputs against the rank: a row an optimizer, a column a step, a colour a rule."""
    optimizers = [name for name in style.OPTIMIZERS if any(row["optimizer"] == name for row in rows)]
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    steps = sorted({int(row["step"]) for row in rows} - {0})
    steps = list(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])))
    figure, axes = plt.subplots(
        len(optimizers),
        len(steps),
        figsize=(1.2 + 1.9 * len(steps), 0.8 + 1.45 * len(optimizers)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis_row, optimizer in zip(axes, optimizers, strict=True):
        for axis, step in zip(axis_row, steps, strict=True):
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                for quantity, dashes, face in (
                    ("output_train", "-", colour),
                    ("output_held_out", (0, (1, 1.5)), "white"),
                ):
                    points = sorted(
                        (
                            row
                            for row in rows
                            if (row["optimizer"], row["rule"], row["trained"]) == (optimizer, rule, "both")
                            and int(row["step"]) == step
                            and row[quantity]
                        ),
                        key=lambda row: int(row["rank"]),
                    )
                    axis.errorbar(
                        [int(row["rank"]) for row in points],
                        [float(row[quantity]) for row in points],
                        yerr=[float(row[f"{quantity}_se"] or 0) for row in points],
                        color=colour,
                        marker=marker,
                        markerfacecolor=face,
                        linestyle=dashes,
                        label=label if quantity == "output_train" else None,
                    )
            style.whole_ticks(axis, (int(row["rank"]) for row in rows))
            axis.set_yscale("log")
            if optimizer == optimizers[0]:
                axis.set_title(f"step {step}")
            if optimizer == optimizers[-1]:
                axis.set_xlabel("rank $r$")
        axis_row[0].set_ylabel(f"{style.OPTIMIZERS[optimizer]}\nrms of output change")
    handles = style.named(axes.flat)
    handles["held-out inputs"] = plt.Line2D(
        [], [], color="black", linestyle=(0, (1, 1.5)), marker="o", markerfacecolor="white"
    )
    style.legend(
        figure,
        handles,
        f"mean ± s.e. over {manifest['config']['seeds']} seeds; rules meet at r = "
        f"{manifest['config']['reference_rank']}; the target's rms is about 1",
    )
    return figure


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
