"""Judge `tune` on tasks and models that were kept apart, by a criterion that was written before.

    python benchmarks/tune_held_back.py run --models small=SMALL/model smollm2=smollm2-135m gemma=gemma3-270m \
        --data TEXTS --out results/published/tune/held_back
    python benchmarks/tune_held_back.py report --out results/published/tune/held_back

`predictions.json` of the output folder has the criterion and the cases, with the names of their models and files of
records (`benchmarks/packaged_texts.py` and `benchmarks/held_back_texts.py` write them). ``run`` trains each case's
planned run at several rates, and extends the grid until the lowest loss lies inside. On this curve it computes the
regret of the prior alone, of `tune` with the case's budget, of fixed rates at G = 64 that are carried as G^-0.75, and
of a learning-rate range test by the package torch-lr-finder, as it comes. The records on which regrets are measured are
used by no policy. A finished case is not run again; ``--only`` runs some cases, in the given order. ``report`` prints
the table of the finished cases beside the criterion.

Files in the output folder: ``cases/NAME.json`` with losses and rates; `held_back.csv`, a row for each case with the
regret of each policy; `policies.csv`, their means over cases; `changes.csv`, how far the best rate moved from the
probes to the planned runs; and `verdict.json`.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from peft import LoraConfig

from rora_theory.advice.best_rate import Run, best_rate_change
from rora_theory.lab import llama
from rora_theory.measure import tune
from rora_theory.measure.batches import model_loss, move_batch
from rora_theory.measure.modules import trainable_parameters
from rora_theory.measure.tuning.examples import held_out_groups, read_batches
from rora_theory.measure.tuning.search import PROBE_RANK
from rora_theory.measure.tuning.training import ProbeModel, ProbeSettings, config_gain
from rora_theory.measure.tuning.trial import Trial
from rora_theory.runs import files, frames
from rora_theory.stats.curve_optima import quadratic_optima
from rora_theory.stats.estimate import over_seeds
from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.rate_optimum import best_rate
from rora_theory.stats.regret import loss_at
from sims.common import inputs
from sims.common.tables import print_records

matplotlib.use("Agg")

HELD_BACK = Path(__file__).parents[1] / "results" / "published" / "tune" / "held_back"
PREDICTIONS = "predictions.json"

FIXED_RATES = (2e-4, 5e-4, 7e-4)
"""Fixed rates at G = 64, which are carried to other gains as G^-0.75."""

RATE_RATIO = 2.0
"""Ratio of neighbouring rates of a planned run's curve."""

MAX_RATES = 11
"""Most rates of a curve."""

MAX_RATE, MIN_RATE = 1.0, 1e-6
"""Rates between which the range test increases the rate, in 100 steps, as in fastai and Lightning."""

HELD_OUT, JUDGED = 96, 192
"""Numbers of records on which `tune` compares rates, and on which regrets are measured."""

