"""|dw| against the rank, log-log, from a run of sims.variance_sweep: one column an overlap, one row an optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from figures import style


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.variance_sweep."""
    out: Path | None = None
    """Folder for norm_vs_rank.png and .svg; by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """Points are simulated (with standard errors), lines exact, dashes the paper's Eq. 11."""
    manifest, rows = style.read_run(config.run, "variance_sweep")
    rows = [row for row in rows if row["quantity"] == "norm"]
    overlaps = list(dict.fromkeys(row["overlap"] for row in rows))
    panels = list(dict.fromkeys((row["optimizer"], row["init"]) for row in rows))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    figure, axes = plt.subplots(
        len(panels),
        len(overlaps),
        figsize=(max(3.0, 1.4 + 1.6 * len(overlaps)), 0.5 + 2.0 * len(panels)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for axis_row, (optimizer, init) in zip(axes, panels, strict=True):
        for axis, overlap in zip(axis_row, overlaps, strict=True):
            for position, rule in enumerate(rules):
                chosen = [
                    row
                    for row in rows
                    if (row["optimizer"], row["init"], row["overlap"], row["rule"]) == (optimizer, init, overlap, rule)
                ]
                chosen.sort(key=lambda row: int(row["rank"]))
                ranks = [int(row["rank"]) for row in chosen]
                label, colour, marker = style.look(rule, position)
                axis.plot(ranks, [float(row["exact"]) for row in chosen], color=colour)
                if all(row["paper"] for row in chosen):
                    axis.plot(
                        ranks,
                        [float(row["paper"]) for row in chosen],
                        color=colour,
                        linestyle=(0, (4, 3)),
                        linewidth=0.9,
                    )
                axis.errorbar(
                    ranks,
                    [float(row["estimate"]) for row in chosen],
                    yerr=[float(row["standard_error"]) for row in chosen],
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    label=label,
                )
            axis.set(yscale="log", title=f"{style.OPTIMIZERS[optimizer]}, overlap {float(overlap):g}")
            style.whole_ticks(axis, (int(row["rank"]) for row in rows))
        named = f", A {init}" if len({init for _, init in panels}) > 1 else ""
        axis_row[0].set_ylabel(rf"rms of $\|w\|_2$ (output units){named}")
    for axis in axes[-1]:
        axis.set_xlabel("rank $r$")
    handles = style.named(axes.flat) | {"exact law": plt.Line2D([], [], color="black")}
    if any(row["paper"] for row in rows):
        handles["paper, Eq. 11 (SGD)"] = plt.Line2D([], [], color="black", linestyle=(0, (4, 3)), linewidth=0.9)
    config_of = manifest["config"]
    rate = config_of["lr"] if "lr" in config_of else config_of["learning_rate"]  # its name in earlier runs
    style.legend(
        figure,
        handles,
        rf"points: simulated ± s.e.; $p_{{in}}$ = {config_of['p_in']}, $p_{{out}}$ = {config_of['p_out']}, "
        rf"$\alpha$ = {config_of['alpha']:g}, $\eta$ = {rate:g}",
    )
    return style.save(figure, config.out or config.run, "norm_vs_rank")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
