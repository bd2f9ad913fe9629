"""Exponents of the best rate in the batch size at one number of steps, from runs that differ in the batch alone.

    python benchmarks/batch_exponents.py --out results/published/batch_size

Each row of ``exponents.csv`` compares two batch sizes: the published runs with batches of 32 records at a constant
rate, and the runs of the folder with cosine decay, one seed each.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import pandas as pd

from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import read_runs, read_tokens
from rora_theory.runs import frames

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
STEPS = 64
DRAWS = 400
"""Number of bootstrap samples of the held-out records."""


def published_row() -> dict[str, object]:
    """Return the exponent from batches of 4 to 32 records at a constant rate."""
    table = pd.read_csv(PUBLISHED / "horizon_batch_32" / "comparisons.csv")
    row = table[(table["step"] == STEPS) & (table["compared_with"] == "batch_size 4")].iloc[0]
    octaves = math.log2(32 / 4)
    return {"from_batch": 4, "to_batch": 32, "rank": 8, "gain": 64.0, "schedule": "constant", "seeds": 1} | {
        "exponent": math.log2(row["ratio"]) / octaves,
        "standard_error": row["ratio_log2_error"] / octaves,
    }


def main() -> None:
    """Write ``exponents.csv`` and ``best.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "batch_size")
    folder = parser.parse_args().out
    rows, best = [published_row()], []
    curves = {}
    for run in sorted(folder.glob("batch_*"), key=lambda path: int(path.name.split("_")[1])):
        tokens = next(iter(read_tokens(run).values()))[0]
        (curves[int(run.name.split("_")[1])],) = curves_at(read_runs(run), tokens, STEPS, draws=DRAWS)
    for batch, curve in curves.items():
        logs = curve.log2_optimum
        best.append(
            {"batch_size": batch, "rank": curve.rank, "best_rate": 2**logs.value, "log2_error": logs.known_error}
            | {"edge": curve.edge, "lowest_loss": float(curve.losses.min())}
        )
    for (small, first), (large, second) in pairwise(curves.items()):
        # Runs of other batches read other records: the two errors are independent.
        octaves = math.log2(large / small)
        logs = [curve.log2_optimum for curve in (first, second)]
        if not (first.edge or second.edge):
            rows.append(
                {"from_batch": small, "to_batch": large, "rank": first.rank, "gain": first.gain, "schedule": "cosine"}
                | {"seeds": 1, "exponent": (logs[1].value - logs[0].value) / octaves}
                | {"standard_error": math.hypot(*(estimate.known_error or 0.0 for estimate in logs)) / octaves}
            )
    (folder / "exponents.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    (folder / "best.csv").write_text(frames.to_csv(pd.DataFrame(best)))
    print(pd.DataFrame(best).to_string(index=False))
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"Mean exponent in the batch size: {pd.DataFrame(rows)['exponent'].mean():.2f}.")


if __name__ == "__main__":
    main()
