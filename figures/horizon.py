"""Plot best rates against gamma r and their exponents against the steps, with the law of a constant gradient."""

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
from rora_theory.runs import frames


@dataclass(frozen=True)
class HorizonOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.sweep, finished with --regime."""
    out: Path | None = None
    """Folder for horizon.png and .svg; by default the run folder."""


def draw_horizon(config: HorizonOptions) -> Sequence[Path]:
    """Draw best rates against gamma r, their exponents against the steps, and best rates against the steps.

    Lines show the law of a constant gradient from the first point on, the band its range.
    """
    style.read_frame(config.run, "sweep")
    best, exponents = (frames.read_csv(config.run / name) for name in ("best.csv", "exponents.csv"))
    best = best[best["rank"].notna()]  # full fine-tuning has no gamma r
    exponents = exponents[exponents["over"] == "gain"]
    if exponents.empty:
        style.fail(f"{config.run}: no rank has best rates at two gains. Run sims.sweep with further --gains.")
    ranks, steps = (sorted({int(value) for value in best[name]}) for name in ("rank", "step"))
    figure, (first, second, last) = style.panels(3)
    draw_against_gain(first, best, exponents, ranks, steps)
    # Exponents from one value of G to the largest: the one that most ranks and horizons have.
    from_one = exponents[exponents["first"] == exponents["first"].mode()[0]]
    draw_exponents(second, from_one, ranks, steps)
    draw_against_steps(last, best, ranks)
    # Colours are steps and markers are ranks in all panels, so that the legend has one entry for each.
    handles: dict[str, Any] = {
        f"{step} steps": plt.Line2D([], [], color=colour) for step, colour in zip(steps, style.COLOURS, strict=False)
    }
    for rank, marker in zip(ranks, style.MARKERS, strict=False):
        handles[f"r = {rank:g}"] = plt.Line2D([], [], color="black", marker=marker, linestyle="none")
    caption = (
        "bars of rates: one standard error, of exponents: 95%; lines above, and band: constant gradient from the "
        "first point"
    )
    if best["edge"].notna().any():
        caption += "; crosses: at the grid's edge"
    style.legend(figure, handles, caption)
    return style.save(figure, config.out or config.run, "horizon")


def draw_against_gain(
    axes: Axes, best: pd.DataFrame, exponents: pd.DataFrame, ranks: Sequence[int], steps: Sequence[int]
) -> None:
    """Draw best rates against gamma r, with the constant-gradient law from the first point of each rank and horizon."""
    for colour, step in zip(style.COLOURS, steps, strict=False):
        for index, rank in enumerate(ranks):
            selected = best[(best["rank"] == rank) & (best["step"] == step)]
            if selected.empty:
                continue
            places = offset(selected["gain"], index, ranks)
            draw_best_rates(axes, places, selected, index, color=colour, linestyle="none")
            cross_out_bounds(axes, places, selected["best_rate"], selected["edge"])
            # The law gives the slope, and the first measured point the level.
            law = exponents[(exponents["at"] == rank) & (exponents["step"] == step)]
            for row in law.itertuples():
                start = selected.loc[selected["gain"] == row.first, "best_rate"].iloc[0]
                x = np.geomspace(row.first, row.second, 2)
                axes.plot(x, start * (x / row.first) ** row.law, color=colour, linewidth=0.8)
    style.integer_ticks(axes, style.apart(round(gain) for gain in best["gain"]))
    axes.set(yscale="log", xlabel=r"$G = \gamma r$", ylabel="best learning rate")


def draw_exponents(axes: Axes, exponents: pd.DataFrame, ranks: Sequence[int], steps: Sequence[int]) -> None:
    """Draw exponents against the number of steps with the range of the law."""
    # Range of the law over all ranks.
    law = exponents.groupby("step").agg({"law_low": "min", "law_high": "max"})
    axes.fill_between(law.index, law["law_low"], law["law_high"], color=style.BAND_COLOUR)
    # Measured exponents.
    for index, rank in enumerate(ranks):
        selected = exponents[exponents["at"] == rank].sort_values("step")
        if selected.empty:
            continue
        places = offset(selected["step"], index, ranks)
        bars = selected["half_width"].replace(np.inf, 0)
        look: dict[str, Any] = {"color": "black", "linewidth": 0.8}
        axes.errorbar(places, selected["exponent"], yerr=bars, marker=style.MARKERS[index], **look)
        cross_out_bounds(axes, places, selected["exponent"], selected["edge"])
    # Levels of the simple laws, for comparison.
    levels = {-1.0: "first step", -0.5: "A dominates", 0.0: "no change"}
    for level in levels:
        axes.axhline(level, color="black", linewidth=0.6, linestyle=(0, (3, 2)))
    # Label the levels outside the axes, where no error bar is.
    axes.secondary_yaxis("right").set_yticks(list(levels), list(levels.values()))
    style.integer_ticks(axes, steps)
    axes.set(xlabel="steps", ylabel=r"$d \log \eta^* / d \log G$", ylim=(-1.15, 0.15))


def offset(places: pd.Series, index: int, ranks: Sequence[int]) -> pd.Series:
    """Return positions on a logarithmic axis, shifted by the index of the rank, so that error bars do not overlap."""
    return places * 1.04 ** (index - (len(ranks) - 1) / 2)


def draw_best_rates(axes: Axes, x: pd.Series, selected: pd.DataFrame, index: int, **look: Any) -> None:
    """Draw best rates with one standard error, with the marker of the rank of this index."""
    error = 2 ** selected["log2_error"].fillna(0)
    bars = [selected["best_rate"] * (1 - 1 / error), selected["best_rate"] * (error - 1)]
    axes.errorbar(x, selected["best_rate"], yerr=bars, marker=style.MARKERS[index], **look)


def cross_out_bounds(axes: Axes, x: pd.Series, y: pd.Series, edge: pd.Series) -> None:
    """Cross out the points with a best rate at the end of its grid, which are bounds only."""
    style.cross_out(axes, x[edge.notna()], y[edge.notna()])


def draw_against_steps(axes: Axes, best: pd.DataFrame, ranks: Sequence[int]) -> None:
    """Draw the best rates of each rank and gamma r against the number of steps, with two reference slopes.

    Only the values of gamma r with the largest number of readings are drawn, so that few lines cross.
    """
    counts = best.groupby("gain")["step"].nunique()
    best = best[best["gain"].map(counts) == counts.max()]
    for (rank, gain), selected in best.groupby(["rank", "gain"]):
        index, colour = ranks.index(rank), "black" if gain == best["gain"].min() else "grey"
        places = offset(selected["step"], index, ranks)
        draw_best_rates(axes, places, selected, index, color=colour, linewidth=0.8)
        cross_out_bounds(axes, places, selected["best_rate"], selected["edge"])
    steps = np.array(sorted(set(best["step"])))
    # Reference slopes start at the geometric mean over the ranks.
    for gain, selected in best.groupby("gain"):
        start = np.exp(np.log(selected.loc[selected["step"] == steps[0], "best_rate"]).mean())
        for power, line in ((-1.0, (0, (3, 2))), (-0.5, (0, (1, 1)))):
            axes.plot(steps, start * (steps / steps[0]) ** power, color="black", linewidth=0.6, linestyle=line)
        # Left of the first point, where no bar is.
        axes.text(steps[0] / 1.15, start, f"G = {gain:g}", ha="right", va="center")
    style.integer_ticks(axes, steps.tolist())
    axes.set_xlim(left=steps[0] / (steps[-1] / steps[0]) ** 0.35)
    axes.margins(y=0.12)
    axes.set(
        yscale="log", xlabel="steps (dashes: as 1 / steps; dots: as 1 / root of steps)", ylabel="best learning rate"
    )


if __name__ == "__main__":
    style.command(draw_horizon, HorizonOptions, __doc__)
