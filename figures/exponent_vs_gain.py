"""Exponent of the best learning rate between neighbouring values of G = gamma r, with the laws: runs of sims.sweep.

python -m figures.exponent_vs_gain RUN [RUN ...]
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from jaxtyping import Float
from matplotlib.axes import Axes

from figures import style
from rora_theory.laws.displacement import COHERENCE_RANGE, best_rate_exponent
from rora_theory.scaling import check_integer
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_list

MAX_ENTRIES = 8
"""Largest number of legend entries: measured series, a band for each run folder, and two lines."""

MAX_FOLDERS = 2
"""Largest number of run folders, each with a colour that its points, band and line share."""


@dataclass(frozen=True)
class ExponentVsGainOptions:
    """Runs to draw, and the number of steps."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, style.RUN_FOLDERS]
    """Run folders of sims.sweep"""
    steps: Count = 64
    """Number of optimizer steps"""
    ranks: tuple[int, ...] = ()
    """Ranks to draw; all by default"""
    out: Path | None = None
    """Folder for exponent_vs_gain.png and .svg; the first run's by default"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("ranks", self.ranks, check_integer, fewest=0)


def draw_exponent_vs_gain(config: ExponentVsGainOptions) -> Sequence[Path]:
    """Draw exponents of the best rate between neighbouring values of G = gamma r, hollow for one seed, with the laws.

    Bars span the two values of G and one standard error. Bands are the displacement law with every measured K and c
    from 1 to 2. Points, band and dotted line of a model share a colour.
    """
    if len(config.runs) > MAX_FOLDERS:
        style.fail(f"runs must be at most {MAX_FOLDERS} run folders, got {len(config.runs)}")
    folders = style.read_folders(config.runs, "pooled.csv")
    is_single = len(folders) == 1
    # A series for each run folder and rank. Several run folders have a colour each, the ranks of a single one.
    series = []
    for folder, (label, table) in enumerate(folders):
        for index, (rank, pairs) in enumerate(neighbours_by_rank(table, config)):
            name = f"r = {rank}" if is_single else f"{label}, r = {rank}"
            series.append((name, pairs, style.COLOURS[index if is_single else folder], style.MARKERS[index]))
    largest = MAX_ENTRIES - len(folders) - 2
    if not 0 < len(series) <= largest:
        style.fail(
            f"the run folders must have exponents at 1 to {largest} ranks after {config.steps} steps, got "
            f"{len(series)} ranks. Choose other --steps or --ranks, or fewer runs."
        )
    figure, axes = plt.subplots(figsize=(style.WIDTH, 4.6))
    for position, (label, pairs, colour, marker) in enumerate(series):
        # Several ranks have the same ends: their points are moved apart, so that no bar hides another.
        shift = 1.05 ** (position - (len(series) - 1) / 2)
        for is_hollow, points in pairs.groupby(pairs["seeds"] == 1):
            middle = np.sqrt(points["first"] * points["second"]) * shift
            spans = [middle - points["first"], points["second"] - middle]
            errors = points["standard_error"].to_numpy(float, na_value=np.nan)
            fill = "none" if is_hollow else "full"
            look: dict[str, Any] = {"fmt": marker, "color": colour, "elinewidth": 0.9, "fillstyle": fill}
            axes.errorbar(middle, points["exponent"], yerr=errors, xerr=spans, **look)
            # A best rate at the end of its grid makes the exponent a bound only.
            is_bound = points["edge"]
            style.cross_out(axes, middle[is_bound], points.loc[is_bound, "exponent"])
        # The legend has one entry for filled and hollow points.
        axes.plot([], [], marker, color=colour, label=label)
    gains = pd.concat([pairs[end] for _, pairs, *_ in series for end in ("first", "second")])
    # Laws: a band and a line for each run folder, and the law of the first step.
    ends = (gains.min() / 2, gains.max() * 2)
    grid = np.geomspace(*ends, 60)
    for run, (label, _), colour in zip(config.runs, folders, style.COLOURS, strict=False):
        name, band, line = ("", "black", "black") if is_single else (label, colour, colour)
        draw_displacement_law(axes, style.read_table(run, "constants.csv"), config, grid, name=name, colour=band)
        draw_constant_gradient_law(axes, style.read_table(run, "exponents.csv"), config, ends, colour=line)
    axes.plot([], [], color="black", linewidth=0.9, linestyle=style.DOTTED, label="constant gradient")
    axes.axhline(-1, color="black", linewidth=0.9, linestyle=(0, (4, 2)), label="first step")
    axes.set(xscale="log", xlabel=r"$G = \gamma r$", ylim=(-1.05, -0.35))
    axes.set_ylabel(rf"$d \log \eta^* / d \log G$ after {config.steps} steps")
    style.plain_ticks(axes, gains)
    caption = (
        "fits to whole curves; bars: the two values of G, one standard error; hollow: one seed; bands: c from 1 to 2"
    )
    if any(pairs["edge"].any() for _, pairs, *_ in series):
        caption += "; crosses: at the grid's edge"
    style.legend(figure, style.named([axes]), caption)
    return style.save(figure, config.out or config.runs[0], "exponent_vs_gain")


def neighbours_by_rank(table: pd.DataFrame, config: ExponentVsGainOptions) -> list[tuple[str, pd.DataFrame]]:
    """Return each rank's exponents between neighbouring values of G.

    Values are neighbours if no value between them has a pair with both. Pairs with one seed do not count where the
    pair has more seeds.
    """
    # Exponents of single ranks.
    rows = table[(table["step"] == config.steps) & (table["over"] == "gain")]
    ranks = pd.to_numeric(rows["at"], errors="coerce")
    rows = rows[ranks.isin(config.ranks) if config.ranks else ranks.notna()]
    by_rank = []
    for rank, pairs in rows.groupby("at"):
        # Drop a pair with a measured value in between: its exponent is the mean of two others.
        several = pairs[pairs["seeds"] >= 2]
        neighbours = [
            not _has_value_between(first, second, several if seeds >= 2 else pairs)
            for first, second, seeds in zip(pairs["first"], pairs["second"], pairs["seeds"], strict=True)
        ]
        by_rank.append((f"{rank}", pairs[neighbours].sort_values(["first", "second"])))
    return sorted(by_rank, key=lambda item: float(item[0]))


def _has_value_between(first: float, second: float, pairs: pd.DataFrame) -> bool:
    """Return whether the pairs have both halves of a pair, divided at some value."""
    upper_halves = pairs.loc[pairs["second"] == second, "first"]
    return bool(upper_halves.isin(pairs.loc[pairs["first"] == first, "second"]).any())


def draw_displacement_law(
    axes: Axes,
    constants: pd.DataFrame,
    config: ExponentVsGainOptions,
    gains: Float[np.ndarray, " n"],
    *,
    name: str,
    colour: str,
) -> None:
    """Draw the displacement law as a band over all K that a run measured, and over all c.

    Args:
      axes: Axes to draw on.
      constants: The run's constants.csv. Without a K after the configured steps, nothing is drawn.
      config: Configuration of the figure.
      gains: Values of G at which the law is evaluated.
      name: Name of the model in the legend, or an empty string for a single run.
      colour: Colour of the band.
    """
    measured = constants[constants["step"] == config.steps]["constant"].to_numpy(float)
    if not measured.size:
        return
    # Exponent at each G, as the mean over a hundredth of an octave, with the smallest and largest K and c.
    corners = list(itertools.product((measured.min(), measured.max()), COHERENCE_RANGE))
    bounds = np.array(
        [
            [best_rate_exponent(low, low * 2**0.01, displacement_constant=K, coherence=c) for K, c in corners]
            for low in gains
        ]
    )
    law = f"displacement law, K = {measured.min():.0f} to {measured.max():.0f}"
    label = f"{name}, {law}" if name else law
    axes.fill_between(gains, bounds.min(axis=1), bounds.max(axis=1), color=colour, alpha=0.2, linewidth=0, label=label)


def draw_constant_gradient_law(
    axes: Axes, exponents: pd.DataFrame, config: ExponentVsGainOptions, ends: tuple[float, float], *, colour: str
) -> None:
    """Draw the exponents of the constant-gradient law at the geometric middle of each pair that a run has.

    Args:
      axes: Axes to draw on.
      exponents: The run's exponents.csv. Without pairs after the configured steps, nothing is drawn.
      config: Configuration of the figure.
      ends: Values of G at which the line begins and ends.
      colour: Colour of the line.
    """
    predicted = exponents[(exponents["over"] == "gain") & (exponents["step"] == config.steps)]
    if config.ranks:
        predicted = predicted[predicted["at"].isin(config.ranks)]
    by_middle = predicted.groupby(np.sqrt(predicted["first"] * predicted["second"]))["law"].mean()
    if by_middle.empty:
        return
    x = [ends[0], *by_middle.index, ends[1]]
    y = [by_middle.iloc[0], *by_middle, by_middle.iloc[-1]]
    axes.plot(x, y, color=colour, linewidth=1.2, linestyle=style.DOTTED)


if __name__ == "__main__":
    style.command(draw_exponent_vs_gain, ExponentVsGainOptions, __doc__)
