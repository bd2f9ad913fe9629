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
from rora_theory.validation.rules import check_ranks

MAX_ENTRIES = 8
"""Largest number of legend entries: measured series, a band for each run folder, and two lines."""

BAND_COLOURS = (style.BAND_COLOUR, "#f3d9b1")
"""Colours of the displacement law's bands, one for each run folder."""


@dataclass(frozen=True)
class Config:
    """Runs to draw, with the number of steps and the estimator."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, style.RUN_FOLDERS]
    """Run folders of sims.horizon"""
    steps: Count = 64
    """Number of optimizer steps"""
    estimate: Method = "quadratic"
    """Estimator of the best rate"""
    ranks: tuple[int, ...] = ()
    """Ranks to draw; all by default"""
    out: Path | None = None
    """Folder for exponent_vs_strength.png and .svg; the first run's by default"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_ranks(self.ranks, fewest=0)


def draw(config: Config) -> Sequence[Path]:
    """Bars span the two values of G and one standard error over seeds; a hollow point has one seed and no error.

    A band is the displacement law with every K measured in a run folder and c from 1 to 2.
    """
    if len(config.runs) > len(BAND_COLOURS):
        style.fail(f"runs must be at most {len(BAND_COLOURS)} run folders, got {len(config.runs)}")
    folders = style.read_folders(config.runs, "estimators.csv")
    # A series for each run folder and rank.
    series = [
        (f"{label}, r = {rank}" if len(folders) > 1 else f"r = {rank}", pairs)
        for label, table in folders
        for rank, pairs in neighbours_by_rank(table, config)
    ]
    largest = MAX_ENTRIES - len(folders) - 2
    if not 0 < len(series) <= largest:
        style.fail(
            f"the run folders must have exponents at 1 to {largest} ranks after {config.steps} steps, got "
            f"{len(series)} ranks. Choose other --steps or --ranks, or fewer runs."
        )
    figure, axes = plt.subplots(figsize=(4.6, 3.4))
    for position, (label, pairs) in enumerate(series):
        # Several ranks have the same ends: their points are moved apart, so that no bar hides another.
        middle = np.sqrt(pairs["first"] * pairs["second"]) * 1.05 ** (position - (len(series) - 1) / 2)
        spans = [middle - pairs["first"], pairs["second"] - middle]
        errors = pairs["standard_error"].to_numpy(float, na_value=np.nan)
        look: dict[str, Any] = {"fmt": style.MARKERS[position], "color": style.COLOURS[position], "elinewidth": 0.9}
        look["fillstyle"] = "none" if (pairs["seeds"] == 1).all() else "full"
        axes.errorbar(middle, pairs["exponent"], yerr=errors, xerr=spans, label=label, **look)
    strengths = pd.concat([pairs[end] for _, pairs in series for end in ("first", "second")])
    draw_laws(axes, config, (strengths.min() / 2, strengths.max() * 2))
    axes.set(xscale="log", xlabel=r"$G = \gamma r$", ylim=(-1.05, -0.4))
    axes.set_ylabel(rf"$d \log \eta^* / d \log G$ after {config.steps} steps")
    style.plain_ticks(axes, strengths)
    caption = (
        f"{config.estimate} fit; bars: the two values of G, one standard error over seeds; hollow: one seed; "
        "bands: c from 1 to 2"
    )
    style.legend(figure, style.named([axes]), caption)
    return style.save(figure, config.out or config.runs[0], "exponent_vs_strength")


def neighbours_by_rank(table: pd.DataFrame, config: Config) -> list[tuple[str, pd.DataFrame]]:
    """Return each rank's exponents between neighbouring values of G.

    Pairs with one seed are left out, unless no pair of the table has more. Values are neighbours if no value between
    them has such a pair with both.
    """
    # Exponents of single ranks, which have an error over seeds.
    rows = table[(table["step"] == config.steps) & (table["over"] == "strength") & (table["pairs"] == 1)]
    rows = rows[rows["estimate"] == config.estimate]
    if config.ranks:
        rows = rows[rows["at"].astype(float).isin(config.ranks)]
    rows = rows[rows["seeds"] >= 2] if (rows["seeds"] >= 2).any() else rows
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
    """Draw the displacement law as a band for each run folder, and the lines of the two other laws."""
    grid = np.geomspace(*strengths, 60)
    folders = style.read_folders(config.runs, "constants.csv")
    for (model, table), colour in zip(folders, BAND_COLOURS[: len(folders)], strict=True):
        constants = table[table["step"] == config.steps]["constant"].to_numpy(float)
        if not constants.size:
            continue
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
        prefix = f"{model}, " if len(folders) > 1 else ""
        label = f"{prefix}displacement law, K = {constants.min():.0f} to {constants.max():.0f}"
        axes.fill_between(grid, bounds.min(axis=1), bounds.max(axis=1), color=colour, alpha=0.6, label=label)
    # The constant-gradient law of each model, at the geometric middle of the pairs for which the run has it.
    for position, run in enumerate(config.runs):
        predicted = frames.read_csv(run / "exponents.csv")
        predicted = predicted[(predicted["over"] == "strength") & (predicted["step"] == config.steps)]
        if config.ranks:
            predicted = predicted[predicted["at"].isin(config.ranks)]
        by_middle = predicted.groupby(np.sqrt(predicted["first"] * predicted["second"]))["law"].mean()
        if by_middle.empty:
            continue
        x = [strengths[0], *by_middle.index, strengths[1]]
        y = [by_middle.iloc[0], *by_middle, by_middle.iloc[-1]]
        line: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": (0, (1, 1 + position))}
        axes.plot(x, y, label="constant gradient" if position == 0 else "_same law", **line)
    axes.axhline(-1, color="black", linewidth=0.9, linestyle=(0, (4, 2)), label="first step")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
