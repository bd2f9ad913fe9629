"""Best rate against gamma r, and its exponent against the horizon, beside the law: a run of sims.horizon."""

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
from rora_theory import frames


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.horizon, finished with --regime."""
    out: Path | None = None
    """Folder for horizon.png and .svg; by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """Left the best rates with the law's line from the first, in the middle their exponents with its range, right the
    best rates against the steps."""
    style.read_frame(config.run, "horizon")
    best, exponents = (frames.read_csv(config.run / name) for name in ("best.csv", "exponents.csv"))
    best = best[best["rank"].notna()]  # full fine-tuning has no gamma r
    exponents = exponents[exponents["over"] == "strength"]
    if exponents.empty:
        style.fail(f"{config.run}: no rank has two strengths with a best rate; accepted is a run that has")
    ranks, steps = sorted(set(best["rank"])), sorted(set(best["step"]))
    figure, (left, right, last) = plt.subplots(1, 3, figsize=(9.6, 3.1))
    for place, step in enumerate(steps):
        colour = style.COLOURS[place]
        for index, rank in enumerate(ranks):
            own = best[(best["rank"] == rank) & (best["step"] == step)]
            if own.empty:
                continue
            x = own["strength"] * 1.03 ** (index - (len(ranks) - 1) / 2)
            best_rates(left, x, own, index, color=colour, linestyle="none", label=f"{step} steps, r = {rank}")
            at_edge = own[own["edge"].notna()]
            left.plot(at_edge["strength"], at_edge["best_rate"], "x", color="black", markersize=6)
            law = exponents[(exponents["at"] == rank) & (exponents["step"] == step)]
            for row in law.itertuples():
                start = own.loc[own["strength"] == row.first, "best_rate"].iloc[0]
                x = np.geomspace(row.first, row.second, 2)
                left.plot(x, start * (x / row.first) ** row.law, color=colour, linewidth=0.8)
    style.whole_ticks(left, (round(strength) for strength in best["strength"]))
    left.set(yscale="log", xlabel=r"$\gamma r$", ylabel="best learning rate")
    law = exponents.groupby("step").agg({"law_low": "min", "law_high": "max"})
    right.fill_between(law.index, law["law_low"], law["law_high"], color=style.BAND_COLOUR)
    for index, rank in enumerate(ranks):
        own = exponents[exponents["at"] == rank].sort_values("step")
        if own.empty:
            continue
        right.errorbar(
            own["step"] * 1.04 ** (index - (len(ranks) - 1) / 2),
            own["exponent"],
            yerr=own["half_width"].replace(np.inf, 0),
            color=style.COLOURS[index + 3],
            marker=style.MARKERS[index],
            label=f"r = {rank}",
        )
        if "by_parts" in own and own["by_parts"].notna().any():
            right.plot(
                own["step"] * 1.04 ** (index - (len(ranks) - 1) / 2),
                own["by_parts"],
                linestyle="none",
                marker="_",
                markersize=11,
                markeredgewidth=1.6,
                color=style.COLOURS[index + 3],
                label=f"by the measured parts, r = {rank}",
            )
    for level, text in ((-1.0, "first step's law"), (-0.5, "A leads"), (0.0, "nothing to change")):
        right.axhline(level, color="black", linewidth=0.6, linestyle=(0, (3, 2)))
        right.text(steps[0], level + 0.02, text, fontsize=6)
    style.whole_ticks(right, steps)
    right.set(xlabel="steps", ylabel=r"$d \log \eta^* / d \log(\gamma r)$", ylim=(-1.15, 0.15))
    against_steps(last, best, ranks)
    handles = style.named([left, right]) | {"the law, over the modules": style.band_handle()}
    words = "bars of rates ± one s.e., of exponents 95%; lines left: the law from the first point on"
    if best["edge"].notna().any():
        words += "; crosses: at the grid's edge"
    style.legend(figure, handles, words)
    return style.save(figure, config.out or config.run, "horizon")


def best_rates(axes: Axes, x: pd.Series, own: pd.DataFrame, place: int, **look: Any) -> None:
    """Best rates of the rank in this place, with one standard error."""
    error = 2 ** own["log2_error"].fillna(0)
    bars = [own["best_rate"] * (1 - 1 / error), own["best_rate"] * (error - 1)]
    axes.errorbar(x, own["best_rate"], yerr=bars, marker=style.MARKERS[place], **look)


def against_steps(axes: Axes, best: pd.DataFrame, ranks: Sequence[int]) -> None:
    """The best rates of every rank and gamma r against the number of steps, between two straight lines."""
    for (rank, strength), own in best.groupby(["rank", "strength"]):
        place, colour = ranks.index(rank), "black" if strength == best["strength"].min() else "grey"
        x = own["step"] * 1.04 ** (place - (len(ranks) - 1) / 2)
        best_rates(axes, x, own, place, color=colour, linewidth=0.8)
    steps = np.array(sorted(set(best["step"])))
    for strength, own in best.groupby("strength"):
        start = np.exp(np.log(own.loc[own["step"] == steps[0], "best_rate"]).mean())
        for power, line in ((-1.0, (0, (3, 2))), (-0.5, (0, (1, 1)))):
            axes.plot(steps, start * (steps / steps[0]) ** power, color="black", linewidth=0.6, linestyle=line)
        axes.text(steps[0], start * 1.25, rf"$\gamma r$ = {strength:g}", fontsize=6)
    axes.text(0.02, 0.02, "dashes: as 1 / steps; dots: as 1 / root of steps", transform=axes.transAxes, fontsize=6)
    style.whole_ticks(axes, steps)
    axes.margins(y=0.12)
    axes.set(yscale="log", xlabel="steps", ylabel="best learning rate")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
