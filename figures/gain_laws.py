"""Best learning rate against G = gamma r for several seeds, beside the laws that were written down before the runs.

python -m figures.gain_laws RUN
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
from rora_theory.runs import frames
from rora_theory.validation.ranges import Count, check_ranges

REFERENCE_GAIN = 32.0
"""G of the setting to whose best rate the laws are tied."""

LAWS = {
    "first step": (r"first step, $G^{-1}$", ":"),
    "G^-0.75": (r"$G^{-3/4}$", "--"),
    "square root": (r"root, $G^{-1/2}$", "-."),
    "displacement law, c = 1": ("displacement law", "-"),
}
"""Label and line style of each law."""


@dataclass(frozen=True)
class GainLawsOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder with best.csv and predictions.csv of benchmarks/gain_laws.py"""
    rank: Count = 8
    """Rank whose best rates are drawn"""
    out: Path | None = None
    """Folder for gain_laws.png and .svg; that of the runs by default"""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_gain_laws(config: GainLawsOptions) -> Sequence[Path]:
    """Draw the best rate of every seed against G, one panel for each schedule, with a line for each law.

    A law's line passes through the geometric mean of the best rates at G = 32. Best rates are those by three points; a
    cross is one at the end of its rates, which is a bound.
    """
    best = frames.read_csv(config.run / "best.csv")
    predictions = frames.read_csv(config.run / "predictions.csv")
    best = best[(best["estimator"] == "three points") & (best["rank"] == config.rank)]
    # The compared settings of a schedule have its largest number of steps.
    best = best[best["steps"] == best.groupby("schedule")["steps"].transform("max")]
    schedules = [name for name in ("constant", "cosine") if name in set(best["schedule"])]
    if not schedules:
        style.fail(f"{config.run} has no best rate at --rank {config.rank}. Choose a rank that best.csv has.")
    figure, axes = style.panels(len(schedules), sharex=True)
    for axis, schedule in zip(axes, schedules, strict=True):
        rows = best[best["schedule"] == schedule]
        inside = rows["edge"].isna()
        at_reference = rows[inside & np.isclose(rows["gain"], REFERENCE_GAIN)]
        level = float(np.exp(np.log(at_reference["best_rate"]).mean()))
        for (name, (_, line)), color in zip(LAWS.items(), style.COLOURS, strict=False):
            law = law_line(predictions, schedule, name, config.rank)
            axis.plot(law.index, level * law, line, color=color)
        axis.plot(rows["gain"][inside], rows["best_rate"][inside], "o", color="black", fillstyle="none", markersize=4)
        style.cross_out(axis, rows["gain"][~inside], rows["best_rate"][~inside])
        decay = "constant rate" if schedule == "constant" else f"{schedule} decay"
        axis.set(xscale="log", yscale="log", ylabel="best learning rate")
        axis.set_title(f"{decay}, {int(rows['steps'].max()):,} steps, {rows['seed'].nunique()} seeds", loc="left")
        style.plain_ticks(axis, rows["gain"])
    axes[-1].set_xlabel("G, the scaling times the rank")
    looks = zip(LAWS.values(), style.COLOURS, strict=False)
    handles = {label: axes[0].plot([], [], line, color=color)[0] for (label, line), color in looks}
    handles["a seed's best rate"] = Line2D([], [], linestyle="none", marker="o", color="black", fillstyle="none")
    style.legend(figure, handles, "laws, tied to the runs at G = 32")
    return style.save(figure, config.out or config.run, "gain_laws")


def law_line(predictions: pd.DataFrame, schedule: str, law: str, rank: int) -> pd.Series:
    """Return a law's ratio of the best rate to that at the reference, by G in ascending order."""
    rows = predictions[(predictions["schedule"] == schedule) & (predictions["law"] == law)]
    gains = rows["to"].str.extract(rf"^rank {rank}, G (\S+)$")[0].astype(float)
    ratios = pd.Series(rows["prediction"].to_numpy(float), index=gains.to_numpy())
    return pd.concat([ratios, pd.Series([1.0], index=[REFERENCE_GAIN])]).sort_index()


if __name__ == "__main__":
    style.command(draw_gain_laws, GainLawsOptions, __doc__)
