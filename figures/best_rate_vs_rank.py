"""Best learning rate against the rank in public sweeps, with the line and the range of the advice: rora evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from figures import style
from rora_theory.evidence import plots, starting_rates


@dataclass(frozen=True)
class BestRateVsRankOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.evidence"""
    out: Path | None = None
    """Folder for best_rate_vs_rank.png and .svg; the run folder by default"""


def draw_best_rate_vs_rank(config: BestRateVsRankOptions) -> Sequence[Path]:
    """Draw the best rate against the rank: a line for each model, the rate that the advice gives, and its 90% range."""
    _, best = style.read_frame(config.run, "evidence", "best_rates.csv")
    figure = plots.plot_best_rates(best, starting_rates.model_table())
    return style.save(figure, config.out or config.run, "best_rate_vs_rank")


if __name__ == "__main__":
    style.command(draw_best_rate_vs_rank, BestRateVsRankOptions, __doc__)
