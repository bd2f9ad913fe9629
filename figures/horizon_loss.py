"""Held-out loss against learning rate at several ranks and one number of steps: a run of sims.sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from figures import style
from rora_theory.scaling import check_integer, check_positive
from rora_theory.validation.ranges import Count, Positive, check_ranges
from rora_theory.validation.rules import check_list


@dataclass(frozen=True)
class HorizonLossOptions:
    """Run to draw, and curves to show."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.sweep"""
    ranks: tuple[int, ...] = (1, 8, 32, 128)
    """Ranks, a curve each"""
    gains: tuple[float, ...] = (64.0, 724.0)
    """Values of G = gamma r: alpha under alpha / r, and alpha sqrt(r) under alpha / sqrt(r)"""
    steps: Count = 64
    """Number of optimizer steps"""
    top: Positive = 1.08
    """Highest loss drawn, in nats per token"""
    out: Path | None = None
    """Folder for horizon_loss.png and .svg; the run folder by default"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("ranks", self.ranks, check_integer)
        check_list("gains", self.gains, check_positive)


def draw_horizon_loss(config: HorizonLossOptions) -> Sequence[Path]:
    """Draw the held-out loss against the learning rate: the mean over seeds, and a dot for every seed."""
    _, losses = style.read_frame(config.run, "sweep")
    losses = losses[(losses["step"] == config.steps) & losses["rank"].isin(config.ranks)]
    figure, axes = plt.subplots(figsize=(style.WIDTH, 3.6))
    drawn = 0
    # Colours are ranks, dashes are gains; a curve needs three rates.
    for rank_index, rank in enumerate(config.ranks):
        for line, gain in zip(("-", "--"), config.gains, strict=False):
            # Gains are rounded in the options, hence the tolerance.
            curve = losses[(losses["rank"] == rank) & (losses["gain"].sub(gain).abs() < 0.5)]
            if curve["learning_rate"].nunique() < 3:
                continue
            label = f"r = {rank}, G = {gain:g}"
            draw_curve(
                axes, curve, line, color=style.COLOURS[rank_index], marker=style.MARKERS[rank_index], label=label
            )
            drawn += 1
    if not drawn:
        style.fail(f"{config.run}: results.csv has no curve of three learning rates after {config.steps} steps")
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"held-out loss after {config.steps} steps, nats per token")
    # Two labels for each decade: a short axis would label every minor tick, and they overlap.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(top=config.top)
    axes.legend(frameon=False, ncols=2)
    return style.save(figure, config.out or config.run, "horizon_loss")


def draw_curve(axes: Axes, curve: pd.DataFrame, line: str, *, color: str, marker: str, label: str) -> None:
    """Draw a line through the means over the seeds that ran every rate of the line, and every seed's runs."""
    by_rate = curve.groupby("learning_rate")["validation_loss"]
    # A mean over fewer seeds has another level: seeds differ by more than neighbouring rates do.
    complete = by_rate.mean()[by_rate.size() == curve["seed"].nunique()]
    axes.plot(complete.index, complete, line, color=color, marker=marker, label=label)
    axes.plot(curve["learning_rate"], curve["validation_loss"], ".", color=color, markersize=2, alpha=0.5)


if __name__ == "__main__":
    style.command(draw_horizon_loss, HorizonLossOptions, __doc__)
