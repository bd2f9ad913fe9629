"""What figures of a run of sims.rank_sweep share: means over seeds, their lines, and the levels beside them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from figures import style

PALE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


@dataclass(frozen=True)
class Point:
    """One method at one rank or learning rate: the mean over seeds.

    Attributes:
      place: the rank or learning rate.
      value: mean over the seeds.
      error: standard error from the items (records) measured on, the same in every seed.
      seeds: each seed's own value.
      diverged: how many further seeds have none, because the loss became no number. Where that is all of them, the
        value is NaN.
    """

    place: float
    value: float
    error: float
    seeds: tuple[float, ...]
    diverged: int


def chosen_model(run: Path, rows: pd.DataFrame, model: str | None, alpha: float | None) -> pd.DataFrame:
    """Finished cells of one model, and of one alpha for each method and rank; other than that ends the command."""
    models = rows["model"].unique().tolist()
    if model is None and len(models) > 1:
        style.fail(f"{run}: has the models {', '.join(models)}; accepted is --model with one of them")
    model = models[0] if model is None else model
    style.check_among("--model", model, models)
    found = rows[(rows["model"] == model) & rows["status"].isin(("complete", "diverged"))]
    style.check_among("--alpha", alpha, found["alpha"].dropna())
    if alpha is not None:
        found = found[found["alpha"].isna() | (found["alpha"] == alpha)]
    if not (found["learning_rate"].notna() & (found["status"] == "complete")).any():
        style.fail(f"{run}/results.csv: has no finished cell of an adapter; accepted is a run with at least one")
    for (method, rank), alphas in found.groupby(["method", "rank"], sort=False)["alpha"]:
        if alphas.nunique() > 1:
            several = ", ".join(f"{alpha:g}" for alpha in sorted(alphas.unique()))
            style.fail(f"{run}: {method} r={rank} has alpha {several}; accepted is --alpha with one of them")
    return found


def chosen_rank(run: Path, rows: pd.DataFrame, rank: int | None) -> int | None:
    """The rank that is asked for, or a run's only one; None where none has a rank. Other than that ends the command."""
    ranks = sorted(rows["rank"].dropna().unique().tolist())
    rank = ranks[0] if rank is None and len(ranks) == 1 else rank
    if ranks and rank not in ranks:
        style.fail(f"{run}: has the ranks {', '.join(map(str, ranks))}; accepted is --rank with one of them")
    return rank if ranks else None


def check_columns(path: Path, rows: pd.DataFrame, names: Iterable[str]) -> None:
    """End the command where a table of an earlier version lacks a column."""
    if missing := [name for name in names if name not in rows]:
        style.fail(f"{path}: has no column {missing[0]}; accepted is a run that sims.rank_sweep went through again")


def at_best_rate(run: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """The cells at the best learning rate of their model, method, rank and alpha, every seed's."""
    check_columns(run / "results.csv", rows, ["best_rate"])
    return rows[rows["best_rate"].notna()]


def model_name(model: str, name: str | None = None) -> str:
    """A model's short name: the one given, or that of its folder; of a run's ``model`` or ``merged`` the run's."""
    if name is not None:
        return name
    path = Path(model)
    return path.parent.name if path.name in ("model", "merged") and path.parent.name else path.name


def points(cells: pd.DataFrame, column: str, error: str, unit: float, by: str = "rank") -> list[Point]:
    """A method's means over seeds by rank or learning rate, where the column was measured."""
    found = []
    for place in sorted(cells[by].unique().tolist()):
        group = cells[cells[by] == place]
        measured = group[(group["status"] == "complete") & group[column].notna()]
        diverged = int((group["status"] == "diverged").sum())
        if len(measured) or diverged:
            values, errors = ((unit * measured[name]).tolist() for name in (column, error))
            found.append(Point(place, mean(values), mean(errors), tuple(values), diverged))
    return found


def measures(rows: pd.DataFrame, answers: bool) -> list[tuple[str, str, str, float]]:
    """What was measured, a panel each: the columns of the value and its error, the axis label and the unit."""
    loss = "answer" if answers else "validation"
    found = [(f"{loss}_loss", f"{loss}_error", f"{loss} loss per token (nats)", 1.0)]
    scored = rows.loc[rows["average"].notna() & rows["learning_rate"].notna(), "protocol"]
    if len(scored):
        found.append(("average", "average_error", f"average accuracy, {scored.iloc[0]} (%)", 100.0))
    return found


def beside(places: Sequence[float], position: int) -> list[float]:
    """Where a line's points are drawn on a logarithmic axis: side by side, so that bars do not hide each other."""
    return [place * 2.0 ** (0.06 * position) for place in places]


def draw_line(axis: Any, method: str, line: Sequence[Point], places: Sequence[float], size: float = 3.5) -> None:
    """Mean and error bar at each place; the single seeds beside, where there are several."""
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
        if point.diverged and point.seeds:
            axis.plot([place], [point.value], marker, color=colour, markerfacecolor="white", zorder=3)
        elif point.diverged:
            axis.plot([place], [0.98], "x", color=colour, transform=axis.get_xaxis_transform())
        if len(point.seeds) > 1:
            axis.plot([place] * len(point.seeds), point.seeds, "_", color=colour, markersize=5, alpha=0.7)


def marks(lines: Iterable[Sequence[Point]]) -> dict[str, Any]:
    """Handles of the marks that lines have beside mean and bar: what diverged."""
    every = [point for line in lines for point in line]
    found = {
        "some seeds diverged": ("o", any(point.diverged and point.seeds for point in every)),
        "all seeds diverged": ("x", any(point.diverged and not point.seeds for point in every)),
    }
    return {
        label: plt.Line2D([], [], color="#555555", marker=marker, markerfacecolor="white", linestyle="none")
        for label, (marker, there) in found.items()
        if there
    }


def seeds_in_words(lines: Iterable[Sequence[Point]]) -> str:
    """The end of a title where single seeds are drawn, so that the legend needs no entry for them."""
    return "; short dashes: a single seed" if any(len(point.seeds) > 1 for line in lines for point in line) else ""


def levels(axis: Any, rows: pd.DataFrame, column: str, unit: float) -> None:
    """Dashes: the model without an adapter; a level far from the lines is named at the edge. Dots: chance."""
    bases = rows[(rows["method"] == "base") & rows[column].notna()]
    if bases.empty:
        return
    label, colour, _ = style.look("base")
    found = [(unit * bases[column].iloc[0], label, colour, "--")]
    if column == "average" and bases["average_chance"].notna().iloc[0]:
        found.append((unit * bases["average_chance"].iloc[0], "chance", "#777777", ":"))
    low, high = axis.get_ylim()
    beyond = 2 * (high - low) if axis.get_autoscaley_on() else 0.0  # how far the axis may be stretched
    for value, name, shade, dashes in found:
        if low - beyond <= value <= high + beyond:
            axis.axhline(value, color=shade, linestyle=dashes, linewidth=0.9, label=name)
        else:
            edge, side = (0.98, "top") if value > high else (0.02, "bottom")
            room = 0.12 * (high - low) if axis.get_autoscaley_on() else 0.0  # for the name, beside the lines
            axis.set_ylim(low if value > high else low - room, high + room if value > high else high)
            text = f"{name}: {value:.3g} ({'above' if value > high else 'below'})"
            axis.text(
                0.03, edge, text, transform=axis.transAxes, ha="left", va=side, fontsize=7, color=shade, bbox=PALE
            )


def mean(values: Sequence[float]) -> float:
    """NaN where there are none."""
    return math.fsum(values) / len(values) if values else math.nan
