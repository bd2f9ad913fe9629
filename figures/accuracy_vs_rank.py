"""Plot validation loss, its difference from LoRA and average accuracy against the rank, from sims.sweep.

python -m figures.accuracy_vs_rank RUN
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from figures import style
from figures.sweep import (
    at_best_rate,
    describe_seed_marks,
    diverged_handles,
    draw_levels,
    draw_line,
    measured_panels,
    model_name,
    offset,
    points,
    select_model,
)
from rora_theory.runs import frames
from rora_theory.validation.ranges import Positive, check_ranges
from rora_theory.validation.rules import check_unread

METHODS = ("lora", "dora", "rora", "dora-rora", "quarter")


@dataclass(frozen=True)
class AccuracyVsRankOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of sims.sweep."""
    model: str | None = None
    """Model, if the run has several."""
    alpha: Positive | None = None
    """Alpha, if a method and rank has several."""
    lr: Positive | None = None
    """Learning rate of the cells; required if a method has several, unless --tuned is given."""
    tuned: bool = False
    """Draw each method and rank at its best learning rate"""
    answers: bool = False
    """Draw the loss on the answers instead of the loss on all tokens"""
    name: str | None = None
    """Name of the model in the title; by default the name of its folder."""
    out: Path | None = None
    """Folder for accuracy_vs_rank.png and .svg; by default the run folder."""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_accuracy_vs_rank(config: AccuracyVsRankOptions) -> Sequence[Path]:
    """Draw the validation loss, its difference from LoRA and the average accuracy against the rank.

    Points are means over seeds with the standard error over items, dashes single seeds and the base model.
    """
    if config.tuned:
        check_unread(config, "lr", conflicts_with="--tuned")
    # Cells of one model and alpha, as one line for each method.
    manifest, rows = style.read_frame(config.run, "sweep")
    rows = select_model(config.run, rows, config.model, config.alpha)
    style.check_among("--lr", config.lr, rows.loc[rows["method"].isin(METHODS), "learning_rate"])
    panels = measured_panels(rows, config.answers)
    lines = {method: curves_of_method(config, rows, method) for method in METHODS}
    if all(cells.empty for cells in lines.values()):
        style.fail(f"{config.run}: has no cell of {', '.join(METHODS)}. Choose a run with at least one.")
    paired = differences(config, lines)
    # Panels: the loss, its paired difference from LoRA, and further measures.
    count = len(panels) + (not paired.empty)
    figure, axes = style.panels(count)
    if not paired.empty:
        draw_differences(axes[1], paired, config.answers)
        rank_axis(axes[1], lines)
    # A line for each method in every panel, moved apart so that error bars do not overlap.
    drawn_lines: list[Any] = []
    measured = [axes[0], *axes[1 + (not paired.empty) :]]
    for axis, (column, error, label, unit) in zip(measured, panels, strict=False):
        for method, cells in lines.items():
            line = points(cells, column, error, unit)
            drawn_lines.append(line)
            draw_line(axis, method, line, offset([point.place for point in line], METHODS.index(method) - 1))
        draw_levels(axis, rows, column, unit)
        axis.set_ylabel(label)
        rank_axis(axis, lines)
    # One legend below all panels.
    caption = run_title(manifest, pd.concat(lines.values()), config)
    style.legend(figure, style.named(axes) | diverged_handles(drawn_lines), caption + describe_seed_marks(drawn_lines))
    return style.save(figure, config.out or config.run, "accuracy_vs_rank")


