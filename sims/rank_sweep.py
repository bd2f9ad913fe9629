"""Fine-tune and score a matrix of methods, ranks, learning rates and seeds, which can be resumed and extended.

    python -m sims.rank_sweep --design fixed_alpha --data DATA/*/train.json --data-dir DATA --train-records 960
    python -m sims.rank_sweep --design fig1 --data DATA/*/train.json --data-dir DATA --list

Every cell fine-tunes one adapter, merges it, and measures the loss on held-out records of the training files (on all
tokens, and on the answers) and the accuracy on the eight tasks. The same command resumes an interrupted run and repeats
failed cells; finished cells are not run again, and more ranks or seeds extend the run folder.

`results.csv` has one row per cell. `differences.csv` compares the methods with the base model and with LoRA, record by
record. The folder of a cell contains the loss of each record, the correct answers and the training curve. A loss that
is not finite is a result, ``diverged``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.errors import FailedError
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep import differences, results
from rora_theory.lab.sweep.cells import SweepCell, cell_states, describe_models, replace_with_scored
from rora_theory.lab.sweep.design import BASE
from rora_theory.lab.sweep.plan import SweepConfig, plan_sweep
from rora_theory.lab.sweep.workbench import Workbench
from rora_theory.runs.cells import CELLS_FOLDER
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import key_figures
from sims.common import answers, cli, prompts, tables
from sims.common.cells import Runner, run_with_bar
from sims.common.summaries import summarised

NAME = "rank_sweep"

CELL_SETTINGS = (
    "method", "rule", "rank", "lr", "seed", "dtype", "quantization", "rank_pattern", "alpha_pattern", "virtual_tokens",
    "bottleneck", "non_linearity", "evaluate_every",
)  # fmt: skip
"""Training settings that the cells determine, or that are as published; they are not options."""

_Shared: Any = cli.without_options(FinetuneConfig, *CELL_SETTINGS)


@dataclass(frozen=True)
class Training(_Shared):
    """Options of the fine-tuning runs of all cells."""

    held_out: int = 512
    """Number of records of the training files that are held out for the validation loss, the same for every cell"""
    checkpoint_every: int = 500
    """Number of steps between two checkpoints of a cell; an interrupted cell without a checkpoint starts again"""


@dataclass(frozen=True)
class Config(SweepConfig):
    """Options of the matrix. The design determines the defaults."""

    data: cli.Data
    revision: cli.Revision = None
    training: Training = field(default_factory=Training)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    save_adapters: bool = False
    """Save the adapter of each cell in PEFT's format, or the model for full"""
    out: Path | None = None
    """Run folder; by default results/rank_sweep/ID. An existing matrix is resumed and may grow"""
    list: bool = False
    """Print the cells with their state, without running them"""


