"""Exponents of the best rate in the batch size at one number of steps, and what it costs to keep the rate.

    python benchmarks/batch_exponents.py --out results/published/batch_size

Each row of ``exponents.csv`` compares two batch sizes: the published runs with batches of 32 records at a constant
rate, and the runs of the folder with cosine decay, one seed each, by the lowest losses and by whole curves.
``regret.csv`` has the cost of keeping the rate, of multiplying it by the square root of the batch size, and of the
advice.
"""

import argparse
import math
from itertools import combinations
from pathlib import Path

import pandas as pd
from sweep_folders import best_row, log2_ratios, read_curves

from rora_theory.advice.constants import CONSTANTS
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regret

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
STEPS = 64
EXPONENTS = {"keep the rate": 0.0, "square root": 0.5, "advice": CONSTANTS["batch_exponent"].value}
"""Exponent in the batch size of every policy."""


def published_rows() -> list[dict[str, object]]:
    """Return the exponents from batches of 4 to 32 records at a constant rate, by both estimators."""
    table = pd.read_csv(PUBLISHED / "horizon_batch_32" / "ratios.csv").query("loss_on == 'all'")
    table = table[(table["step"] == STEPS) & (table["compared_with"] == "batch_size 4")]
    pair = {"from_batch": 4, "to_batch": 32, "rank": 8, "gain": 64.0, "schedule": "constant"}
    rows, octaves = [], math.log2(32 / 4)
    for published in table.itertuples():
        row = pair | {"estimator": published.estimate, "exponent": math.log2(published.ratio) / octaves}
        rows.append(row | {"half_width": math.log2(published.high / published.low) / 2 / octaves, "seeds": 1})
    return rows


def exponent_rows(small: int, first: Curve, large: int, second: Curve) -> list[dict[str, object]]:
    """Return the exponent between two batch sizes by both estimators, with its interval over the held-out records."""
    pair = {"from_batch": small, "to_batch": large, "rank": first.rank, "gain": first.gain, "schedule": "cosine"}
    rows, octaves = [], math.log2(large / small)
    # Runs of all batches are evaluated on the same records, so that errors are paired.
    for name, logs in log2_ratios(first, second).items():
        row = pair | {"estimator": name, "exponent": logs.value / octaves}
        rows.append(row | {"half_width": logs.half_width() / octaves, "seeds": 1})
    return rows


def main() -> None:
    """Write ``exponents.csv``, ``best.csv`` and ``regret.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "batch_size")
    folder = parser.parse_args().out
    rows, costs, curves = published_rows(), [], {}
    for run in sorted(folder.glob("batch_*"), key=lambda path: int(path.name.split("_")[1])):
        (curves[int(run.name.split("_")[1])],) = read_curves(run, STEPS)
    best = [{"batch_size": batch} | best_row(curve) for batch, curve in curves.items()]
    for (small, first), (large, second) in combinations(curves.items(), 2):
        if first.edge or second.edge:
            continue
        rows += exponent_rows(small, first, large, second)
        pair: dict[str, object] = {"from_batch": small, "to_batch": large}
        for policy, exponent in EXPONENTS.items():
            factor = (large / small) ** exponent
            costs.append(pair | {"policy": policy} | regret(first, second, factor.__mul__).row())
    for name, table in {"exponents": rows, "best": best, "regret": costs}.items():
        frame = pd.DataFrame(table)
        (folder / f"{name}.csv").write_text(frames.to_csv(frame))
        print(f"{name}.csv\n{frame.to_string(index=False)}\n")
    smallest, largest = min(curves), max(curves)
    widest = exponent_rows(smallest, curves[smallest], largest, curves[largest])
    powers = " and ".join(f"{row['exponent']:.2f} by {row['estimator']}" for row in widest)
    print(f"From {smallest} to {largest} records the best rate grew as the batch to the {powers}.")


if __name__ == "__main__":
    main()
