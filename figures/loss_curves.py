"""Plot training and validation loss against steps, from runs of sims.finetune or cells of sims.sweep.

    python -m figures.loss_curves RUN [RUN ...] --labels LoRA RoRA DoRA
    python -m figures.loss_curves SWEEP --rank 128

The first command draws runs, the second the cells of a sweep at one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import MaxNLocator

from figures import style
from rora_theory.runs import files
from rora_theory.runs.journal import read_entries
from rora_theory.validation.ranges import Count, Natural, Positive, check_ranges
from rora_theory.validation.rules import check_unread


@dataclass(frozen=True)
class LossCurvesOptions:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, style.RUN_FOLDERS]
    """Run folders of sims.finetune, cell folders of sims.sweep, or its run folder."""
    rank: Count | None = None
    """Rank of the cells of a sweep."""
    seed: Natural | None = None
    """Seed of the cells of a sweep; by default the first."""
    lr: Positive | None = None
    """Learning rate of the cells of a sweep; by default all."""
    labels: tuple[str, ...] = ()
    """Names of the runs; by default method, rule and rank, and the learning rate if it differs."""
    smooth: Count = 10
    """Number of steps averaged in the line; faint points show the loss of each step."""
    out: Path | None = None
    """Folder for loss_curves.png and .svg; by default the first run's."""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_loss_curves(config: LossCurvesOptions) -> Sequence[Path]:
    """Draw training loss (points, running mean as lines) and validation loss (markers) against the step."""
    if not config.runs:
        style.fail("runs must be one or more run folders of sims.finetune or sims.sweep, got none")
    if not any(map(is_sweep, config.runs)):
        check_unread(config, "rank", "seed", "lr", requires="the run folder of a sweep")
    # One curve for each run, or for each selected cell of a sweep.
    folders = [cell for run in config.runs for cell in run_folders(run, config)]
    if config.labels and len(config.labels) != len(folders):
        style.fail(f"--labels must have one name for each of the {len(folders)} runs, got {len(config.labels)}")
    runs = [read_events(folder) for folder in folders]
    # Without labels, runs are named by the settings in which they differ.
    names = config.labels or run_names([settings for settings, _ in runs])
    figure, axis = plt.subplots(figsize=(3.6, 2.8))
    title = "points: single batches; lines: their running mean"
    curves = zip(choose_looks([settings for settings, _ in runs]), names, runs, strict=True)
    for number, ((colour, marker), label, (_, events)) in enumerate(curves):
        dashes = "--" if number % 2 else "-"  # of two equal lines, the earlier one shows between the dashes
        # Single batches are noisy: faint points, with their running mean as a line.
        steps, losses = event_points(events, "step")
        axis.plot(steps, losses, ".", color=colour, alpha=0.3, markersize=3, markeredgewidth=0)
        width = min(config.smooth, max(1, len(losses) // 4))
        axis.plot(*running_mean(steps, losses, width), color=colour, label=label, linestyle=dashes)
        steps, losses = event_points(events, "validation")
        if len(steps):
            axis.plot(
                steps, losses, marker, color=colour, markerfacecolor="white", label=f"{label}, validation", zorder=3
            )
    axis.set_xlabel("step")
    axis.set_ylabel("loss per token (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(figure, style.named([axis]), title)
    return style.save(figure, config.out or config.runs[0], "loss_curves")


def is_sweep(run: Path) -> bool:
    """Return whether a folder is the run folder of a sweep."""
    return (run / "results.csv").exists() and (run / "cells").is_dir()


def run_folders(run: Path, config: LossCurvesOptions) -> list[Path]:
    """Return a run's folder, or the folders of the selected cells of a sweep in the order of its table."""
    if not is_sweep(run):
        return [run]
    _, rows = style.read_frame(run, "sweep")
    rows = rows[rows["rank"].notna()]
    if rows.empty:
        style.fail(f"{run}/results.csv: has no cell with a rank. Choose a sweep with at least one.")
    # Each option selects among the cells that the ones before it have left.
    for option, column, value in (
        ("--rank", "rank", config.rank),
        ("--lr", "learning_rate", config.lr),
        ("--seed", "seed", config.seed),
    ):
        style.check_among(option, value, rows[column])  # among the cells selected so far
        chosen = rows["seed"].min() if option == "--seed" and value is None else value
        rows = rows if chosen is None else rows[rows[column] == chosen]
    return [files.resolve_inside(run / "cells", key, where=run / "results.csv") for key in rows["key"]]


def read_events(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings and events of a run or cell; an incomplete last line is left out.

    A missing or damaged file ends the command.
    """
    # A cell has its settings in a file of its own, a run in its manifest.
    cell = run / "cell.json"
    try:
        settings = files.read_json(cell if cell.exists() else run / "manifest.json")
        # A cell names its method and rate as the table of its sweep does.
        settings = settings | {"lr": settings["rate"]} if cell.exists() else settings["config"]
        events = read_entries(run / "metrics.jsonl")
    except (OSError, ValueError, TypeError, KeyError) as error:
        style.fail(f"{run}: is not a run folder ({error}). Choose a folder with manifest.json and metrics.jsonl.")
    if not any(event.get("event") == "step" for event in events):
        style.fail(f"{run}/metrics.jsonl: has no steps. Choose a run with at least one.")
    return settings, events


def choose_looks(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the colour and marker of each run: by method, or by position if two runs have the same method."""
    methods = [_method(settings) for settings in runs]
    if len(set(methods)) == len(methods):
        return [style.look(method, position)[1:] for position, method in enumerate(methods, start=4)]
    return [
        (style.COLOURS[i % len(style.COLOURS)], style.MARKERS[i % len(style.MARKERS)]) for i, _ in enumerate(methods)
    ]


def _method(settings: dict[str, Any]) -> str:
    """Return the name of a method in figures, in which LoRA with RoRA's rule is RoRA."""
    if "rule" not in settings:
        return str(settings["method"])  # the name of a cell's method
    kind, rule = settings["method"], str(settings["rule"]).replace("rslora", "rora")
    if kind == "lora":
        return rule
    return {("dora", "lora"): "dora", ("dora", "rora"): "dora-rora"}.get(
        (kind, rule), f"dora, kappa = {rule}" if kind == "dora" else kind
    )


def run_names(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of runs, with the learning rate where two names would be equal."""
    plain = [run_name(settings) for settings in runs]
    peaks = [settings["lr"] for settings in runs]
    rates = set(zip(plain, peaks, strict=True))
    several = {label for label in plain if sum(label == known for known, _ in rates) > 1}
    return [
        f"{label}, lr {peak:g}" if label in several and peak else label
        for label, peak in zip(plain, peaks, strict=True)
    ]


def run_name(settings: dict[str, Any]) -> str:
    """Return the name of a run: the label of its method and its rank."""
    label = style.look(_method(settings))[0]
    has_rank = settings["rank"] is not None and settings["method"] not in ("prefix", "series", "parallel", "full")
    return f"{label}, r = {settings['rank']}" if has_rank else label


def event_points(events: list[dict[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and losses of one kind of event."""
    with files.naming_damage("metrics.jsonl"):
        chosen = [(event["step"], event["loss"]) for event in events if event.get("event") == kind]
        values = np.array(chosen, float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def running_mean(steps: np.ndarray, losses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute means over windows of ``width`` steps, each at the middle of its window."""
    width = min(max(width, 1), len(losses))
    kernel = np.full(width, 1 / width)
    return np.convolve(steps, kernel, "valid"), np.convolve(losses, kernel, "valid")


if __name__ == "__main__":
    style.command(draw_loss_curves, LossCurvesOptions, __doc__)
