"""Map the local exponent of the first step's second moment over rank and overlap, by the exact law for SGD and Adam.

Colour is d log E[w^2] / d log r at gamma = 1. Contours are the kappa for which the step of gamma = alpha / r^kappa does
not depend on the rank. The line is the crossing rank r*: cross-talk dominates below it, the signal above it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke

from figures import style
from rora_theory import laws
from rora_theory.optimizers import OPTIMIZERS, scaling_power
from rora_theory.validation.ranges import AtLeastTwo, Count, check_ranges

LABELS_AT = (0.05, 0.12)
"""Overlaps at which contours are labelled, alternately."""


@dataclass(frozen=True)
class ExponentMapOptions:
    p_in: Count = 4096
    """Inputs of the layer, 1 or more."""
    max_rank: AtLeastTwo = 16384
    """Largest rank of the map, 2 or more."""
    out: Path = Path("results/exponent_map")
    """Folder for exponent_map.png and .svg."""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_exponent_map(config: ExponentMapOptions) -> Sequence[Path]:
    """Draw the exponent of the first step's mean square in the rank, over rank and overlap, by the exact law."""
    ranks = np.geomspace(1, config.max_rank, 241)
    overlaps = np.geomspace(0.003, 1, 241)
    figure, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 5.4), sharex=True)
    for axis, optimizer in zip(axes, OPTIMIZERS, strict=True):
        # Crossing rank at each overlap, and the local exponent of E[w^2] between cross-talk and signal.
        crossing = np.array(
            [laws.random_input_crossing_rank(config.p_in, rho, optimizer=optimizer) for rho in overlaps]
        )
        slope = laws.local_exponent(ranks[None], laws.linear_term(crossing[:, None], optimizer=optimizer))
        mesh = axis.pcolormesh(
            ranks, overlaps, slope, cmap="cividis", vmin=1, vmax=2, shading="gouraud", rasterized=True
        )
        # Contours of the kappa that is flat at each point, between its two limits.
        kappa = laws.flat_kappa(slope, optimizer=optimizer)
        ends = laws.flat_kappa(np.array([1.0, 2.0]), optimizer=optimizer)
        levels = np.linspace(ends[0], ends[1], 6)[1:-1]
        axis.contour(ranks, overlaps, kappa, levels=levels, colors="white", linewidths=0.6)
        # The slope is s at r = c (s - 1) / (2 - s) with the linear term c. Alternate the heights of labels.
        for number, (level, s) in enumerate(zip(levels, levels * 2 * scaling_power(optimizer), strict=True)):
            overlap = LABELS_AT[number % 2]
            crossing_rank = laws.random_input_crossing_rank(config.p_in, overlap, optimizer=optimizer)
            c = float(laws.linear_term(crossing_rank, optimizer=optimizer))
            axis.text(
                c * (s - 1) / (2 - s),
                overlap,
                f"{level:.3g}",
                color="white",
                ha="center",
                va="center",
                path_effects=[withStroke(linewidth=1.8, foreground="#333333")],
            )
        # The crossing rank separates the two regimes.
        axis.plot(crossing, overlaps, color=style.COLOURS[1], label="crossing rank $r^*$")
        axis.set(xscale="log", yscale="log", xlim=(1, config.max_rank), ylim=(overlaps[0], 1))
        axis.set_xscale("log", base=2)
        axis.set_title(
            f"{style.OPTIMIZERS[optimizer]}, "
            rf"flat at $\kappa$ = {ends[0]:g} (cross-talk) to {ends[1]:g} (signal)"
        )
        axis.set_ylabel(r"overlap $\rho$ of the inputs")
        axis.grid(False)
    axes[-1].set_xlabel("rank $r$")
    figure.colorbar(mesh, ax=axes, label=r"$d\,\log E[w^2]\;/\;d\,\log r$ at $\gamma = 1$")
    swatch = plt.Rectangle((0, 0), 1, 1, facecolor="#7c7b78", edgecolor="white", linewidth=0.6)
    handles = style.named(axes) | {r"contours: the $\kappa$ that is flat there": swatch}
    style.legend(figure, handles, f"$p_{{in}}$ = {config.p_in}, Gaussian inputs and A")
    return style.save(figure, config.out, "exponent_map")


if __name__ == "__main__":
    style.command(draw_exponent_map, ExponentMapOptions, __doc__)
