"""Train a matrix of adapters over methods, ranks, scalings, learning rates, seeds and further axes, and analyse it.

    python -m sims.sweep --data DATA/*/train.json --ranks 8 32 128 --methods lora rora --lrs 1e-4 3e-4 1e-3 3e-3
    python -m sims.sweep --config configs/table1.yaml --accuracy --data DATA/*/train.json --data-dir DATA --list

Every cell trains one adapter and measures its loss on held-out records of the training files (on all tokens, and on the
answers) after one or several numbers of steps; with --accuracy also the accuracy on the eight tasks at the end. The
same command resumes an interrupted run and repeats failed cells; finished cells are not run again, and more ranks,
rates, seeds or values of --axes extend the run folder.

`results.csv` has a row for each run and number of steps. `best.csv` has the best rates, `exponents.csv` how they depend
on G = gamma r and on the rank, `regret.csv` what it costs to keep or scale a rate, and `differences.csv` compares the
longest runs of the methods with the base model and with LoRA, record by record, unless there are --axes. A loss that is
not finite is a result, ``diverged``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.errors import FailedError
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep import analysis, differences, results
from rora_theory.lab.sweep import law as laws_of_rates
from rora_theory.lab.sweep import runs as sweep_runs
from rora_theory.lab.sweep.cell_trainer import CellTrainer
from rora_theory.lab.sweep.cells import cell_states, describe_models
from rora_theory.lab.sweep.grid import AXES, SweepCell
from rora_theory.lab.sweep.methods import BASE
from rora_theory.lab.sweep.plan import SweepConfig, plan_sweep
from rora_theory.runs import devices, frames
from rora_theory.runs.cells import CELLS_FOLDER
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure, key_figures
from sims.common import answers, cli, prompts, tables
from sims.common.cells import Runner, run_with_bar
from sims.common.summaries import summarised

NAME = "sweep"

CELL_SETTINGS = (
    "method", "rule", "rank", "lr", "seed", "rank_pattern", "alpha_pattern", "virtual_tokens", "bottleneck",
    "evaluate_every",
)  # fmt: skip
"""Training settings that the cells determine, or that are as published; they are not options."""

_Shared: Any = cli.without_options(FinetuneConfig, *CELL_SETTINGS)


@dataclass(frozen=True)
class Training(_Shared):
    held_out: int = 512
    """Number of records of the training files that are held out for the validation loss, the same for every cell"""
    checkpoint_every: int = 500
    """Number of steps between two checkpoints of a cell; an interrupted cell without a checkpoint starts again"""


@dataclass(frozen=True)
class SweepOptions(SweepConfig):
    """Options of the matrix."""

    data: cli.Data
    revision: cli.Revision = None
    training: Training = field(default_factory=Training)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parts: bool = False
    """Measure the A part and the B part of the change, at every number of steps"""
    regime: Path | None = None
    """Run folder of sims.regime with the crossing distances and linear terms for the exponents of the law"""
    compare_to: Path | None = None
    """Run folder of a sweep to compare with, on the same records and with another setting, such as --targets"""
    save_adapters: bool = False
    """Save the adapter of each cell in PEFT's format, or the model for full"""
    out: Path | None = None
    """Run folder; by default results/COMMAND/ID. An existing matrix is resumed and may grow"""
    list: bool = False
    """Print the cells with their state, without running them"""


