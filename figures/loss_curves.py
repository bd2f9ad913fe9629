"""Loss against steps, from one or more runs of sims.finetune: training and validation.

python -m figures.loss_curves RUN [RUN ...] --labels LoRA RoRA DoRA
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from figures import style


@dataclass(frozen=True)
class Config:
    """Which runs to draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of sims.finetune."""
    labels: tuple[str, ...] = ()
    """A name for each run; by default its method, rule and rank."""
    smooth: int = 10
    """Steps that the drawn line averages over; every step's own loss is shown faintly."""
    out: Path | None = None
    """Folder for loss_curves.png and .svg; by default the first run's."""


def draw(config: Config) -> Sequence[Path]:
    """One colour a run; faint points are single batches, lines their running mean, markers the validation loss."""
    if not config.runs:
        style.fail("no runs are given; accepted are one or more run folders of sims.finetune")
    if config.labels and len(config.labels) != len(config.runs):
        style.fail(f"--labels has {len(config.labels)} names for {len(config.runs)} runs; accepted is one each")
    figure, axis = plt.subplots(figsize=(3.6, 2.5))
    for position, run in enumerate(config.runs):
        manifest, events = read(run)
        label = config.labels[position] if config.labels else name(manifest)
        colour = style.COLOURS[position % len(style.COLOURS)]
        marker = style.MARKERS[position % len(style.MARKERS)]
        steps, losses = points(events, "step")
        axis.plot(steps, losses, ".", color=colour, alpha=0.25, markersize=2, markeredgewidth=0)
        axis.plot(*running_mean(steps, losses, config.smooth), color=colour, label=label)
        steps, losses = points(events, "validation")
        if len(steps):
            axis.plot(
                steps, losses, marker, color=colour, markerfacecolor="white", label=f"{label}, validation", zorder=3
            )
    axis.set_xlabel("step")
    axis.set_ylabel("loss per token (nats)")
    axis.legend(frameon=False)
    return style.save(figure, config.out or config.runs[0], "loss_curves")


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Manifest and events of a run; a missing or damaged file ends the command. A last line cut off is left out."""
    try:
        manifest = json.loads((run / "manifest.json").read_text())
        text = (run / "metrics.jsonl").read_text()
        events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (OSError, ValueError) as error:
        style.fail(f"{run}: is not a run folder ({error}); accepted is a folder with manifest.json and metrics.jsonl")
    if not any(event["event"] == "step" for event in events):
        style.fail(f"{run}/metrics.jsonl: has no steps; accepted is a run that took at least one")
    return manifest, events


def name(manifest: dict[str, Any]) -> str:
    """A run's name: LoRA and RoRA are the rules of one method."""
    settings = manifest["config"]
    rules = {"lora": "LoRA", "rora": "RoRA", "rslora": "RoRA"}
    rule = rules.get(settings["rule"], f"kappa = {settings['rule']}")
    known = rule if settings["method"] == "lora" else {"LoRA": "DoRA"}.get(rule, f"DoRA ({rule})")
    return f"{known}, r = {settings['rank']}"


def points(events: list[dict[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of one kind of event."""
    chosen = [(event["step"], event["loss"]) for event in events if event["event"] == kind]
    found = np.array(chosen, float).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def running_mean(steps: np.ndarray, losses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of ``width`` steps, each at its window's middle."""
    width = min(max(width, 1), len(losses))
    kernel = np.full(width, 1 / width)
    return np.convolve(steps, kernel, "valid"), np.convolve(losses, kernel, "valid")


if __name__ == "__main__":
    style.main(draw, tyro.cli(Config, description=__doc__))
