"""Training loss of every rank minus that of the highest one in public runs, and the speed of the descent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro

from figures import style
from rora_theory.validation.ranges import Positive, check_ranges


@dataclass(frozen=True)
class LossByPhaseOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.evidence"""
    learning_rate: Positive = 1e-4
    """Learning rate of the losses"""
    out: Path | None = None
    """Folder for loss_by_phase.png and .svg; the run folder by default"""

    def __post_init__(self) -> None:
        check_ranges(self)


def draw_loss_by_phase(config: LossByPhaseOptions) -> Sequence[Path]:
    """Draw the training loss of every rank minus that of the highest one by phase of the run, and the speed."""
    _, differences = style.read_frame(config.run, "evidence", "loss_differences.csv")
    _, speeds = style.read_frame(config.run, "evidence", "speeds.csv")
    shown = differences[np.isclose(differences["learning_rate"], config.learning_rate)]
    if shown.empty:
        style.fail(f"{config.run} has no loss at --learning-rate {config.learning_rate:g}. Choose a rate of the runs.")
    models = sorted(shown["model"].unique(), key=lambda name: -len(shown[shown["model"] == name]))
    figure, axes = plt.subplots(len(models) + 1, 1, figsize=(style.NARROW, 1.0 + 1.75 * (len(models) + 1)), sharex=True)
    for axis, model in zip(axes, models, strict=False):
        phases = shown[shown["model"] == model].groupby(["first_step", "last_step"], sort=True)
        for position, ((first, last), rows) in enumerate(phases):
            rows = rows.sort_values("rank")
            axis.errorbar(
                rows["rank"], 1000 * rows["difference"], yerr=1000 * rows["standard_error"],
                color=style.COLOURS[position], marker=style.MARKERS[position], label=f"steps {first} to {last}",
            )  # fmt: skip
        axis.set_title(f"{short_name(model)}, rate {config.learning_rate:g}", loc="left")
        axis.set_ylabel("loss minus that of\nr = 512, $10^{-3}$ nats")
    for position, (model, rows) in enumerate(speeds.groupby("model", sort=False)):
        rows = rows.sort_values("rank")
        errors = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["speed"].to_numpy(float))
        axes[-1].errorbar(
            rows["rank"], rows["speed"], yerr=errors, color=style.COLOURS[3 + position],
            marker=style.MARKERS[3 + position], label=f"speed, {short_name(model)}",
        )  # fmt: skip
    axes[-1].set_title(f"speed of the descent, rate {float(speeds['learning_rate'].iloc[0]):g}", loc="left")
    axes[-1].set(xlabel="rank $r$", ylabel="relative to r = 512")
    style.integer_ticks(axes[-1], differences["rank"], max_count=10)
    style.legend(figure, style.named(axes), "bars: standard error over steps (speed: 95% interval)")
    return style.save(figure, config.out or config.run, "loss_by_phase")


def short_name(model: str) -> str:
    """Return the first two parts of a model's name."""
    return "-".join(model.split("-")[:2])


if __name__ == "__main__":
    style.command(draw_loss_by_phase, LossByPhaseOptions, __doc__)