def run_matrix(config: SweepOptions) -> None:
    """Validate the inputs, run the cells that the run folder lacks, and report."""
    # Check all inputs before any work: the regime, the records, the models and the runs to compare with.
    law = laws_of_rates.read_regime(config.regime) if config.regime else None
    plan = plan_sweep(config)
    cells, identity = plan.cells(), plan.identity()
    models = describe_models(cells, plan.training, plan.located)
    path = path_of(NAME, identity, config.out)
    if config.list:
        print_cells(path, cells)
        return
    compare_to = [sweep_runs.read_comparison_runs(config.compare_to, identity)] if config.compare_to else []
    check_free(path)
    runner = config.cluster.runner()
    cell_trainer = CellTrainer(plan, score_batch_size=config.score_batch_size, measures_parts=config.parts)
    # The numbers of tokens need the tokenizers of all models, but no weights.
    records = pd.concat([count_record_tokens(cell_trainer, model) for model in reversed(plan.grid.model)][::-1])
    cli.print_notes(cell_trainer.open(cells[0].model))
    device = devices.describe_devices(devices.pick(1))
    extra = {"models": models, "units": analysis.UNITS, "device": device}
    models_read = plan.located.values()
    folder = RunFolder.open(NAME, identity, out=path, seed=config.data_seed, extra=extra, models=models_read)
    prompts.print_summary(plan.records.source, plan.training.template)
    prompts.print_prompts(cell_trainer.train_examples, cell_trainer.model.tokenizer, config.reading.show)
    folder.write_frame(records, sweep_runs.RECORDS_FILE)
    failed = None
    try:
        run_sweep_cells(config, folder, cell_trainer, cells, runner)
    # A failed cell does not stop the others: write their results before ending with its error.
    except FailedError as error:
        failed = error
    # Analyse all runs in the folder, also those of other grids.
    runs, tokens = sweep_runs.read_runs(path), sweep_runs.read_tokens(path)
    rows = results.results_table(runs, tokens)
    folder.write_frame(rows)
    ends = results.final_rows(rows)
    if not any(run.axes for run in runs):
        losses = differences.collect_record_losses(runs, records)
        # Runs of one length are compared: the longest ones, and the base model, which has none.
        longest = ends[(ends["steps"] == ends["steps"].max()) | (ends["method"] == BASE)]
        compared = differences.method_differences(longest, losses, path / CELLS_FOLDER)
        folder.write_frame(frames.from_rows(compared, differences.COLUMNS), "differences.csv")
    if failed is not None:
        raise failed
    judged = analysis.analyse(runs, tokens, identity["settings"], law=law, other_runs=dict(compare_to))
    for name, frame in judged.items():
        if len(frame):
            folder.write_frame(frame, f"{name}.csv")
    best = ends[ends["best_rate"].notna() | (ends["method"] == BASE)]
    with summarised(folder, collect_key_figures(best, judged)):
        report(ends, best, len(runs), judged, law=law is not None)
    folder.finish()
    answers.print_files(path)


def count_record_tokens(cell_trainer: CellTrainer, model: str) -> pd.DataFrame:
    """Return the source, index and numbers of tokens of the held-out records for a model."""
    tokens, answer_tokens = cell_trainer.count_tokens(model)
    places = [(source, index) for source, index, _ in cell_trainer.plan.records.held_out]
    frame = pd.DataFrame(places, columns=["source", "index"])
    return frame.assign(tokens=tokens, answer_tokens=answer_tokens, model=model)


def run_sweep_cells(
    config: SweepOptions, folder: RunFolder, cell_trainer: CellTrainer, cells: Sequence[SweepCell], runner: Runner
) -> None:
    """Run the cells that the run folder lacks, print a line for each, and update `results.csv`."""
    save_adapter, tokens = config.save_adapters, sweep_runs.read_tokens(folder.path)

    def work(cell: SweepCell, cell_folder: Path) -> Mapping[str, Any]:
        return cell_trainer.run_cell(cell, cell_folder, save_adapter=save_adapter)

    def write(_: Sequence[Any]) -> None:
        folder.write_frame(results.results_table(sweep_runs.read_runs(folder.path), tokens))

    run_with_bar(cells, work, folder, runner=runner, describe=results.describe_result, write=write)


def collect_key_figures(best: pd.DataFrame, judged: Mapping[str, pd.DataFrame]) -> list[KeyFigure]:
    """Return the key figures of a matrix: losses and accuracies at the best rates, regret and exponents."""
    scope, loss = ("model", "method", "rank", "alpha", "learning_rate", "seed"), "validation loss, nats per token"
    figures = key_figures(best, loss, "validation_loss", "validation_error", over="records", scope=scope)
    scored = best[best["average"].notna()]
    figures += key_figures(scored, "average accuracy", "average", "average_error", over="items", scope=scope)
    samples, regret = "seeds and held-out records", "largest regret, nats per token"
    policy = ("changed", "policy", "pairs", "lower_bounds")
    figures += key_figures(judged["policies"], regret, "largest", "largest_error", over=samples, scope=policy)
    laws = ("law_low", "law_high", "verdict", "displacement_low", "displacement_high", "displacement_verdict")
    pair = ("step", "over", "at", "first", "second", *laws)
    return figures + key_figures(judged["exponents"], "exponent of the best rate", "exponent", scope=pair)


def report(
    ends: pd.DataFrame, best: pd.DataFrame, runs: int, judged: Mapping[str, pd.DataFrame], *, law: bool = True
) -> None:
    """Print the answer, the losses at the best rates, and the frames of the analysis.

    Args:
      ends: Rows of `results.csv` at the end of each run.
      best: The rows of the base model and of each method and rank at its best rate.
      runs: Number of runs.
      judged: Tables of the analysis.
      law: Whether the frames have the exponents of the law.
    """
    exponents = f" {analysis.describe_exponents(runs, judged['best'], judged['exponents'], law=law)}"
    answers.print_answer(results.describe_results(ends) + (exponents if len(judged["best"]) else ""))
    forms = {"model": "{model}", "method": "{method}", "rank": "{rank}", "alpha": "{alpha:g}", "seed": "{seed}"}
    forms |= {"steps": "{steps}", "rate": "{learning_rate:.3g}", "position in the grid": "{best_rate}"}
    forms |= {"validation loss": "{validation_loss:.4f} ({validation_error:.4f})"}
    forms["answers"] = "{answer_loss:.4f} ({answer_error:.4f})"
    if best["average"].notna().any():
        forms["accuracy"] = "{average:.3f} ({average_error:.3f})"
    title = "Each method and rank at its best rate (in brackets: standard errors over records and items)"
    tables.print_records(title, best, forms, left=2)
    print_analysis(judged)


