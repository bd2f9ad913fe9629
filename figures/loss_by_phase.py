"""Training loss of every rank minus that of the highest one in public runs, and the speed of the descent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from figures import style
from rora_theory.evidence import plots
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
    figure = plots.plot_histories(differences, speeds, config.learning_rate)
    return style.save(figure, config.out or config.run, "loss_by_phase")


if __name__ == "__main__":
    style.command(draw_loss_by_phase, LossByPhaseOptions, __doc__)
