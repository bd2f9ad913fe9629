"""Compare RoRA with LoRA on a pruned model, each at its own best rate, over three seeds.

    python benchmarks/half_rates.py --out results/published/half_rates

The folder has a run folder of ``rora sweep`` for each method, see docs/results/benchmarks.md. ``rates.csv`` has the
mean held-out loss at every rate. ``comparison.csv`` has the paired difference of the lowest losses, half its 95%
interval over seeds with the bound from the spacing of the rates, and the smallest margin within which the methods are
shown to be equal.
"""

import argparse
from pathlib import Path

import pandas as pd
from sweep_folders import read_curves

from rora_theory.runs import frames
from rora_theory.stats.rate_curves import EQUIVALENCE_MARGIN, Curve, compare_curves, estimate_loss_difference

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
STEPS = 32


def rate_rows(method: str, curve: Curve) -> list[dict[str, object]]:
    """Return the mean loss over seeds at every rate, with the lowest and the highest of a seed."""
    return [
        {"method": method, "rank": curve.rank, "gain": curve.gain, "learning_rate": rate, "loss": losses.mean()}
        | {"lowest": losses.min(), "highest": losses.max(), "seeds": len(losses), "is_best": loss_is_lowest}
        for rate, losses, loss_is_lowest in zip(
            curve.rates.tolist(),
            curve.losses.T,
            curve.losses.mean(axis=0) == curve.losses.mean(axis=0).min(),
            strict=True,
        )
    ]


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "half_rates")
    folder = parser.parse_args().out
    (rora,), (lora,) = (read_curves(folder / method, STEPS) for method in ("rora", "lora"))
    compared = compare_curves(rora, lora, estimate_loss_difference(rora, lora))
    if compared.half_width is None:
        raise SystemExit("the difference has no error: run several seeds")
    row: dict[str, object] = {"rank": compared.rank, "rora": compared.first_loss, "lora": compared.second_loss}
    row |= {"difference": compared.difference, "half_width": compared.half_width, "error_over": compared.error_over}
    row |= {"margin": EQUIVALENCE_MARGIN * compared.second_loss, "edge": rora.edge or lora.edge}
    row |= {"equal_within": abs(compared.difference) + compared.half_width, "verdict": compared.verdict}
    for name, rows in (("rates", [*rate_rows("LoRA", lora), *rate_rows("RoRA", rora)]), ("comparison", [row])):
        (folder / f"{name}.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
        print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
