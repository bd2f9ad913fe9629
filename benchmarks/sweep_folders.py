"""Curves of loss against learning rate of published run folders, for the scripts that compare them."""

from pathlib import Path

from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import read_runs, read_tokens
from rora_theory.stats.rate_curves import Curve

DRAWS = 400
"""Number of bootstrap samples of the held-out records."""


def read_curves(folder: Path, step: int) -> list[Curve]:
    """Return the curves of a run folder after a number of steps, in ascending order of rank and scaling."""
    tokens = next(iter(read_tokens(folder).values()))[0]
    return curves_at(read_runs(folder), tokens, step, draws=DRAWS)


def best_row(curve: Curve) -> dict[str, object]:
    """Return the columns of a best rate: itself, its error in octaves over held-out records, edge and lowest loss."""
    logs = curve.log2_optimum
    row: dict[str, object] = {"rank": curve.rank, "gain": curve.gain, "best_rate": 2**logs.value}
    return row | {"log2_error": logs.known_error, "edge": curve.edge, "lowest_loss": float(curve.losses.min())}
