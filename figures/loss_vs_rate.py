"""Plot validation loss and average accuracy of each method against the learning rate, from sims.sweep.

python -m figures.loss_vs_rate RUN --rank 32
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from figures import style
from figures.sweep import (
    describe_seed_marks,
    diverged_handles,
    draw_levels,
    draw_line,
    measured_panels,
    model_name,
    points,
    select_model,
    select_rank,
)
from rora_theory.validation.ranges import Count, Positive, check_ranges


@dataclass(frozen=True)
class LossVsRateOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of sims.sweep."""
    rank: Count | None = None
    """Rank of the methods that have one; not needed if the run has a single rank."""
    model: str | None = None
    """Model, if the run has several."""
    alpha: Positive | None = None
    """Alpha, if a method and rank has several."""
    answers: bool = False
    """Draw the loss on the answers instead of the loss on all tokens"""
    top: Positive | None = None
    """Upper end of the loss axis, which cuts lines off; by default all losses are shown."""
    name: str | None = None
    """Name of the model in the title; by default the name of its folder."""
    out: Path | None = None
    """Folder for loss_vs_rate.png and .svg; by default the run folder."""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_loss_vs_rate(config: LossVsRateOptions) -> Sequence[Path]:
    """Draw the validation loss and the average accuracy against the learning rate.

    Points are means over seeds with the standard error over items, dashes single seeds, crosses diverged runs.
    """
    manifest, rows = style.read_frame(config.run, "sweep")
    rows = select_model(config.run, rows, config.model, config.alpha)
    rank = select_rank(config.run, rows, config.rank)
    rows = rows[rows["rank"].isna() | (rows["rank"] == rank)]
    trained = rows[rows["learning_rate"].notna()]
    # The loss always has a panel; a further measure needs values at several rates.
    loss, *further = measured_panels(rows, config.answers)
    panels = [loss, *(panel for panel in further if trained.dropna(subset=panel[0])["learning_rate"].nunique() > 1)]
    drawn = [name for name in style.METHODS if (trained["method"] == name).any()]
    rates = sorted(trained["learning_rate"].unique().tolist())
    figure, axes = style.panels(len(panels), sharex=True)
    lines: list[Any] = []
    for axis, (column, error, label, unit) in zip(axes, panels, strict=True):
        for earlier, method in enumerate(drawn):
            cells = trained[trained["method"] == method]
            # Earlier methods have larger markers, so that they stay visible below equal values.
            marker_size = 3.5 + 0.7 * (len(drawn) - 1 - earlier)
            line = points(cells, column, error, unit, by="learning_rate")
            draw_line(axis, method, line, [point.place for point in line], marker_size)
            lines.append(line)
        if config.top is not None and axis is axes[0]:
            axis.set_ylim(top=config.top)
        draw_levels(axis, rows, column, unit)
        axis.set(xscale="log", ylabel=label)
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
    axes[-1].set_xlabel("learning rate")
    # Settings of the runs, for the legend.
    title = (
        model_name(rows["model"].iloc[0], config.name)
        + (f", r = {rank}" if rank else "")
        + f", {trained['steps'].iloc[0]} steps of {manifest['config']['training']['batch']}; bars: one standard "
        "error over items"
    )
    style.legend(figure, style.named(axes) | diverged_handles(lines), title + describe_seed_marks(lines))
    return style.save(figure, config.out or config.run, "loss_vs_rate")


if __name__ == "__main__":
    style.command(draw_loss_vs_rate, LossVsRateOptions, __doc__)
