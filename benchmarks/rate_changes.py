"""Changes of the best rate between two settings of the published runs that the pages quote, by both estimators.

    python benchmarks/rate_changes.py --out results/published/rate_changes

Each row of ``changes.csv`` compares two best rates of one model, of which only G or the number of steps differs, from
the seeds that both settings have, with as many samples of the records as in the sweeps' own tables: their ``ratio``,
the ``divisor``, which is its inverse, and the ``exponent`` in what changes with half its 95% interval. ``error_over``
is what the interval is over.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
from sweep_folders import curves_after, log2_ratios

from rora_theory.advice.best_rate import Run
from rora_theory.lab.sweep.analysis import BOOTSTRAP_SAMPLES
from rora_theory.optimizers import Schedule
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve, at_shared_seeds

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

GAIN_FOLDERS = {"SmolLM2-135M": "horizon", "Gemma 3 270M": "horizon_gemma"}
"""Folder of each model's runs over G at a constant rate."""

GAINS, STEPS = ((16.0, 181.0), (64.0, 724.0)), 64
"""Changes of G by use_rslora at rank 128, and the number of steps after which they are measured."""

STEP_CHANGES = ((16, 256), (64, 256), (256, 1024))
"""Changes of the number of steps under cosine decay at rank 8 and G = 64."""


def change_rows(model: str, curves: dict[Run, Curve], old: Run, new: Run) -> list[dict[str, object]]:
    """Return a row for each estimator, none if a setting has no curve or its best rate is at an edge of its grid."""
    if old not in curves or new not in curves:
        return []
    ends = at_shared_seeds(curves[old], curves[new])
    if not ends or any(curve.edge for curve in ends):
        return []
    over, change = (
        ("G", new.gain / old.gain) if old.steps == new.steps else ("steps", (new.steps or 0) / (old.steps or 0))
    )
    rows = []
    for estimator, logs in log2_ratios(*ends).items():
        slope = logs.times(1 / math.log2(change))
        row = {"model": model, "schedule": old.schedule, "rank": old.rank, "over": over, "from_gain": old.gain}
        row |= {"to_gain": new.gain, "from_steps": old.steps, "to_steps": new.steps, "estimator": estimator}
        row |= {"ratio": 2**logs.value, "divisor": 2**-logs.value, "exponent": slope.value}
        row |= {"half_width": slope.half_width() if slope.has_error else None, "error_over": slope.over}
        rows.append(row | {"seeds": len(ends[0].losses)})
    return rows


def main() -> None:
    """Write ``changes.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "rate_changes")
    folder = parser.parse_args().out
    rows = []
    for model, name in GAIN_FOLDERS.items():
        curves = curves_after(PUBLISHED / name, (STEPS,), draws=BOOTSTRAP_SAMPLES)
        for rank in (8, 128):
            for first, second in GAINS:
                ends = (Run(rank, gain, STEPS, "constant") for gain in (first, second))
                rows += change_rows(model, curves, *ends)
    cosine: Schedule = "cosine"
    steps = sorted({number for change in STEP_CHANGES for number in change})
    curves = curves_after(PUBLISHED / "horizon_cosine", steps, cosine, BOOTSTRAP_SAMPLES)
    for fewer, more in STEP_CHANGES:
        rows += change_rows("SmolLM2-135M", curves, *(Run(8, 64.0, number, cosine) for number in (fewer, more)))
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    (folder / "changes.csv").write_text(frames.to_csv(table))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
