"""Held-out loss against the learning rate at several ranks, under two scaling rules: a run of sims.sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import pandas as pd
import tyro
from matplotlib.axes import Axes

from figures import style
from rora_theory.runs import frames
from rora_theory.scaling import Rule, scaling_factor
from rora_theory.validation.ranges import Count, Positive, check_ranges

PANELS: dict[Rule, str] = {"lora": "alpha / r", "rslora": "use_rslora"}
"""Rules of the panels, with their names in titles."""


@dataclass(frozen=True)
class MinimaOptions:
    """Run to draw, and the alpha and number of steps of its curves."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.sweep"""
    alpha: Positive = 64.0
    """Alpha of every curve"""
    steps: Count = 64
    """Number of optimizer steps"""
    top: Positive = 0.04
    """Highest value drawn, in nats per token above the lowest of a curve"""
    out: Path | None = None
    """Folder for minima.png and .svg; the run folder by default"""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_minima(config: MinimaOptions) -> Sequence[Path]:
    """Draw the loss above its lowest value against the learning rate: a panel for each rule, a line for each rank."""
    _, losses = style.read_frame(config.run, "sweep")
    best = frames.read_csv(config.run / "best.csv", accepted="the file of a finished run")
    losses, best = (table[table["step"] == config.steps] for table in (losses, best))
    ranks = sorted({int(rank) for rank in losses["rank"].dropna()})
    figure, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 3.1), sharex=True, sharey=True)
    drawn = 0
    for axis, (rule, name) in zip(axes, PANELS.items(), strict=True):
        for position, rank in enumerate(ranks):
            gain = rank * scaling_factor(rule, alpha=config.alpha, rank=rank)
            curve, best_row = (
                table[(table["rank"] == rank) & (table["gain"] - gain).abs().lt(0.5)] for table in (losses, best)
            )
            if curve["learning_rate"].nunique() < 3 or best_row.empty:
                continue
            colour, marker = style.COLOURS[position], style.MARKERS[position]
            draw_curve(axis, curve, colour, marker, f"rank {rank}")
            axis.axvline(best_row["best_rate"].iloc[0], color=colour, linestyle=style.DOTTED, linewidth=1)
            drawn += 1
        axis.set(
            xscale="log", ylim=(-0.004, config.top), xlabel="learning rate", title=f"{name}, alpha = {config.alpha:g}"
        )
    if not drawn:
        style.fail(
            f"{config.run}: no curve has three learning rates at alpha {config.alpha:g} after {config.steps} steps"
        )
    axes[0].set_ylabel("loss above the lowest, nats per token")
    style.legend(figure, style.named(axes), "dotted: best learning rate of each rank")
    return style.save(figure, config.out or config.run, "minima")


def draw_curve(axis: Axes, curve: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """Draw the mean over the seeds that ran every rate of the line, above its lowest value."""
    by_rate = curve.groupby("learning_rate")["validation_loss"]
    mean = by_rate.mean()[by_rate.size() == by_rate.size().max()]
    axis.plot(mean.index, mean - mean.min(), color=colour, marker=marker, label=label)


if __name__ == "__main__":
    style.command(draw_minima, MinimaOptions, __doc__)
