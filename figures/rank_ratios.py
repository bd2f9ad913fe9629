"""Change of the best learning rate with the rank at each G = gamma r, beside the power law of the advice.

python -m figures.rank_ratios RUN
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib.lines import Line2D

from figures import style
from rora_theory.advice.best_rate import QUANTILE
from rora_theory.advice.constants import CONSTANTS
from rora_theory.runs import frames

SETTING = r"^rank (\d+), G (\S+)$"
LIMITS = (0.35, 2.8)
TICKS = (0.5, 0.7, 1, 1.4, 2)


@dataclass(frozen=True)
class RankRatiosOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder with outcomes.csv of benchmarks/gain_laws.py"""
    out: Path | None = None
    """Folder for rank_ratios.png and .svg; that of the runs by default"""


def draw_rank_ratios(config: RankRatiosOptions) -> Sequence[Path]:
    """Draw the best rate at each rank over that at the reference rank of the same G, one panel for each schedule.

    Best rates are by the three lowest losses; bars are 95% intervals over three or more seeds, and open markers have
    fewer, as the others' best rates lie at an end of their grids. The line is the power law of the advice, and the
    band its 90% range.
    """
    ratios = read_ratios(config.run)
    if ratios.empty:
        style.fail(f"{config.run} compares no two ranks at one G.")
    schedules = [name for name in ("constant", "cosine") if name in set(ratios["schedule"])]
    gains = sorted(set(ratios["gain"]))
    reference = int(ratios["from_rank"].iloc[0])
    ranks = np.unique([reference, *ratios["rank"]])
    exponent = CONSTANTS["rank_exponent"]
    figure, axes = style.panels(len(schedules), sharex=True)
    for axis, schedule in zip(axes, schedules, strict=True):
        span = np.geomspace(ranks.min(), ranks.max(), 50) / reference
        low, high = (span ** (exponent.value + sign * QUANTILE * exponent.spread) for sign in (-1, 1))
        axis.fill_between(span * reference, low, high, color=style.BAND_COLOUR, linewidth=0, zorder=0)
        axis.plot(span * reference, span**exponent.value, color="black")
        for place, gain in enumerate(gains):
            rows = ratios[(ratios["schedule"] == schedule) & (ratios["gain"] == gain)]
            # Beside each other, so that the bars can be told apart; two seeds or fewer give no bar.
            shift, colour, marker = 1.06 ** (place - (len(gains) - 1) / 2), style.COLOURS[place], style.MARKERS[place]
            few = rows[rows["seeds"] < 3]
            axis.plot(few["rank"] * shift, few["ratio"], marker, color=colour, fillstyle="none", markersize=4)
            rows = rows[rows["seeds"] >= 3]
            bars = np.abs(rows[["ratio_low", "ratio_high"]].to_numpy().T - rows["ratio"].to_numpy())
            axis.errorbar(rows["rank"] * shift, rows["ratio"], yerr=bars, fmt=marker, color=colour, markersize=4)
        axis.plot([reference], [1.0], "o", color="black", fillstyle="none", markersize=6)
        axis.set(xscale="log", yscale="log", ylabel=f"best rate over that at rank {reference}")
        axis.set_title("constant rate" if schedule == "constant" else f"{schedule} decay", loc="left")
        style.integer_ticks(axis, ranks)
        axis.set_ylim(*LIMITS)
        axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.minorticks_off()
    axes[-1].set_xlabel("rank $r$")
    looks = zip(gains, style.MARKERS, style.COLOURS, strict=False)
    handles = {f"G = {gain:,.4g}": Line2D([], [], linestyle="none", marker=m, color=c) for gain, m, c in looks}
    handles[f"$r^{{{exponent.value:.2f}}}$, range of 90%"] = Line2D([], [], color="black")
    style.legend(figure, handles, "bars: 95% intervals over seeds; open: fewer than three seeds")
    return style.save(figure, config.out or config.run, "rank_ratios")


def read_ratios(run: Path) -> pd.DataFrame:
    """Return the measured ratios of best rates at two ranks and one G."""
    outcomes = frames.read_csv(run / "outcomes.csv").query("estimator == 'three points'")
    table = outcomes.drop_duplicates(["schedule", "from", "to"])
    table[["from_rank", "from_gain"]] = table["from"].str.extract(SETTING).astype(float)
    table[["rank", "gain"]] = table["to"].str.extract(SETTING).astype(float)
    return table[(table["from_gain"] == table["gain"]) & (table["from_rank"] != table["rank"]) & table["ratio"].notna()]


if __name__ == "__main__":
    style.command(draw_rank_ratios, RankRatiosOptions, __doc__)
