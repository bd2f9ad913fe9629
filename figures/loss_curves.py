"""Loss against steps: training and validation of runs of sims.finetune, or cells of a sims.rank_sweep.

    python -m figures.loss_curves RUN [RUN ...] --labels LoRA RoRA DoRA
    python -m figures.loss_curves SWEEP --rank 128

The first draws runs, the second a sweep's cells of one rank.
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
from rora_theory.io import files
from rora_theory.runs.journal import read_entries
from rora_theory.validation.ranges import Count, Natural, Positive, check_ranges
from rora_theory.validation.rules import check_unread

REQUIRED = tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="(required)")  # the parser takes none too


@dataclass(frozen=True)
class Config:
    """Which runs to draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, REQUIRED]
    """Run folders of sims.finetune, cells of a sims.rank_sweep, or its whole folder."""
    rank: Count | None = None
    """Of a whole sweep, the cells of this rank."""
    seed: Natural | None = None
    """Of a whole sweep, the cells of this seed; none is the first."""
    lr: Positive | None = None
    """Of a whole sweep, the cells of this learning rate; none is every one."""
    labels: tuple[str, ...] = ()
    """A name for each run; by default its method, rule and rank, and the learning rate where it differs."""
    smooth: Count = 10
    """Steps that the drawn line averages over; every step's own loss is shown faintly."""
    out: Path | None = None
    """Folder for loss_curves.png and .svg; by default the first run's."""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw(config: Config) -> Sequence[Path]:
    """One colour a run; faint points are single batches, lines their running mean, markers the validation loss."""
    if not config.runs:
        style.fail("no runs are given; accepted are one or more run folders of sims.finetune or sims.rank_sweep")
    if not any(map(is_sweep, config.runs)):
        check_unread(config, "rank", "seed", "lr", requires="the folder of a whole sweep")
    folders = [cell for run in config.runs for cell in cells(run, config)]
    if config.labels and len(config.labels) != len(folders):
        style.fail(f"--labels has {len(config.labels)} names for {len(folders)} runs; accepted is one each")
    found = [read_events(folder) for folder in folders]
    names = config.labels or names_of([settings for settings, _ in found])
    figure, axis = plt.subplots(figsize=(3.6, 2.8))
    words = "points: single batches; lines: their running mean"
    curves = zip(looks([settings for settings, _ in found]), names, found, strict=True)
    for number, ((colour, marker), label, (_, events)) in enumerate(curves):
        dashes = "--" if number % 2 else "-"  # where two are the same, the earlier shows between the dashes
        steps, losses = points(events, "step")
        axis.plot(steps, losses, ".", color=colour, alpha=0.3, markersize=3, markeredgewidth=0)
        width = min(config.smooth, max(1, len(losses) // 4))
        axis.plot(*running_mean(steps, losses, width), color=colour, label=label, linestyle=dashes)
        steps, losses = points(events, "validation")
        if len(steps):
            axis.plot(
                steps, losses, marker, color=colour, markerfacecolor="white", label=f"{label}, validation", zorder=3
            )
    axis.set_xlabel("step")
    axis.set_ylabel("loss per token (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(figure, style.named([axis]), words)
    return style.save(figure, config.out or config.runs[0], "loss_curves")


def is_sweep(run: Path) -> bool:
    """Whether a folder is a whole sweep's."""
    return (run / "results.csv").exists() and (run / "cells").is_dir()


def cells(run: Path, config: Config) -> list[Path]:
    """A run's own folder, or the folders of a sweep's cells that are asked for, in the order of its table."""
    if not is_sweep(run):
        return [run]
    _, rows = style.read_frame(run, "rank_sweep")
    rows = rows[rows["rank"].notna()]
    if rows.empty:
        style.fail(f"{run}/results.csv: has no cell with a rank; accepted is a sweep with at least one")
    for option, column, value in (
        ("--rank", "rank", config.rank),
        ("--lr", "learning_rate", config.lr),
        ("--seed", "seed", config.seed),
    ):
        style.check_among(option, value, rows[column])  # of the cells that those before leave
        chosen = rows["seed"].min() if option == "--seed" and value is None else value
        rows = rows if chosen is None else rows[rows[column] == chosen]
    return [files.resolve_inside(run / "cells", key, where=run / "results.csv") for key in rows["key"]]


def read_events(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and events of a run or cell; a missing or damaged file ends the command. A last line cut off is left
    out."""
    cell = run / "cell.json"
    if cell.exists():
        style.check_as_written(run.resolve().parents[1], f"cells/{run.resolve().name}")
    else:
        style.check_as_written(run)
    try:
        settings = files.read_json(cell if cell.exists() else run / "manifest.json")
        settings = settings["training"] if cell.exists() else settings["config"]
        events = read_entries(run / "metrics.jsonl")
    except (OSError, ValueError, TypeError, KeyError) as error:
        style.fail(f"{run}: is not a run folder ({error}); accepted is a folder with manifest.json and metrics.jsonl")
    if not any(event.get("event") == "step" for event in events):
        style.fail(f"{run}/metrics.jsonl: has no steps; accepted is a run that took at least one")
    return settings, events


def looks(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Colour and marker of each run: its method's own, or, where two runs have the same method, by position."""
    methods = [_method(settings) for settings in runs]
    if len(set(methods)) == len(methods):
        return [style.look(method, position)[1:] for position, method in enumerate(methods, start=4)]
    return [
        (style.COLOURS[i % len(style.COLOURS)], style.MARKERS[i % len(style.MARKERS)]) for i, _ in enumerate(methods)
    ]


def _method(settings: dict[str, Any]) -> str:
    """The method as figures know it: LoRA's kind with RoRA's rule is RoRA."""
    kind, rule = settings["method"], str(settings["rule"]).replace("rslora", "rora")
    if kind == "lora":
        return rule
    return {("dora", "lora"): "dora", ("dora", "rora"): "dora-rora"}.get(
        (kind, rule), f"dora, kappa = {rule}" if kind == "dora" else kind
    )


def names_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Names of runs; the learning rate is in them where two would be the same."""
    plain = [name(settings) for settings in runs]
    peaks = [settings["lr"] if "lr" in settings else settings["learning_rate"] for settings in runs]  # the earlier name
    rates = set(zip(plain, peaks, strict=True))
    several = {label for label in plain if sum(label == known for known, _ in rates) > 1}
    return [
        f"{label}, lr {peak:g}" if label in several and peak else label
        for label, peak in zip(plain, peaks, strict=True)
    ]


def name(settings: dict[str, Any]) -> str:
    """A run's name: its method's label, as in every figure, and its rank."""
    label = style.look(_method(settings))[0]
    return (
        label
        if settings["rank"] is None or settings["method"] not in ("lora", "dora")
        else f"{label}, r = {settings['rank']}"
    )


def points(events: list[dict[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of one kind of event."""
    with files.naming_damage("metrics.jsonl"):
        chosen = [(event["step"], event["loss"]) for event in events if event.get("event") == kind]
        found = np.array(chosen, float).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def running_mean(steps: np.ndarray, losses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of ``width`` steps, each at its window's middle."""
    width = min(max(width, 1), len(losses))
    kernel = np.full(width, 1 / width)
    return np.convolve(steps, kernel, "valid"), np.convolve(losses, kernel, "valid")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
