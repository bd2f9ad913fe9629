"""Exponent of the best learning rate between neighbouring values of G = gamma r, with the laws: runs of sims.horizon.

python -m figures.exponent_vs_strength RUN [RUN ...]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes

from figures import style
from rora_theory.io import frames
from rora_theory.stats.curve_optima import Method
from rora_theory.theory.displacement import COHERENCE_RANGE, best_rate_exponent
from rora_theory.validation.ranges import Count, check_ranges

MAX_SERIES = 5
"""Largest number of measured series, beside the three laws."""


@dataclass(frozen=True)
class Config:
    """Runs to draw, with the number of steps and the estimator."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, style.RUN_FOLDERS]
    """Run folders of sims.horizon"""
    steps: Count = 64
    """Number of optimizer steps"""
    estimate: Method = "quadratic"
    """Estimator of the best rate"""
    out: Path | None = None
    """Folder for exponent_vs_strength.png and .svg; the first run's by default"""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw(config: Config) -> Sequence[Path]:
    """Bars span the two values of G and one standard error over seeds; pairs with a single seed are left out.

    The band is the displacement law with every measured K and c from 1 to 2.
    """
    folders = style.read_folders(config.runs, "estimators.csv")
    # A series for each run folder and rank.
    series = [
        (f"{label}, r = {rank}" if len(folders) > 1 else f"r = {rank}", pairs)
        for label, table in folders
        for rank, pairs in neighbours_by_rank(table, config)
    ]
    if not 0 < len(series) <= MAX_SERIES:
        style.fail(
            f"the run folders must have exponents over two or more seeds at 1 to {MAX_SERIES} ranks after "
            f"{config.steps} steps, got {len(series)} ranks. Choose other --steps or fewer runs."
        )
    figure, axes = plt.subplots(figsize=(4.6, 3.4))
    for position, (label, pairs) in enumerate(series):
        # Several ranks have the same ends: their points are moved apart, so that no bar hides another.
        middle = np.sqrt(pairs["first"] * pairs["second"]) * 1.05 ** (position - (len(series) - 1) / 2)
        spans = [middle - pairs["first"], pairs["second"] - middle]
        look: dict[str, Any] = {"fmt": style.MARKERS[position], "color": style.COLOURS[position], "elinewidth": 0.9}
        axes.errorbar(middle, pairs["exponent"], yerr=pairs["standard_error"], xerr=spans, label=label, **look)
    strengths = pd.concat([pairs[end] for _, pairs in series for end in ("first", "second")])
    draw_laws(axes, config, (strengths.min() / 2, strengths.max() * 2))
    axes.set(xscale="log", xlabel=r"$G = \gamma r$", ylim=(-1.05, -0.4))
    axes.set_ylabel(rf"$d \log \eta^* / d \log G$ after {config.steps} steps ({config.estimate})")
    style.plain_ticks(axes, strengths)
    caption = "bars: the two values of G, and one standard error over seeds; band: c = 1 to 2"
    style.legend(figure, style.named([axes]), caption)
    return style.save(figure, config.out or config.runs[0], "exponent_vs_strength")


def neighbours_by_rank(table: pd.DataFrame, config: Config) -> list[tuple[str, pd.DataFrame]]:
    """Return each rank's exponents between neighbouring values of G, of pairs with two or more seeds.

    Values are neighbours if no value between them has such a pair with both.
    """
    # Exponents of single ranks, which have an error over seeds.
    rows = table[(table["step"] == config.steps) & (table["over"] == "strength") & (table["pairs"] == 1)]
    rows = rows[(rows["estimate"] == config.estimate) & (rows["seeds"] >= 2)]
    by_rank = []
    for rank, pairs in rows.groupby("at"):
        # Drop a pair with a measured value in between: its exponent is the mean of two others.
        ends = set(zip(pairs["first"], pairs["second"], strict=True))
        values = {value for pair in ends for value in pair}
        neighbours = [
            not any((first, value) in ends and (value, second) in ends for value in values)
            for first, second in zip(pairs["first"], pairs["second"], strict=True)
        ]
        by_rank.append((f"{rank}", pairs[neighbours].sort_values("first")))
    return sorted(by_rank, key=lambda item: float(item[0]))


def draw_laws(axes: Axes, config: Config, strengths: tuple[float, float]) -> None:
    """Draw the band of the displacement law, and the lines of a constant gradient and of the first step."""
    grid = np.geomspace(*strengths, 60)
    measured = [
        constants[constants["step"] == config.steps]
        for _, constants in style.read_folders(config.runs, "constants.csv")
    ]
    constants = np.concatenate([rows["constant"].to_numpy(float) for rows in measured])
    if constants.size:
        # Exponent at each G, as the mean over a hundredth of an octave.
        bounds = np.array(
            [
                [
                    best_rate_exponent(
                        strength, strength * 2**0.01, displacement_constant=constant, coherence=coherence
                    )
                    for constant in (constants.min(), constants.max())
                    for coherence in COHERENCE_RANGE
                ]
                for strength in grid
            ]
        )
        label = f"displacement law, K = {constants.min():.0f} to {constants.max():.0f}"
        axes.fill_between(grid, bounds.min(axis=1), bounds.max(axis=1), color=style.BAND_COLOUR, label=label)
    # The constant-gradient law, at the geometric middle of the pairs for which the run has it.
    predicted = pd.concat([frames.read_csv(run / "exponents.csv") for run in config.runs])
    predicted = predicted[(predicted["over"] == "strength") & (predicted["step"] == config.steps)]
    by_middle = predicted.groupby(np.sqrt(predicted["first"] * predicted["second"]))["law"].mean()
    x = [strengths[0], *by_middle.index, strengths[1]]
    y = [by_middle.iloc[0], *by_middle, by_middle.iloc[-1]]
    axes.plot(x, y, color="black", linewidth=0.9, linestyle=(0, (1, 1)), label="constant gradient")
    axes.axhline(-1, color="black", linewidth=0.9, linestyle=(0, (4, 2)), label="first step")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
