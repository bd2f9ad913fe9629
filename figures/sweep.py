"""Shared parts of the figures of sims.sweep: means over seeds, their lines, and reference levels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from figures import style
from rora_theory.defaults import MODEL_NAMES
from rora_theory.runs import frames

PALE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
SCORED = "Choose a run of sims.sweep that scored it."
"""Advice of the error about a table without a column of scores."""


@dataclass(frozen=True)
class Point:
    """Mean over seeds of one method at one rank or learning rate.

    Attributes:
      place: Rank or learning rate.
      value: Mean over the seeds; NaN if all seeds diverged.
      error: Standard error over the items or records, which all seeds share.
      seeds: Values of the single seeds.
      diverged: Number of further seeds whose loss became non-finite.
    """

    place: float
    value: float
    error: float
    seeds: tuple[float, ...]
    diverged: int


def select_model(run: Path, rows: pd.DataFrame, model: str | None, alpha: float | None) -> pd.DataFrame:
    """Return the finished cells of one model, with one alpha for each method and rank, or end the command."""
    # One model, by the option if there are several.
    models = rows["model"].unique().tolist()
    if model is None and len(models) > 1:
        style.fail(f"{run}: has the models {', '.join(models)}. Choose one with --model.")
    model = models[0] if model is None else model
    style.check_among("--model", model, models)
    cells = rows[(rows["model"] == model) & rows["status"].isin(("complete", "diverged"))]
    # One alpha for each method and rank, by the option if there are several.
    style.check_among("--alpha", alpha, cells["alpha"].dropna())
    if alpha is not None:
        cells = cells[cells["alpha"].isna() | (cells["alpha"] == alpha)]
    if not (cells["learning_rate"].notna() & (cells["status"] == "complete")).any():
        style.fail(f"{run}/results.csv: has no finished cell of an adapter. Choose a run with at least one.")
    for (method, rank), alphas in cells.groupby(["method", "rank"], sort=False)["alpha"]:
        if alphas.nunique() > 1:
            several = ", ".join(f"{alpha:g}" for alpha in sorted(alphas.unique()))
            style.fail(f"{run}: {method} r={rank} has alpha {several}. Choose one with --alpha.")
    return cells


def select_rank(run: Path, rows: pd.DataFrame, rank: int | None) -> int | None:
    """Return the selected rank or the only rank of a run, None if no cell has a rank, or end the command."""
    ranks = sorted(rows["rank"].dropna().unique().tolist())
    rank = ranks[0] if rank is None and len(ranks) == 1 else rank
    if ranks and rank not in ranks:
        style.fail(f"{run}: has the ranks {', '.join(map(str, ranks))}. Choose one with --rank.")
    return rank if ranks else None


def at_best_rate(run: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of all seeds at the best learning rate of their model, method, rank and alpha."""
    frames.check_columns(run / "results.csv", rows, ["best_rate"], advice=SCORED)
    return rows[rows["best_rate"].notna()]


def model_name(model: str, name: str | None = None) -> str:
    """Return the short name of a model: the given one, its name in words, or that of its folder or run."""
    if name is not None:
        return name
    path = Path(model)
    if model in MODEL_NAMES:
        return MODEL_NAMES[model]
    return path.parent.name if path.name in ("model", "merged") and path.parent.name else path.name


def points(cells: pd.DataFrame, column: str, error: str, unit: float, by: str = "rank") -> list[Point]:
    """Return the means over seeds of a method by rank or learning rate, where the column was measured."""
    means = []
    for place in sorted(cells[by].unique().tolist()):
        group = cells[cells[by] == place]
        # Means over the seeds that finished; diverged ones are counted, to be marked.
        measured = group[(group["status"] == "complete") & group[column].notna()]
        diverged = int((group["status"] == "diverged").sum())
        if len(measured) or diverged:
            values, errors = ((unit * measured[name]).tolist() for name in (column, error))
            means.append(Point(place, mean(values), mean(errors), tuple(values), diverged))
    return means