def run(config: Config) -> None:
    """Validate the inputs, run the cells that the run folder lacks, and report."""
    plan = plan_sweep(config)
    # The scoring may be added later to finished cells, so it can extend the identity.
    first_cells, identity, extensible = plan.cells(), plan.identity(), {"evaluation": plan.evaluation}
    models = describe_models(first_cells, plan.located)
    path = path_of(NAME, identity | extensible, config.out)
    if config.list:
        print_cells(config.design, path, first_cells)
        return
    # The data and the base model that all cells share.
    check_free(path)
    runner = config.cluster.runner()
    scoring: dict[str, Any] = {"scoring": plan.scoring, "score_batch_size": config.score_batch_size}
    bench = Workbench(plan.training, plan.records, plan.tasks, plan.located, **scoring)
    cli.print_notes(bench.open(first_cells[0].model))
    extra, located = {"design": config.design, "models": models}, plan.located.values()
    folder = RunFolder.open(
        NAME, identity, out=path, seed=config.data_seed, extra=extra, extensible=extensible, models=located
    )
    prompts.print_summary(plan.records.source, plan.training.template)
    prompts.save_prompts(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    # Run the cells; a tuned design then repeats the best rate of each method and rank with the other seeds.
    failed = None
    try:
        run_cells(config, folder, bench, first_cells, runner)
        if plan.design.tuned and len(plan.design.seeds) > 1:
            best = results.marked_rates(results.read_results(path, replace_with_scored(first_cells, path)))
            for description in results.describe_rates(best):
                print(description, flush=True)
            run_cells(config, folder, bench, plan.cells(1, best), runner)
    # A failed cell does not stop the others: write their results before ending with its error.
    except FailedError as error:
        failed = error
    rows = results.read_results(path)
    method_differences = differences.method_differences(rows, path / CELLS_FOLDER)
    folder.write_frame(differences.difference_table(method_differences), "differences.csv")
    if failed is not None:
        raise failed
    # Report the cells at the best rate of each method and rank.
    best = rows[rows["best_rate"].notna() | (rows["method"] == BASE)]
    scope, loss = ("model", "method", "rank", "alpha", "learning_rate", "seed"), "validation loss, nats per token"
    figures = key_figures(best, loss, "validation_loss", "validation_error", over="records", scope=scope)
    scored = best[best["average"].notna()]
    figures += key_figures(scored, "average accuracy", "average", "average_error", over="items", scope=scope)
    with summarised(folder, figures):
        report(rows)
    folder.finish()
    answers.print_files(path)


def run_cells(config: Config, folder: RunFolder, bench: Workbench, cells: Sequence[SweepCell], runner: Runner) -> None:
    """Run the cells that the run folder lacks, print a line for each, and update `results.csv`.

    Args:
      config: Options of the matrix.
      folder: Run folder.
      bench: Model, records and tasks.
      cells: Cells to run.
      runner: Function that runs the cells, in this process or on a cluster.
    """
    save_adapter = config.save_adapters

    def work(cell: SweepCell, cell_folder: Path) -> Mapping[str, Any]:
        cli.print_notes(bench.open(cell.model))
        return bench.run(cell, cell_folder, save_adapter=save_adapter)

    def write(_: Sequence[Any]) -> None:
        folder.write_frame(results.read_results(folder.path))

    # A cell that an earlier command has scored is not run again without scoring.
    cells = replace_with_scored(cells, folder.path)
    run_with_bar(cells, work, folder, runner=runner, describe=results.describe_result, write=write)


def report(rows: pd.DataFrame) -> None:
    """Print the lowest validation loss, and the losses of each method and rank at its best rate."""
    answers.print_answer(results.describe_results(rows))
    forms = {"model": "{model}", "method": "{method}", "rank": "{rank}", "alpha": "{alpha:g}", "seed": "{seed}"}
    forms |= {"rate": "{learning_rate:.3g}", "position in the grid": "{best_rate}"}
    forms |= {"validation loss": "{validation_loss:.4f} ± {validation_error:.4f}"}
    forms |= {"answers": "{answer_loss:.4f} ± {answer_error:.4f}", "accuracy": "{average:.3f} ± {average_error:.3f}"}
    best = rows[rows["best_rate"].notna() | (rows["method"] == BASE)]
    tables.print_records(
        "Each method and rank at its best rate (± one standard error over records and items)",
        best,
        forms,
        left=2,
        keys=5,
    )


def print_cells(design: str, path: Path, cells: Sequence[SweepCell]) -> None:
    """Print the cells with their state."""
    rows = cell_states(cells, path)
    forms = {name.replace("_", " "): f"{{{name}}}" for name in ("model", "method", "key")}
    forms |= {name.replace("_", " "): f"{{{name}:.6g}}" for name in ("rank", "alpha", "gamma", "learning_rate", "seed")}
    answers.print_answer(f"{sum(row['state'] == 'done' for row in rows)} of {len(cells)} cells are finished.")
    tables.print_records(f"{design}: {len(cells)} cells in {path}", rows, forms | {"state": "{state}"}, left=3)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