def print_analysis(judged: Mapping[str, pd.DataFrame]) -> None:
    """Print a table of each frame of the analysis that is not empty."""
    # Settings in which the combinations of a matrix differ.
    variants = {name: f"{{{name}}}" for name in ("model", "adapter", *AXES) if name in judged["best"]}
    setting = {"steps": "{step}", "rank": "{size}", "gamma r": "{gain:g}"}
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
    pooled = {"steps": "{step}", "over": "{over}", "at": "{at}", "from, to": measured["from, to"]}
    pooled |= {"exponent, 95%": measured["exponent, 95%"], "seeds": "{seeds}"}
    pooled |= {"displacement law": "{displacement_verdict}", "constant gradient": "{verdict}"}
    # Which factor's part of the change is larger, after each run.
    larger_part = setting | {
        "rate": "{learning_rate:.3g}",
        "seed": "{seed}",
        "A part over B part": "{ratio:.2g} ({ratio_low:.2g} to {ratio_high:.2g})",
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
    # Best rates themselves, and the cost of carrying them to another setting.
    best = setting | {"rate": "{best_rate:.3g}", "loss": "{best_loss:.4f}", "edge": "{edge}"}
    interval = {"95%": "{low:.3g} to {high:.3g}", "edge": "{edge}"}
    judged_by = {"loss on": "{loss_on}", "estimate": "{estimate}"}
    rates = setting | judged_by | {"rate": "{best_rate:.3g}"} | interval
    ratios = setting | {"compared with": "{compared_with}"} | judged_by | {"ratio": "{ratio:.3g}"} | interval
    policies = {"changed setting": "{changed}", "policy": "{policy}"}
    policies |= {"median": "{median:.4f}", "largest": "{largest:.4f}", "lower bounds": "{lower_bounds}"}
    with_verdicts = judged["pooled"]
    if len(with_verdicts):
        with_verdicts = with_verdicts[with_verdicts["verdict"].notna()]
    # Print the tables that the run has data for.
    for title, frame, columns in (
        (
            "Best rates by the whole curve and by three points; intervals are for this sample of data",
            judged["rates"],
            rates,
        ),
        ("Ratios of best rates", judged["ratios"], ratios),
        ("Lowest losses, and best rates by the three lowest losses", judged["best"], best),
        ("Comparisons, each at its own best rate", judged["comparisons"], comparisons),
        ("Two values of gamma r at the same rate: difference of their losses", judged["one_rate"], one_rate),
        ("Exponents of the best rate, and those of the displacement law", judged["exponents"], displacement),
        ("Exponents of the best rate, and those of the law of a constant gradient", judged["exponents"], exponents),
        ("Exponents by whole curves, pooled: verdicts with more power", with_verdicts, pooled),
        ("Exponent of the best rate in the steps; -1/2 if entries walk at random", judged["steps"], steps),
        ("Larger part of the change, median over modules (5% to 95%)", judged["parts"], larger_part),
        ("Regret in nats per token; lower bounds: pairs with a rate outside the grid", judged["policies"], policies),
    ):
        if frame.empty:
            continue
        has_exponents = frame is judged["exponents"]
        with_labels = analysis.add_against_column if has_exponents else analysis.add_size_column
        left = 3 if has_exponents else list(columns).index("compared with") + 1 if "compared with" in columns else 0
        tables.print_records(title, with_labels(frame), variants | columns, left=len(variants) + left)


def print_cells(path: Path, cells: Sequence[SweepCell]) -> None:
    """Print the cells with their state."""
    rows = cell_states(cells, path)
    forms = {name.replace("_", " "): f"{{{name}}}" for name in ("model", "method", "key")}
    forms |= {name.replace("_", " "): f"{{{name}:.6g}}" for name in ("rank", "alpha", "gamma", "rate", "seed")}
    answers.print_answer(f"{sum(row['state'] == 'done' for row in rows)} of {len(cells)} cells are finished.")
    tables.print_records(f"{len(cells)} cells in {path}", rows, forms | {"state": "{state}"}, left=3)


main = cli.command(SweepOptions, run_matrix, __doc__)

if __name__ == "__main__":
    main()