def measured_panels(rows: pd.DataFrame, answers: bool) -> list[tuple[str, str, str, float]]:
    """Return the measures of a run: columns of the value and its error, axis label, and unit."""
    loss = "answer" if answers else "validation"
    panels = [(f"{loss}_loss", f"{loss}_error", f"{loss} loss\n(nats per token)", 1.0)]
    scored = rows.loc[rows["average"].notna() & rows["learning_rate"].notna(), "protocol"]
    if len(scored):
        panels.append(("average", "average_error", f"average accuracy,\n{scored.iloc[0]} (%)", 100.0))
    return panels


def offset(places: Sequence[float], position: int) -> list[float]:
    """Return positions on a logarithmic axis, shifted by the index of the line, so that error bars do not overlap."""
    return [place * 2.0 ** (0.06 * position) for place in places]


def draw_line(axis: Any, method: str, line: Sequence[Point], places: Sequence[float], size: float = 3.5) -> None:
    """Draw mean and error bar at each position, and the single seeds if there are several."""
    if not line:
        return
    label, colour, marker = style.look(method)
    axis.errorbar(
        places,
        [point.value for point in line],
        yerr=[point.error for point in line],
        color=colour,
        marker=marker,
        label=label,
        linewidth=1.2,
        elinewidth=0.8,
        markersize=size,
    )
    for place, point in zip(places, line, strict=True):
        # Open marker: some seeds diverged. Cross at the upper edge: all did.
        if point.diverged and point.seeds:
            axis.plot([place], [point.value], marker, color=colour, markerfacecolor="white", zorder=3)
        elif point.diverged:
            axis.plot([place], [0.98], "x", color=colour, transform=axis.get_xaxis_transform())
        # Single seeds as dashes.
        if len(point.seeds) > 1:
            axis.plot([place] * len(point.seeds), point.seeds, "_", color=colour, markersize=5, alpha=0.7)


def diverged_handles(lines: Iterable[Sequence[Point]]) -> dict[str, Any]:
    """Return the legend handles of marks for diverged seeds."""
    all_points = [point for line in lines for point in line]
    marks_by_label = {
        "some seeds diverged": ("o", any(point.diverged and point.seeds for point in all_points)),
        "all seeds diverged": ("x", any(point.diverged and not point.seeds for point in all_points)),
    }
    return {
        label: plt.Line2D([], [], color="#555555", marker=marker, markerfacecolor="white", linestyle="none")
        for label, (marker, there) in marks_by_label.items()
        if there
    }


def describe_seed_marks(lines: Iterable[Sequence[Point]]) -> str:
    """Return the end of a title that explains the marks of single seeds; empty if none are drawn."""
    return "; short dashes: a single seed" if any(len(point.seeds) > 1 for line in lines for point in line) else ""


def draw_levels(axis: Any, rows: pd.DataFrame, column: str, unit: float) -> None:
    """Draw the base model as dashes and chance as dots; a level far from the lines is stated at the edge."""
    bases = rows[(rows["method"] == "base") & rows[column].notna()]
    if bases.empty:
        return
    label, colour, _ = style.look("base")
    lines = [(unit * bases[column].iloc[0], label, colour, "--")]
    if column == "average" and bases["average_chance"].notna().iloc[0]:
        lines.append((unit * bases["average_chance"].iloc[0], "chance", "#777777", ":"))
    # A level far from the lines would flatten them, so it is stated as text.
    low, high = axis.get_ylim()
    beyond = 2 * (high - low) if axis.get_autoscaley_on() else 0.0  # how far the axis may be stretched
    for value, name, shade, dashes in lines:
        if low - beyond <= value <= high + beyond:
            axis.axhline(value, color=shade, linestyle=dashes, linewidth=0.9, label=name)
        else:
            edge, side = (0.98, "top") if value > high else (0.02, "bottom")
            room = 0.12 * (high - low) if axis.get_autoscaley_on() else 0.0  # for the name, beside the lines
            axis.set_ylim(low if value > high else low - room, high + room if value > high else high)
            text = f"{name}: {value:.3g} ({'above' if value > high else 'below'})"
            axis.text(0.03, edge, text, transform=axis.transAxes, ha="left", va=side, color=shade, bbox=PALE)


def mean(values: Sequence[float]) -> float:
    """Return the mean of values; NaN if there are none."""
    return math.fsum(values) / len(values) if values else math.nan
