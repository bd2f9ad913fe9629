"""Best rates with and without use_rslora under cosine decay, beside their predictions.

    python benchmarks/use_rslora.py --out results/published/use_rslora

The folder has one run folder per seed, ``seed_0`` and so on, with ranks 8, 32 and 128 at alpha 32 after 256 steps. The
predictions in ``predictions.csv`` are older than the runs. ``best.csv`` has each best rate, and ``outcomes.csv`` each
ratio of two of them by seed, with the first prediction of it. A rate at an edge of its grid gives no ratio.
"""

import argparse
import math
from pathlib import Path

import pandas as pd

from rora_theory.lab.sweep.curves import curves_at
from rora_theory.lab.sweep.runs import read_runs, read_tokens
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import Curve, weighted_log2_rates

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
STEPS = 256
ALPHA = 32.0
DRAWS = 400
"""Number of bootstrap samples of the held-out records."""


def setting_of(curve: Curve) -> str:
    """Return the setting as ``predictions.csv`` writes it."""
    return f"rank {curve.rank}, G {curve.gain:.3g}"


def ratio_row(first: Curve, second: Curve) -> dict[str, object]:
    """Return the best rate of the second curve over that of the first, both of one seed and its held-out records."""
    row = {"from": setting_of(first), "to": setting_of(second)}
    if first.edge or second.edge:
        return row | {"ratio": None, "log2_error": None}
    logs = weighted_log2_rates((-1.0, 1.0), first, second)
    return row | {"ratio": 2**logs.value, "log2_error": logs.known_error}


def main() -> None:
    """Write ``best.csv`` and ``outcomes.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "use_rslora")
    folder = parser.parse_args().out
    best, outcomes = [], []
    for run in sorted(folder.glob("seed_*")):
        seed = {"seed": int(run.name.split("_")[1])}
        tokens = next(iter(read_tokens(run).values()))[0]
        curves = {
            (curve.rank, round(curve.gain, 6)): curve for curve in curves_at(read_runs(run), tokens, STEPS, draws=DRAWS)
        }
        for curve in curves.values():
            logs = curve.log2_optimum
            row = seed | {"rank": curve.rank, "gain": curve.gain, "best_rate": 2**logs.value}
            best.append(row | {"log2_error": logs.known_error, "edge": curve.edge, "lowest_loss": curve.losses.min()})
        plain = {rank: curve for (rank, gain), curve in curves.items() if gain == ALPHA}
        for rank, curve in sorted(plain.items()):
            with_rslora = curves.get((rank, round(ALPHA * math.sqrt(rank), 6)))
            if rank != min(plain):
                outcomes.append(seed | {"change": "rank"} | ratio_row(plain[min(plain)], curve))
            if with_rslora is not None:
                outcomes.append(seed | {"change": "use_rslora"} | ratio_row(curve, with_rslora))
    predictions = pd.read_csv(folder / "predictions.csv").drop_duplicates(["from", "to"])
    compared = pd.DataFrame(outcomes).merge(predictions[["from", "to", "prediction", "low", "high"]], how="left")
    for name, frame in {"best": pd.DataFrame(best), "outcomes": compared}.items():
        (folder / f"{name}.csv").write_text(frames.to_csv(frame))
        print(frame.to_string(index=False))
    known = compared.dropna(subset=["ratio"])
    held = known["ratio"].between(known["low"], known["high"]).sum()
    print(f"{held} of {len(known)} ratios lie in the predicted range, from {known['seed'].nunique()} seeds.")


if __name__ == "__main__":
    main()
