"""Regret of every policy in public sweeps, a dot for each model: a run of rora evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from figures import style
from rora_theory.evidence import plots


@dataclass(frozen=True)
class RegretByModelOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.evidence"""
    out: Path | None = None
    """Folder for regret_by_model.png and .svg; the run folder by default"""


def draw_regret_by_model(config: RegretByModelOptions) -> Sequence[Path]:
    """Draw the regret of every policy that carries a best rate to another rank: a dot for each model, and the mean."""
    _, costs = style.read_frame(config.run, "evidence")
    return style.save(plots.plot_regrets(costs), config.out or config.run, "regret_by_model")


if __name__ == "__main__":
    style.command(draw_regret_by_model, RegretByModelOptions, __doc__)
