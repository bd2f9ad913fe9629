"""Exponents of the best rate in the batch size at one number of steps, and what it costs to keep the rate.

    python benchmarks/batch_exponents.py --out results/published/batch_size

Each row of ``exponents.csv`` compares two batch sizes: the published runs with batches of 32 records at a constant
rate, and the runs of the folder with cosine decay, one seed each. ``regret.csv`` has the cost of keeping the rate, of
multiplying it by the square root of the batch size, and of the advice.
"""

import argparse
import math
from itertools import combinations
from pathlib import Path

import pandas as pd
from sweep_folders import best_row, read_curves

from rora_theory.advice.constants import CONSTANTS
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regret

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
STEPS = 64
EXPONENTS = {"keep the rate": 0.0, "square root": 0.5, "advice": CONSTANTS["batch_exponent"].value}
"""Exponent in the batch size of every policy."""


def published_row() -> dict[str, object]:
    """Return the exponent from batches of 4 to 32 records at a constant rate."""
    table = pd.read_csv(PUBLISHED / "horizon_batch_32" / "comparisons.csv")
    row = table[(table["step"] == STEPS) & (table["compared_with"] == "batch_size 4")].iloc[0]
    octaves = math.log2(32 / 4)
    return {"from_batch": 4, "to_batch": 32, "rank": 8, "gain": 64.0, "schedule": "constant", "seeds": 1} | {
        "exponent": math.log2(row["ratio"]) / octaves,
        "standard_error": row["ratio_log2_error"] / octaves,
    }


def exponent_row(octaves: float, first: Curve, second: Curve) -> dict[str, object]:
    """Return the exponent between two batch sizes that differ by a number of octaves."""
    logs = [curve.log2_optimum for curve in (first, second)]
    # Runs of other batches read other records: the two errors are independent.
    error = math.hypot(*(estimate.known_error or 0.0 for estimate in logs))
    row = {"rank": first.rank, "gain": first.gain, "schedule": "cosine", "seeds": 1}
    return row | {"exponent": (logs[1].value - logs[0].value) / octaves, "standard_error": error / octaves}


def main() -> None:
    """Write ``exponents.csv``, ``best.csv`` and ``regret.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "batch_size")
    folder = parser.parse_args().out
    rows, costs, curves = [published_row()], [], {}
    for run in sorted(folder.glob("batch_*"), key=lambda path: int(path.name.split("_")[1])):
        (curves[int(run.name.split("_")[1])],) = read_curves(run, STEPS)
    best = [{"batch_size": batch} | best_row(curve) for batch, curve in curves.items()]
    for (small, first), (large, second) in combinations(curves.items(), 2):
        if first.edge or second.edge:
            continue
        pair: dict[str, object] = {"from_batch": small, "to_batch": large}
        rows.append(pair | exponent_row(math.log2(large / small), first, second))
        for policy, exponent in EXPONENTS.items():
            factor = (large / small) ** exponent
            costs.append(pair | {"policy": policy} | regret(first, second, factor.__mul__).row())
    for name, table in {"exponents": rows, "best": best, "regret": costs}.items():
        frame = pd.DataFrame(table)
        (folder / f"{name}.csv").write_text(frames.to_csv(frame))
        print(f"{name}.csv\n{frame.to_string(index=False)}\n")
    smallest, largest = min(curves), max(curves)
    pair = exponent_row(math.log2(largest / smallest), curves[smallest], curves[largest])
    print(f"From {smallest} to {largest} records the best rate grew as the batch to the {pair['exponent']:.2f}.")


if __name__ == "__main__":
    main()
