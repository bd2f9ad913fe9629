"""Ratio of the A part to the B part of the change against G = gamma r, with the displacement law: runs of sims.sweep.

python -m figures.displacement_ratio RUN [RUN ...]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from figures import style
from rora_theory.laws.displacement import displacement_ratio
from rora_theory.validation.rules import check_steps

MAX_SERIES = 8
"""Largest number of entries of a legend."""


@dataclass(frozen=True)
class DisplacementRatioOptions:
    """Runs to draw, and numbers of steps."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, style.RUN_FOLDERS]
    """Run folders of sims.sweep"""
    steps: tuple[int, ...] = (16, 64, 256)
    """Numbers of optimizer steps, a colour each; those that a run lacks are left out"""
    out: Path | None = None
    """Folder for displacement_ratio.png and .svg; the first run's by default"""

    def __post_init__(self) -> None:
        check_steps(self.steps)


def draw_displacement_ratio(config: DisplacementRatioOptions) -> Sequence[Path]:
    """Draw the ratio of the A part to the B part of the change against G, with the displacement law; bars: all runs.

    Points are means over the runs at or below the best rate.
    """
    folders = style.read_folders(config.runs, "constants.csv")
    figure, axes = plt.subplots(figsize=(4.4, 3.4))
    series = 0
    for (folder_index, (label, constants)), (colour, step) in product(
        enumerate(folders), zip(style.COLOURS, config.steps, strict=False)
    ):
        at_step = constants[constants["step"] == step]
        if at_step.empty:
            continue
        series += 1
        # The ratio of the mean of K, and of its smallest and largest value over runs.
        ratios = {
            name: np.array(
                [
                    displacement_ratio(gain, displacement_constant=constant)
                    for gain, constant in zip(at_step["gain"], at_step[name], strict=True)
                ]
            )
            for name in ("constant", "constant_low", "constant_high")
        }
        bars = [ratios["constant"] - ratios["constant_low"], ratios["constant_high"] - ratios["constant"]]
        mean = float(np.exp(np.log(at_step["constant"]).mean()))
        name = f"{label}, {step} steps: K = {mean:.0f}" if len(folders) > 1 else f"{step} steps: K = {mean:.0f}"
        # Points of different ranks and steps are moved apart, so that no bar hides another.
        ranks = sorted(set(constants["rank"]))
        shift = at_step["rank"].map(lambda rank, ranks=ranks: ranks.index(rank) - (len(ranks) - 1) / 2)
        x = at_step["gain"] * 1.03**shift * 1.01 ** (config.steps.index(step) - 1)
        marker = style.MARKERS[folder_index]
        axes.errorbar(x, ratios["constant"], yerr=bars, fmt=marker, color=colour, label=name)
        # The law's line, over all values of G.
        grid = np.geomspace(constants["gain"].min() / 1.5, constants["gain"].max() * 1.5, 100)
        line = [displacement_ratio(gain, displacement_constant=mean) for gain in grid]
        axes.plot(grid, line, color=colour, linewidth=0.9, linestyle=("-", "--", ":")[folder_index % 3])
    if not 0 < series <= MAX_SERIES:
        style.fail(
            f"the run folders must have between 1 and {MAX_SERIES} series of constants at --steps, got {series}. "
            "Choose other --steps."
        )
    axes.set(xscale="log", yscale="log", xlabel=r"$G = \gamma r$", ylabel=r"$\rho$ = A part / B part of the change")
    style.plain_ticks(axes, pd.concat([constants["gain"] for _, constants in folders]))
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.legend(frameon=False, title="lines: " + r"$\rho (1 + \rho) = K / G$")
    return style.save(figure, config.out or config.runs[0], "displacement_ratio")


if __name__ == "__main__":
    style.command(draw_displacement_ratio, DisplacementRatioOptions, __doc__)
