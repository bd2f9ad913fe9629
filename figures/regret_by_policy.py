"""Cost of policies that carry a learning rate to another setting, in nats per token: runs of sims.sweep.

python -m figures.regret_by_policy RUN [RUN ...]
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from figures import style
from rora_theory.scaling import check_positive
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_list

FLOOR = 1e-4
"""Smallest regret drawn, in nats per token: far below the resolution of any grid."""
ROW_GAP = 0.8
"""Space between two policies, in units of the space between two series."""
MARKERS = ("o", "s", "D", "p", "d", "h")
"""Markers of the series; a triangle is a lower bound. With it and the band, the legend has at most eight entries."""
LINES: Any = {"elinewidth": 0.9, "markersize": 4, "markeredgewidth": 0.9}
"""Widths of bars and markers, with which one sees whether a marker is hollow."""
POLICIES = {
    "keep the rate": "keep the rate",
    "first step": r"first step, $G^{-1}$",
    "square root": r"root, $G^{-1/2}$",
    "G^-0.75": r"power, $G^{-3/4}$",
    "constant gradient": "constant gradient",
    "displacement": "displacement law",
    "displacement and steps": "displacement law",
    "advice": "rora transfer",
}
"""Policies drawn, and their labels."""

Change = tuple[float, float, int, int]
"""Value of G = gamma r where the rate was tuned and where it is used, then the two numbers of steps."""


@dataclass(frozen=True)
class RegretByPolicyOptions:
    """Runs to draw, and changes to show."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, style.RUN_FOLDERS]
    """Run folders of sims.sweep"""
    rank: Count = 8
    """Rank at which the rate was tuned"""
    changes: tuple[Change, ...] = (
        (64.0, 724.0, 64, 64),
        (16.0, 256.0, 64, 64),
        (16.0, 181.0, 64, 64),
        (64.0, 64.0, 64, 256),
        (64.0, 724.0, 16, 256),
        (64.0, 64.0, 64, 64),
        (16.0, 16.0, 64, 64),
        (16.0, 16.0, 256, 256),
    )
    """Panels: tuned and new value of G = gamma r, tuned and new number of steps"""
    out: Path | None = None
    """Folder for regret_by_policy.png and .svg; the first run's by default"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("changes", self.changes)
        for value in itertools.chain(*self.changes):
            check_positive("changes", value)


def draw_regret_by_policy(config: RegretByPolicyOptions) -> Sequence[Path]:
    """Draw the regret of each policy, with bands over the tuned rate's 95% interval and triangles for lower bounds.

    Each change of setting has a panel. The rate is tuned at one rank and used at the rank in the legend. The regret is
    a lower bound where the policy's rate lies outside the rates that were run.
    """
    costs = select_costs(config)
    # Series have the same colour and marker in all panels.
    names = list(dict.fromkeys(costs["series"]))
    if len(names) > len(MARKERS):
        style.fail(f"the run folders must have at most {len(MARKERS)} pairs of a run and a rank, got {len(names)}")
    styles = zip(names, style.COLOURS, MARKERS, strict=False)
    looks: dict[str, dict[str, Any]] = {name: {"color": color, "marker": marker} for name, color, marker in styles}
    # Panels are as high as their rows, in the order of the changes.
    panels = list(costs.sort_values("change", kind="stable").groupby("panel", sort=False))
    heights = [len(rows) + ROW_GAP * (rows["row"].nunique() + 1) for _, rows in panels]
    size = (style.WIDTH, 1.5 + 0.2 * len(panels) + 0.085 * sum(heights))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels, strict=True):
        draw_panel(axis, rows, looks)
        axis.set_title(title, loc="left")
        axis.tick_params(axis="x", which="both", length=0)
    # The floor stands for all smaller regrets; a margin on its left shows whole markers.
    exponents = [-3, -2, -1]
    labels = [r"$\leq 10^{-4}$", *(f"$10^{{{exponent}}}$" for exponent in exponents)]
    axes.flat[-1].set(xscale="log", xlim=(FLOOR * 0.7, 0.3), xlabel="regret in nats per token")
    axes.flat[-1].set_xticks([FLOOR, *(10.0**exponent for exponent in exponents)], labels)
    axes.flat[-1].tick_params(axis="x", which="major", length=3)
    handles: dict[str, Any] = {name: Line2D([], [], linestyle="none", **look) for name, look in looks.items()}
    handles["lower bound: rate not run"] = Line2D([], [], linestyle="none", marker=">", color="black")
    handles["over the tuned rate's 95% interval"] = style.band_handle()
    caption = rf"$G = \gamma r$; rate tuned at r = {config.rank}; bars: standard error; hollow: one seed"
    style.legend(figure, handles, caption)
    return style.save(figure, config.out or config.runs[0], "regret_by_policy")


def select_costs(config: RegretByPolicyOptions) -> pd.DataFrame:
    """Select the rows of every run's regret.csv that a panel shows.

    Pairs with a best rate at the end of a grid are left out, because their lowest loss is unknown.

    Returns:
      The rows in the order of the runs and ranks, with the columns ``series`` (a run and a rank), ``change`` (its
      index), ``panel`` and ``row`` (titles).
    """
    selected = []
    for name, table in style.read_folders(config.runs, "regret.csv"):
        table = table[(table["old_rank"] == config.rank) & ~table["is_edge"] & table["policy"].isin(POLICIES)]
        # After other steps, the displacement law is drawn with the root of the steps.
        table = table[(table["policy"] != "displacement") | (table["old_steps"] == table["steps"])]
        table = table.sort_values("rank", kind="stable")
        for position, change in enumerate(config.changes):
            settings = table[["old_gain", "gain", "old_steps", "steps"]]
            rows = table[np.isclose(settings, change, rtol=1e-3).all(axis=1)]
            if len(rows):
                titles = [titles_of(change, row) for row in rows.itertuples()]
                series = [f"{name}, r = {rank}" for rank in rows["rank"]]
                panels, labels = zip(*titles, strict=True)
                selected.append(rows.assign(change=position, series=series, panel=panels, row=labels))
    if not selected:
        style.fail(
            f"the run folders have no regret of a rate tuned at --rank {config.rank} for any of --changes. "
            "Choose values that regret.csv has."
        )
    return pd.concat(selected)


def titles_of(change: Change, row: Any) -> tuple[str, str]:
    """Return the titles of a panel, for a change, and of a row in it, for a policy."""
    old_gain, gain, old_steps, steps = change
    title = f"G = {old_gain:g}" + (f" to {gain:g}" if gain != old_gain else "")
    title += f", {old_steps} to {steps} steps" if steps != old_steps else f", {steps} steps"
    # Changes of the rank alone share a panel, because all policies keep the rate.
    if (old_gain, old_steps) == (gain, steps):
        return "the rank alone: keep the rate", title
    # Where G stays, only the root of the steps is left of the displacement law.
    if old_gain == gain and row.policy == "displacement and steps":
        return title, f"rate / {(steps / old_steps) ** 0.5:g}"
    # The same alpha / r at another rank.
    scaling = old_gain / row.old_rank
    is_kept = row.rank != row.old_rank and math.isclose(scaling, gain / row.rank, rel_tol=1e-3)
    return f"alpha = {scaling:g}r, {title}" if is_kept else title, POLICIES[row.policy]


def draw_panel(axes: Axes, costs: pd.DataFrame, looks: Mapping[str, dict[str, Any]]) -> None:
    """Draw a panel: for each row and series the regret, its standard error and the range over the tuned optimum.

    Args:
      axes: Axes to draw on.
      costs: Rows of the panel, see `select_costs`.
      looks: Colour and marker of each series.
    """
    policies = list(POLICIES)
    costs = costs.sort_values("policy", key=lambda names: names.map(policies.index), kind="stable")
    ticks, y = {}, 0.0
    for label, rows in costs.groupby("row", sort=False):
        ticks[y + (len(rows) - 1) / 2] = label
        for row in rows.itertuples():
            # Band: the regret at the ends of the 95% interval of the tuned optimum.
            low, high = max(row.low, FLOOR), max(row.high, FLOOR)
            axes.barh(y, high - low, left=low, height=1.0, color=style.BAND_COLOUR)
            # Logarithmic axis: values below the floor are drawn at it.
            value, error = max(row.regret, FLOOR), row.standard_error
            bar = None if np.isnan(error) else [[min(error, value - FLOOR)], [error]]
            look = looks[row.series] | ({"marker": ">"} if row.is_lower_bound else {})
            fill = "none" if row.seeds == 1 else "full"
            axes.errorbar(value, y, xerr=bar, linestyle="none", fillstyle=fill, **LINES, **look)
            y += 1
        y += ROW_GAP
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    # The first row is on top, with half a gap above it and below the last one.
    axes.set_ylim(y - 0.5 - ROW_GAP / 2, -0.5 - ROW_GAP / 2)


if __name__ == "__main__":
    style.command(draw_regret_by_policy, RegretByPolicyOptions, __doc__)