Record = str | dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Planned run on which `tune` is judged.

    Attributes:
      name: Name of the case.
      kind: ``small`` for a small pretrained model, ``full`` for a published one.
      model: Name of the model in ``--models``.
      data: File of records, relative to ``--data``: lines of text, or JSON lines with text, messages, or prompt and
        completion.
      rank: Rank of the adapters.
      alpha: Alpha, with the scaling alpha / rank.
      steps: Number of optimizer steps.
      schedule: Schedule of the learning rate.
      batch_size: Number of records per step.
      max_length: Maximum number of tokens of a record.
      seed: Seed of the sample of records and of the initialisation.
      budget: Cost of the probe as a share of the run.
    """

    name: str
    kind: str
    model: str
    data: str
    rank: int
    alpha: float
    steps: int
    schedule: Any = "cosine"
    batch_size: int = 4
    max_length: int = 256
    seed: int = 0
    budget: float = 0.1


@dataclass(frozen=True)
class Criterion:
    """Success of `tune`, in nats per token.

    Attributes:
      share_of_prior: Largest mean regret relative to the prior's.
      mean: Largest mean regret.
      largest: Largest regret of a case.
      coverage: Smallest and largest share of cases whose best rate lies in the stated 90% range.
      small: Fewest cases of small models.
      full: Fewest cases of full runs.
    """

    share_of_prior: float
    mean: float
    largest: float
    coverage: tuple[float, float]
    small: int
    full: int


def read_predictions(folder: Path) -> tuple[Criterion, list[Case]]:
    """Return the criterion and the cases of a folder."""
    content = json.loads((folder / PREDICTIONS).read_text())
    criterion = dict(content["criterion"])
    return Criterion(**criterion | {"coverage": tuple(criterion["coverage"])}), [Case(**c) for c in content["cases"]]


def read_records(path: Path) -> list[Record]:
    """Return the records of a file: its lines, or JSON lines."""
    records: list[Record] = []
    for line in path.read_text().splitlines():
        if not line.strip():
            continue
        record = json.loads(line) if path.suffix == ".jsonl" else line
        if isinstance(record, dict) and "prompt" in record:
            record = record["prompt"] + record["completion"]
        records.append(record)
    return records


def split_records(case: Case, records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """Return training records, those on which `tune` compares rates, and those on which regrets are measured."""
    shuffled = list(records)
    random.Random(case.seed).shuffle(shuffled)
    judged, held_out = shuffled[:JUDGED], shuffled[JUDGED : JUDGED + HELD_OUT]
    return shuffled[JUDGED + HELD_OUT :], held_out, judged


class CaseRuns:
    """Training runs of a case at several rates.

    Args:
      case: Planned run.
      model: Base model.
      tokenizer: Tokenizer of the model.
      records: All records of the case.
    """

    def __init__(self, case: Case, model: torch.nn.Module, tokenizer: Any, records: Sequence[Record]) -> None:
        self.case, self.model, self.tokenizer = case, model, tokenizer
        self.train, self.held_out, judged = split_records(case, records)
        self.options: dict[str, Any] = {
            "tokenizer": tokenizer, "batch_size": case.batch_size, "max_length": case.max_length
        }  # fmt: skip
        self.batches = read_batches(self.train, "train", **self.options, count=case.steps)
        self.groups = held_out_groups(model, read_batches(judged, "held_out", **self.options))
        config = self.config()
        settings = ProbeSettings(
            config, config_gain(config), case.steps, case.schedule, 0, 1, self.make_optimizer, 1.0, case.seed
        )
        self.planned = ProbeModel(model, settings, self.batches, self.groups, model_loss)

    def config(self) -> LoraConfig:
        """Return the configuration of the planned run's adapters."""
        return LoraConfig(
            r=self.case.rank, lora_alpha=self.case.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    @staticmethod
    def make_optimizer(parameters: Iterable[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Return AdamW without weight decay."""
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def losses(self, rate: float) -> list[float] | None:
        """Train the planned run at a rate and return the loss of each group of records; None if it diverged."""
        run = self.planned.train(Trial(rate, self.case.steps), lambda: None)
        return None if run.diverged_at is not None else list(run.losses)

    def tuned(self, budget: float) -> Any:
        """Return the result of `tune` within a budget."""
        case = self.case
        return tune(
            self.model,
            self.train if budget else None,
            self.held_out if budget else None,
            config=self.config(),
            steps=case.steps,
            schedule=case.schedule,
            seed=case.seed,
            budget=budget,
            **self.options,
        )

    def range_test(self) -> float:
        """Return the rate that a learning-rate range test suggests: the steepest fall of the smoothed loss."""
        from torch_lr_finder import LRFinder, TrainDataLoaderIter

        class Batches(TrainDataLoaderIter):
            def inputs_labels_from_batch(self, batch_data: Any) -> tuple[Any, Any]:
                return batch_data, batch_data["labels"]

        class WithLoss(torch.nn.Module):
            def __init__(self, network: torch.nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, batch: Any) -> torch.Tensor:
                return model_loss(self.network, move_batch(batch, self.network))

        with self.planned.adapted():
            optimizer = self.make_optimizer(trainable_parameters(self.model), MIN_RATE)
            finder = LRFinder(WithLoss(self.model), optimizer, lambda loss, _: loss)
            finder.range_test(Batches(self.batches), end_lr=MAX_RATE)
            return float(finder.plot(suggest_lr=True)[1])


def measure_curve(losses_at: Callable[[float], list[float] | None], middle: float) -> dict[float, list[float] | None]:
    """Train at rates around a middle one until the lowest loss has finite neighbours, or `MAX_RATES` were trained."""
    curve: dict[int, list[float] | None] = {}

    def total(index: int) -> float:
        losses = curve[index]
        return math.inf if losses is None else math.fsum(losses)

    for index in (0, 1, -1):
        curve[index] = losses_at(middle * RATE_RATIO**index)
    while len(curve) < MAX_RATES:
        best = min(curve, key=total)
        # Two rates on either side, so that the curve and not three points give the best rate.
        missing = [index for index in (best - 1, best + 1, best - 2, best + 2) if index not in curve]
        # A rate above one that diverged would diverge too.
        diverged = min((index for index, losses in curve.items() if losses is None), default=math.inf)
        missing = [index for index in missing if index < diverged]
        if not missing:
            break
        curve[missing[0]] = losses_at(middle * RATE_RATIO ** missing[0])
    return {middle * RATE_RATIO**index: curve[index] for index in sorted(curve)}


def run_case(runs: CaseRuns) -> dict[str, Any]:
    """Return the rates of all policies and the measured curve of the planned run."""
    case = runs.case
    prior, tuned = runs.tuned(0), runs.tuned(case.budget)
    rates = {"prior": prior.learning_rate, "tune": tuned.learning_rate}
    rates |= {f"fixed {rate:g}": rate * (64 / case.alpha) ** 0.75 for rate in FIXED_RATES}
    rates |= {"range test": runs.range_test()}
    curve = measure_curve(runs.losses, prior.learning_rate)
    return {
        "rates": rates,
        "ranges": {"prior": [prior.low, prior.high], "tune": [tuned.low, tuned.high]},
        "curve": [[rate, losses] for rate, losses in curve.items()],
        "tokens": [group.targets for group in runs.groups],
        "probe": describe_probe(tuned),
    }


def describe_probe(tuned: Any) -> dict[str, Any]:
    """Return the cost, the number of steps, the losses and the assumptions of a probe; null is a loss that diverged."""
    losses = tuned.curve[tuned.curve["steps"] == tuned.probe_steps].sort_values("learning_rate")
    curve = [
        [row.learning_rate, row.held_out_loss if math.isfinite(row.held_out_loss) else None]
        for row in losses.itertuples()
    ]
    return {
        "cost": tuned.cost.share,
        "steps": tuned.probe_steps,
        "curve": curve,
        "assumptions": list(tuned.assumptions),
    }


def judge_case(case: Case, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the regret of every policy on the measured curve, in nats per token, and whether the ranges hold.

    ``best_rate`` is that of a parabola through the whole curve, by which the criterion counts ranges. ``vertex`` is
    that of the lowest loss and its neighbours; the first lies below it where losses rise steeply at high rates.
    """
    tokens = math.fsum(result["tokens"])
    rates = np.array([rate for rate, _ in result["curve"]])
    losses = np.array([[math.inf if row is None else math.fsum(row) / tokens for _, row in result["curve"]]])
    lowest = int(np.argmin(losses))
    curve = Curve("adamw", "both", "lora", 1.0, case.rank, case.alpha / case.rank, rates, losses)
    best, vertex = 2 ** float(quadratic_optima(curve, allows_ends=True)[0]), best_rate(rates, losses[0]).rate
    # The probe's own best rate, and how the law of the advice expects the planned run's to differ.
    steps, probe_curve = result["probe"]["steps"], result["probe"]["curve"]
    probe_losses = np.array([math.inf if loss is None else loss for _, loss in probe_curve])
    probe_vertex = best_rate(np.array([rate for rate, _ in probe_curve]), probe_losses).rate
    run = Run(case.rank, case.alpha, case.steps, case.schedule, case.batch_size)
    change = best_rate_change(replace(run, rank=min(case.rank, PROBE_RANK), steps=steps), run)
    row: dict[str, Any] = {"case": case.name, "kind": case.kind, "model": case.model, "data": case.data}
    row |= {"rank": case.rank, "gain": case.alpha, "steps": case.steps, "schedule": case.schedule, "best_rate": best}
    row |= {
        "is_edge": lowest in (0, len(rates) - 1),
        "vertex": vertex,
        "probe_steps": steps,
        "probe_vertex": probe_vertex,
    }
    row |= {"measured_change": vertex / probe_vertex, "expected_change": math.exp(change.mean)}
    for name, rate in result["rates"].items():
        loss, is_lower_bound = loss_at(rates, losses, rate)
        row |= {name: float(loss[0] - losses[0, lowest]), f"{name}, bound": is_lower_bound, f"{name}, rate": rate}
    for name, (low, high) in result["ranges"].items():
        row |= {f"{name} covers": low <= best <= high, f"{name} covers vertex": low <= vertex <= high}
    return row


def judge(table: pd.DataFrame, criterion: Criterion) -> dict[str, Any]:
    """Compare the regrets of `tune` with the criterion.

    Args:
      table: A row of `judge_case` for each case.
      criterion: Criterion that was written before.

    Returns:
      The key figures, each clause with whether it holds, and ``verdict``: holds, fails, or undecided with fewer cases
      than the criterion asks for.
    """
    counts = {kind: int((table["kind"] == kind).sum()) if len(table) else 0 for kind in ("small", "full")}
    if not len(table):
        return {"cases": counts, "verdict": "undecided"}
    mean, prior = float(table["tune"].mean()), float(table["prior"].mean())
    largest, coverage = float(table["tune"].max()), float(table["tune covers"].mean())
    clauses = {
        "mean regret relative to the prior's": mean <= criterion.share_of_prior * prior,
        "mean regret": mean <= criterion.mean,
        "largest regret": largest <= criterion.largest,
        "coverage": criterion.coverage[0] <= coverage <= criterion.coverage[1],
    }
    is_complete = counts["small"] >= criterion.small and counts["full"] >= criterion.full
    verdict = "undecided" if not is_complete else "holds" if all(clauses.values()) else "fails"
    figures = {"mean": mean, "prior_mean": prior, "largest": largest, "coverage": coverage}
    return {"cases": counts} | figures | {"clauses": clauses, "verdict": verdict}


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each policy: its regret, the difference from the prior's, and its rate relative to the best."""
    rows = []
    for name in [name for name in table if f"{name}, bound" in table]:
        regrets, difference = table[name], over_seeds((table[name] - table["prior"]).to_numpy())
        ratios = table[f"{name}, rate"] / table["vertex"]
        rows.append(
            {
                "policy": name,
                "cases": len(table),
                "mean": regrets.mean(),
                "median": regrets.median(),
                "largest": regrets.max(),
                "minus_prior": math.nan if name == "prior" else difference.value,
                "half_width": math.nan if name == "prior" or len(table) < 2 else difference.half_width(),
                "better_than_prior": math.nan if name == "prior" else int((regrets < table["prior"]).sum()),
                "lowest_ratio": ratios.min(),
                "median_ratio": ratios.median(),
                "highest_ratio": ratios.max(),
                "lower_bounds": int(table[f"{name}, bound"].sum()),
                "coverage": table[f"{name} covers"].mean() if f"{name} covers" in table else math.nan,
                "vertex_coverage": table[f"{name} covers vertex"].mean() if f"{name} covers" in table else math.nan,
            }
        )
    return pd.DataFrame(rows)


def summarise_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the lowest, median and highest of ratios of rates over cases."""
    ratios = {
        "planned over probe": table["measured_change"],
        "planned over probe by the law": table["expected_change"],
        "advised over prior": table["tune, rate"] / table["prior, rate"],
        "whole curve over vertex": table["best_rate"] / table["vertex"],
    }
    rows = []
    for name, ratio in ratios.items():
        values = {"lowest": ratio.min(), "median": ratio.median(), "highest": ratio.max()}
        rows.append({"ratio": name} | values | {"below_1": int((ratio < 1).sum()), "cases": len(ratio)})
    return pd.DataFrame(rows)


def report(folder: Path) -> dict[str, Any]:
    """Write and print the tables of the finished cases and the verdict."""
    criterion, cases = read_predictions(folder)
    finished = [(case, folder / "cases" / f"{case.name}.json") for case in cases]
    rows = [judge_case(case, json.loads(path.read_text())) for case, path in finished if path.exists()]
    table = pd.DataFrame(rows)
    verdict = judge(table, criterion)
    if rows:
        policies = summarise(table)
        files.write_whole(folder / "changes.csv", frames.to_csv(summarise_changes(table)))
        files.write_whole(folder / "held_back.csv", frames.to_csv(table))
        files.write_whole(folder / "policies.csv", frames.to_csv(policies))
        title = f"Regret in nats per token over {len(rows)} of {len(cases)} cases"
        columns = {"policy": "{policy}", "mean": "{mean:.4f}", "median": "{median:.4f}", "largest": "{largest:.4f}"}
        columns |= {"minus the prior's (95%)": "{minus_prior:.4f} ± {half_width:.4f}"}
        print_records(title, policies, columns, left=1)
    files.write_whole(folder / "verdict.json", json.dumps(verdict, indent=2) + "\n")
    print(f"{len(rows)} of {len(cases)} cases; tune: {verdict['verdict']}.")
    return verdict


def main() -> None:
    """Run cases, or report those that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=MODEL", help="models of the cases")
    parser.add_argument("--data", type=Path, help="folder of the files of records")
    parser.add_argument("--only", nargs="*", help="names of the cases to run, in this order")
    parser.add_argument("--out", type=Path, default=HELD_BACK, help="folder with predictions.json")
    arguments = parser.parse_args()
    if arguments.action == "report":
        report(arguments.out)
        return
    models = dict(word.split("=", 1) for word in arguments.models)
    (arguments.out / "cases").mkdir(parents=True, exist_ok=True)
    cases = {case.name: case for case in read_predictions(arguments.out)[1]}
    for name in arguments.only or cases:
        case, path = cases[name], arguments.out / "cases" / f"{name}.json"
        if path.exists() or case.model not in models:
            continue
        origin = llama.locate(models[case.model])
        tokenizer = llama.model_tokenizer(origin).backend
        records = read_records(arguments.data / case.data)
        result = run_case(CaseRuns(case, inputs.load_model(origin), tokenizer, records))
        files.write_whole(path, json.dumps(result) + "\n")
        print(json.dumps(judge_case(case, result)), flush=True)


if __name__ == "__main__":
    main()
