"""Measure how the best learning rate under Adam depends on the scaling, the rank and the number of steps.

    python -m sims.horizon --data DATA/*/train.json --ranks 8 128 --strengths 64 724 --lrs 3e-4 1e-3 3e-3

The model is fine-tuned at every rank, strength (scaling times rank) and learning rate, constant after a warm-up. The
held-out loss is measured after each of ``--read-at`` steps of a run. ``--full-lrs`` also trains the same modules in
full. Finished cells are not run again: more strengths, ranks, rates and seeds extend the run folder.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.lab import llama
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.evaluate.scoring import Scoring
from rora_theory.lab.sweep import analysis as horizons
from rora_theory.lab.sweep import horizon_runs, readings
from rora_theory.lab.sweep import law as horizon_law
from rora_theory.lab.sweep.horizon_grid import HorizonCell, HorizonGrid
from rora_theory.lab.sweep.records import draw_records
from rora_theory.lab.sweep.workbench import Workbench
from rora_theory.runs import devices
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.summary import key_figures
from sims.common import answers, cli, prompts, tables
from sims.common.cells import run_with_bar
from sims.common.summaries import summarised

NAME = "horizon"


@dataclass(frozen=True)
class Config:
    """Options of the runs, their records and the analysis."""

    data: cli.Data
    reading: DataConfig = field(default_factory=DataConfig)
    model: cli.ModelName = "smollm2-135m"
    grid: HorizonGrid = field(default_factory=HorizonGrid)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train_records: int = 2048
    """Number of training records to sample"""
    held_out: int = 96
    """Number of held-out records, which no run trains on"""
    data_seed: int = 42
    """Seed of the samples of training and held-out records"""
    regime: Path | None = None
    """Run folder of sims.regime with the takeover distances and linear terms for the exponents of the law"""
    compare_to: Path | None = None
    """Run folder of sims.horizon to compare with, on the same records and with another setting, such as --targets"""
    out: cli.Out = None


def run(config: Config) -> None:
    """Run the cells that the run folder lacks, then analyse all of its runs."""
    grid, model = config.grid, config.model
    runner = config.cluster.runner()
    # Check all inputs before any work: the regime, the records, the model and the runs to compare with.
    takeovers, linear_terms = horizon_law.read_regime(config.regime) if config.regime else ([], [])
    cells = list(grid.cells())
    sample = {name: getattr(config, name) for name in ("held_out", "train_records")}
    split = draw_records(config.data, **sample, seed=config.data_seed, config=config.reading)
    located = {model: llama.locate(model)}
    # The adapters of all runs have to fit the model.
    llama_config = llama.model_config(located[model])
    for cell in cells:
        grid.training(cell).adapter().table(llama_config)
    identity = grid.identity() | sample | {"model": config.model, "data_seed": config.data_seed}
    identity |= {"records": split.summary, "model_sha256": located[config.model].sha256}
    extra = {"units": horizons.UNITS, "device": devices.describe(devices.pick(1))}
    other_runs = dict([horizon_runs.read_comparison_runs(config.compare_to, identity)] if config.compare_to else [])
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=located.values())
    bench = Workbench(grid.training(cells[0]), split, {}, located, scoring=Scoring("label", None))
    cli.print_notes(bench.open(config.model))
    prompts.print_summary(split.source, split.source.template(grid.template))
    prompts.save_prompts(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    # Number of tokens of every held-out record, by which losses are averaged.
    tokens, answered = readings.token_counts(bench)
    names = pd.DataFrame([(source, index) for source, index, _ in split.held_out], columns=["source", "index"])
    folder.write_frame(names.assign(tokens=tokens, answer_tokens=answered), "records.csv")

    def work(cell: HorizonCell, cell_folder: Path) -> dict[str, Any]:
        bench.open(model)
        return asdict(readings.read_run(bench, grid.training(cell), cell.read_at, folder=cell_folder))

    describe_run = partial(readings.describe_run, tokens=tokens)
    run_with_bar(cells, work, folder, runner=runner, title="runs", describe=describe_run)
    # Analyse all runs in the folder, also those of other grids, after merging runs of one setting.
    runs = horizon_runs.merge_repeated_runs(horizon_runs.read_finished(folder.path))
    folder.write_frame(horizon_runs.horizon_table(runs, tokens, answered), "results.csv")
    law = {"takeovers": takeovers, "linear_terms": linear_terms}
    judged = horizons.judge_runs(runs, tokens, **law, warmup=grid.warmup, schedule=grid.schedule, other_runs=other_runs)
    for name, frame in judged.files().items():
        folder.write_frame(frame, name)
    samples, regret = "seeds and held-out records", "largest regret, nats per token"
    policy = ("changed", "policy", "pairs", "lower_bounds")
    figures = key_figures(judged.policies, regret, "largest", "largest_error", over=samples, scope=policy)
    laws = ("law_low", "law_high", "verdict", "displacement_low", "displacement_high", "displacement_verdict")
    scope = ("step", "over", "at", "first", "second", *laws)
    figures += key_figures(judged.exponents, "exponent of the best rate", "exponent", scope=scope)
    with summarised(folder, figures):
        report(len(runs), judged, law=bool(takeovers))
    folder.finish()
    answers.print_files(folder.path)


def report(runs: int, judged: horizons.HorizonJudgement, *, law: bool = True) -> None:
    """Print the answer, then a table of each frame that is not empty.

    Args:
      runs: Number of runs.
      judged: Frames of the analysis.
      law: Whether the frames have the exponents of the law.
    """
    answers.print_answer(horizons.describe_horizons(runs, judged.best, judged.exponents, law=law))
    setting = {"steps": "{step}", "rank": "{size}", "gamma r": "{strength:g}"}
    # Columns of each table.
    measured = {
        "steps": "{step}",
        "best rate against": "{against} {at:g}",
        "from, to": "{first:g} to {second:g}",
        "exponent, 95%": "{exponent:+.2f} ± {half_width:.2f}",
    }
    exponents = measured | {"law at a constant gradient": "{law_low:+.2f} to {law_high:+.2f}", "verdict": "{verdict}"}
    exponents |= {"edge": "{edge}"}
    displacement = measured | {"displacement law": "{displacement_low:+.2f} to {displacement_high:+.2f}"}
    displacement |= {"verdict": "{displacement_verdict}", "edge": "{edge}"}
    if "by_parts" in judged.exponents and judged.exponents["by_parts"].notna().any():
        exponents["by measured parts"] = "{by_parts:+.2f}"
    # Which factor's part of the change is larger, after each run.
    larger_part = setting | {
        "rate": "{learning_rate:.3g}",
        "seed": "{seed}",
        "A-led over B-led": "{ratio:.2g} ({ratio_low:.2g} to {ratio_high:.2g})",
        "rms change": "{change:.3g}",
        "exponent that preserves it": "{exponent:+.2f} ({exponent_low:+.2f} to {exponent_high:+.2f})",
    }
    # Dependence of the best rate on the number of steps.
    steps = setting | {"steps": "{first} to {second}", "exponent, 95%": exponents["exponent, 95%"]}
    steps |= {"law at a constant gradient": "{law_low:+.2f} to {law_high:+.2f}", "verdict": "{verdict}"}
    steps |= {"edge": "{edge}"}
    # Comparisons of two settings, each at its own best rate, and of two values of gamma r at the same rate.
    comparisons = setting | {
        "compared with": "{compared_with}",
        "ratio of best rates": "{ratio:.3g}",
        "verdict": "{verdict}",
    }
    one_rate = setting | {"compared with": "{compared_with}", "rate": "{learning_rate:.3g}"}
    one_rate |= {"difference in nats, 95%": "{difference:+.3f} ± {half_width:.3f}", "seeds": "{seeds}"}
    change = {"rate": "{best_rate:.3g}", "rms change": "{change:.3g}", "log2 s.e.": "{log2_error:.2f}"}
    change |= {"edge": "{edge}"}
    estimators = {"steps": "{step}", "ranks": "{at}", "gamma r": "{first:g} to {second:g}", "estimator": "{estimate}"}
    estimators |= {"exponent": "{exponent:+.3f}", "s.e.": "{standard_error:.3f}", "seeds": "{seeds}"}
    # Best rates themselves, and the cost of carrying them to another setting.
    best = setting | {"rate": "{best_rate:.3g}", "loss": "{best_loss:.4f}", "edge": "{edge}"}
    policies = {"changed setting": "{changed}", "policy": "{policy}"}
    policies |= {"median": "{median:.4f}", "largest": "{largest:.4f}", "lower bounds": "{lower_bounds}"}
    # Print the tables that the run has data for.
    for title, frame, columns in (
        ("Best rates (parabola through the three lowest losses)", judged.best, best),
        ("Comparisons, each at its own best rate", judged.comparisons, comparisons),
        ("Two values of gamma r at the same rate: difference of their losses", judged.one_rate, one_rate),
        ("Exponents of the best rate, and those of the displacement law", judged.exponents, displacement),
        ("Exponents of the best rate, and those of the law of a constant gradient", judged.exponents, exponents),
        ("Exponents in gamma r by estimator, ranks pooled with seeds as clusters", select_pooled(judged), estimators),
        ("Exponent of the best rate in the steps; -1/2 if entries walk at random", judged.steps, steps),
        ("Larger part of the change, median over modules (5% to 95%)", judged.led, larger_part),
        ("Size of the change at the best rate: equal if the best rate preserves it", judged.change, setting | change),
        ("Regret in nats per token; lower bounds: pairs with a rate outside the grid", judged.policies, policies),
    ):
        if frame.empty:
            continue
        has_exponents = frame is judged.exponents
        with_labels = horizons.add_against_column if has_exponents else horizons.add_size_column
        left = 3 if has_exponents else list(columns).index("compared with") + 1 if "compared with" in columns else 0
        tables.print_records(title, with_labels(frame), columns, left=left)


def select_pooled(judged: horizons.HorizonJudgement) -> pd.DataFrame:
    """Select the exponents in gamma r that are pooled over the largest number of ranks, by every estimator."""
    table = judged.estimators
    if table.empty:
        return table
    rows = table[(table["over"] == "strength") & table["standard_error"].notna()]
    return rows[rows["pairs"] == rows.groupby(["step", "first", "second"])["pairs"].transform("max")]


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