def curves_of_method(config: AccuracyVsRankOptions, rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Return the cells of a method at one learning rate, or at the best one of each rank."""
    cells = rows[rows["method"] == method]
    if config.tuned:
        return at_best_rate(config.run, cells)
    rates = sorted(cells["learning_rate"].unique())
    if config.lr is None and len(rates) > 1:
        several = ", ".join(f"{rate:g}" for rate in rates)
        style.fail(f"{config.run}: {method} has the learning rates {several}. Choose one with --lr, or pass --tuned.")
    return cells if config.lr is None else cells[cells["learning_rate"] == config.lr]


def differences(config: AccuracyVsRankOptions, lines: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of differences.csv that compare the drawn cells with LoRA."""
    path = config.run / "differences.csv"
    if not path.exists():
        return pd.DataFrame()
    table = frames.read_csv(path, accepted="the file of a finished run")
    kinds = ("best",) if config.tuned else ("same", "own")
    table = table[(table["against"] == "lora") & table["rates"].isin(kinds)]
    if config.model is not None:
        table = table[table["model"] == config.model]
    # Keep the differences of which both cells are drawn.
    cell = ["method", "rank", "alpha", "learning_rate"]
    drawn = pd.concat(lines.values())[cell].drop_duplicates()
    lora = drawn[drawn["method"] == "lora"].set_axis(["against", "rank", "alpha", "against_rate"], axis=1)
    return table.merge(drawn, on=cell).merge(lora, on=list(lora))


def draw_differences(axis: Any, rows: pd.DataFrame, answers: bool) -> None:
    """Draw differences paired over records; their error bars are mostly smaller than the markers."""
    value, error = ("answer_loss", "answer_error") if answers else ("loss", "loss_error")
    for method in rows["method"].unique().tolist():
        selected = rows[rows["method"] == method].sort_values("rank", kind="stable")
        label, colour, marker = style.look(method)
        ranks = offset(selected["rank"].tolist(), METHODS.index(method) - 1)
        axis.errorbar(
            ranks, selected[value], yerr=selected[error], color=colour, marker=marker, label=label, elinewidth=0.8
        )
    axis.axhline(0.0, color=style.look("lora")[1], linewidth=0.9)
    axis.set_ylabel("less LoRA's, paired (nats)")


def rank_axis(axis: Any, lines: dict[str, pd.DataFrame]) -> None:
    """Label the axis with the ranks, and below each rank the scaling gamma of both rules."""
    cells = pd.concat(lines.values())
    # Scaling of both rules at each rank, for a second and a third line of labels.
    gammas: dict[str, dict[int, float]] = {}
    for rule, rank, gamma in zip(*(cells[name].tolist() for name in ("rule", "rank", "gamma")), strict=True):
        gammas.setdefault(rule, {})[rank] = gamma
    ranks = sorted({rank for known in gammas.values() for rank in known})
    # Ticks at the ranks that were run.
    axis.set_xscale("log", base=2)
    labels = ["\n".join([str(rank), *(_gamma(known.get(rank)) for known in gammas.values())]) for rank in ranks]
    axis.set_xticks(ranks, labels)
    axis.minorticks_off()
    names = [style.look(rule)[0].partition(", ")[2] for rule in gammas]
    axis.set_xlabel("rank $r$; below it " + " and ".join(rf"$\gamma$ = {name}" for name in names))


def _gamma(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def run_title(manifest: dict[str, Any], drawn: pd.DataFrame, config: AccuracyVsRankOptions) -> str:
    """Return a title that states how the drawn cells were trained and measured."""
    settings = manifest["config"]
    steps = next(iter(drawn["steps"].dropna()), "?")
    alphas, rates = (drawn[name].unique() for name in ("alpha", "learning_rate"))
    alpha = rf"$\alpha$ = {alphas[0]:g}" if len(alphas) == 1 else r"$\alpha$ varies"
    rate = f"lr {rates[0]:g}" if len(rates) == 1 else "lr varies"
    # A tuned grid has one rate for each cell.
    if config.tuned:
        edge = " (some at the grid's edge)" if (drawn["best_rate"] == "edge").any() else ""
        rate = f"best lr of a seed on these records{edge}"
    name = model_name(drawn["model"].iloc[0], config.name)
    return (
        f"{name}, {alpha}, {rate}, {steps} steps of {settings['training']['batch']}, "
        f"{settings['data']['held_out']} held-out records; bars: one standard error over items"
    )


if __name__ == "__main__":
    style.command(draw_accuracy_vs_rank, AccuracyVsRankOptions, __doc__)
