"""Best learning rate against the rank in public sweeps, with the line and the range of the advice: rora evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes

from figures import style
from rora_theory.evidence import starting_rates
from rora_theory.evidence.policies import advised_range

PALETTE = style.COLOURS[:-1]
"""Colours of the models: all but black, which is the law's."""


@dataclass(frozen=True)
class BestRateVsRankOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.evidence"""
    out: Path | None = None
    """Folder for best_rate_vs_rank.png and .svg; the run folder by default"""


def draw_best_rate_vs_rank(config: BestRateVsRankOptions) -> Sequence[Path]:
    """Draw the best rate against the rank: a line for each model, the rate that the advice gives, and its 90% range.

    The upper panel has the models with one G = gamma r, the lower one those with alpha = r. Open markers are best rates
    that are only a bound, or known to a grid step.
    """
    _, best = style.read_frame(config.run, "evidence", "best_rates.csv")
    models = starting_rates.model_table()
    family_of = dict(zip(models["model"], models["family"], strict=True))
    is_fixed = best.groupby(["source", "model"])["gain"].transform("nunique") == 1
    halves = ((best[is_fixed], "alpha = 32 at every rank"), (best[~is_fixed], "alpha = r"))
    panels = [(rows, title) for rows, title in halves if len(rows)]
    names = list(dict.fromkeys(family_of.get(model, model) for model in best["model"]))
    looks = {
        name: (PALETTE[i % len(PALETTE)], style.MARKERS[(i + 2 * (i // len(PALETTE))) % len(style.MARKERS)])
        for i, name in enumerate(names)
    }
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(style.NARROW, 0.7 + 2.5 * len(panels)), sharex=True, squeeze=False
    )
    for axis, (rows, title) in zip(axes.flat, panels, strict=True):
        draw_law(axis, rows)
        for (_, model), curve in rows.groupby(["source", "model"], sort=False):
            draw_model(axis, curve, *looks[family_of.get(model, model)], family_of.get(model, model))
        axis.set(yscale="log", ylabel="best learning rate")
        axis.set_title(title, loc="left")
        style.integer_ticks(axis, best["rank"], max_count=9)
    axes.flat[-1].set_xlabel("rank $r$")
    caption = "thin line: a model; open marker: a bound; thick line: rora transfer; band: its 90% range"
    style.legend(figure, style.named(axes.flat), caption)
    return style.save(figure, config.out or config.run, "best_rate_vs_rank")


def draw_law(axis: Axes, rows: pd.DataFrame) -> None:
    """Draw the rate of the advice from the geometric mean of the best rates inside their grids, and its range."""
    inside = rows[rows["place"] == "inside"]
    inside = inside if len(inside) else rows
    ranks = np.unique(rows["rank"].to_numpy(int))
    gains = {int(rank): float(members["gain"].iloc[0]) for rank, members in rows.groupby("rank")}
    # The reference is the rank in the middle of those with best rates.
    reference = int(sorted(inside["rank"])[len(inside) // 2])
    logs = [
        np.log(row.best_rate / advised_range(reference, gains[reference], int(row.rank), row.gain).best)
        for row in inside.itertuples()
    ]
    level = np.exp(np.mean(logs))
    low, best, high = (
        level * np.array([advised_range(reference, gains[reference], int(r), gains[int(r)]) for r in ranks]).T
    )
    axis.fill_between(ranks, low, high, color=style.BAND_COLOUR, linewidth=0, zorder=0)
    axis.plot(ranks, best, color="black", linewidth=2.0, zorder=5)


def draw_model(axis: Axes, curve: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """Draw the best rates of a model; a line connects those inside their grids."""
    curve = curve.sort_values("rank")
    inside = curve["place"] == "inside"
    axis.plot(curve["rank"], curve["best_rate"], color=colour, linewidth=0.5, alpha=0.5, linestyle=style.DOTTED)
    axis.plot(
        curve[inside]["rank"], curve[inside]["best_rate"], color=colour, marker=marker, linewidth=0.7, label=label
    )
    bounds = curve[~inside]
    axis.plot(bounds["rank"], bounds["best_rate"], marker, color=colour, fillstyle="none", markeredgewidth=0.6)


if __name__ == "__main__":
    style.command(draw_best_rate_vs_rank, BestRateVsRankOptions, __doc__)
