"""Plot the accuracy of each method, and paired differences from the base model and from LoRA, from sims.sweep.

python -m figures.accuracy RUN
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from figures import style
from figures.sweep import SCORED, at_best_rate, mean, model_name, select_model, select_rank
from rora_theory.lab.data.tasks import TASKS
from rora_theory.runs import frames
from rora_theory.validation.ranges import Count, check_ranges

METHOD_SPACING = 0.13
"""Distance of two methods of one task, in units of the distance of two tasks."""


@dataclass(frozen=True)
class AccuracyOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of sims.sweep."""
    rank: Count | None = None
    """Rank of the methods that have one; not needed if the run has a single rank."""
    model: str | None = None
    """Model, if the run has several."""
    name: str | None = None
    """Name of the model in the title; by default the name of its folder."""
    out: Path | None = None
    """Folder for accuracy.png and .svg; by default the run folder."""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_accuracy(config: AccuracyOptions) -> Sequence[Path]:
    """Draw accuracies at each method's best rate (top) and paired differences from the base model and LoRA (bottom)."""
    manifest, rows = style.read_frame(config.run, "sweep")
    # Cells of one model and rank, each method at its best rate.
    rows = select_model(config.run, rows, config.model, None)
    best = at_best_rate(config.run, rows)
    rank = select_rank(config.run, best, config.rank)
    best = best[(best["rank"].isna() | (best["rank"] == rank)) & best["average"].notna()]
    base = rows[(rows["method"] == "base") & rows["average"].notna()]
    drawn = [name for name in style.METHODS if (best["method"] == name).any()]
    if base.empty or not drawn:
        style.fail(f"{config.run}: must have accuracies of the base model and of an adapter. Score both.")
    tasks = [task for task in TASKS if base[task].notna().iloc[0]]
    columns = [*tasks, "average"]
    # Paired differences from the base model and from LoRA, for the lower panel.
    gained = frames.read_csv(config.run / "differences.csv")
    frames.check_columns(config.run / "differences.csv", gained, columns, advice=SCORED)
    gained = gained[(gained["model"] == base["model"].iloc[0]) & (gained["rank"].isna() | (gained["rank"] == rank))]
    figure, (top, bottom) = style.panels(2, sharex=True)
    # Top: accuracy of each method by task.
    for place, method in enumerate(["base", *drawn]):
        selected = base if method == "base" else best[best["method"] == method]
        label, colour, marker = style.look(method)
        shift = METHOD_SPACING * (place - len(drawn) / 2)
        values, errors = (
            [100 * mean(selected[f"{name}{part}"].tolist()) for name in columns] for part in ("", "_error")
        )
        x = [position + shift for position in range(len(columns))]
        top.errorbar(x, values, errors, color=colour, marker=marker, linestyle="none", markersize=4, label=label)
        # Bottom: gain over the base model (filled) and over LoRA (open), of the cells drawn above.
        for against, face in (("base", colour), ("lora", "white")):
            pair = gained[(gained["method"] == method) & (gained["against"] == against)]
            pair = pair[pair["learning_rate"].isin(selected["learning_rate"]) & pair["average"].notna()]
            if against != "base":
                pair = pair[pair["against_rate"].isin(best.loc[best["method"] == against, "learning_rate"])]
            if pair.empty:
                continue
            row = pair.iloc[0]
            values, errors = ([100 * row[f"{name}{part}"] for name in columns] for part in ("", "_error"))
            x = [position + shift + (0.05 if against == "lora" else 0.0) for position in range(len(columns))]
            bottom.errorbar(
                x, values, errors, color=colour, marker=marker, markerfacecolor=face, linestyle="none", markersize=4
            )
    bottom.axhline(0, color="black", linewidth=0.6)
    # Chance level, labels and legend.
    top.axhline(100 * base["average_chance"].iloc[0], color="#777777", linestyle=":", label="chance, of the average")
    names = [TASKS[task].name for task in tasks] + ["average"]
    for axis, text in ((top, f"accuracy, {base['protocol'].iloc[0]} (%)"), (bottom, "paired difference (points)")):
        axis.set_xticks(range(len(columns)), names)
        axis.set(ylabel=text, xlim=(-0.5, len(columns) - 0.5))
    handles = style.named([top]) | {
        text: plt.Line2D([], [], color="#555555", marker="o", linestyle="none", markerfacecolor=face)
        for text, face in (("minus the base model", "#555555"), ("minus LoRA", "white"))
    }
    batch, steps = manifest["config"]["training"]["batch"], int(best["steps"].iloc[0])
    title = (
        f"{model_name(base['model'].iloc[0], config.name)}"
        + (f", r = {rank}" if rank else "")
        + f", {steps} steps of {batch}; "
        "bars: one standard error, over items (top) and of the paired difference (bottom)"
    )
    style.legend(figure, handles, title)
    return style.save(figure, config.out or config.run, "accuracy")


if __name__ == "__main__":
    style.command(draw_accuracy, AccuracyOptions, __doc__)
