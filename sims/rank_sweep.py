"""Fine-tune and score over methods x ranks x learning rates x seeds: a matrix that goes on and may grow.

    python -m sims.rank_sweep --design fixed_alpha --data DATA/*/train.json --data-dir DATA --train-records 960
    python -m sims.rank_sweep --design fig1 --data DATA/*/train.json --data-dir DATA --list

Every cell fine-tunes one adapter, merges it, and measures the loss on held-out training-distribution records (all
tokens, and the answers alone) and the accuracy on the eight tasks. A cell that is done is not done again: the same
command goes on where it was stopped, tries again what failed, and further ranks or seeds extend the folder.
`results.csv` has a line a cell, `differences.csv` the methods against the base and LoRA, record by record; a cell's
folder has its losses a record, its right answers and its training curve. A loss that is no number is a result,
``diverged``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory import llama
from rora_theory.cluster import ClusterConfig
from rora_theory.errors import FailedError
from rora_theory.finetune import FinetuneConfig
from rora_theory.runs.cells import FOLDERS
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import key_figures
from rora_theory.sweep import differences, results
from rora_theory.sweep.cells import SweepCell, cell_states, check_cells, replace_with_scored
from rora_theory.sweep.design import BASE
from rora_theory.sweep.memory import cell_memory
from rora_theory.sweep.plan import SweepConfig, plan_sweep
from rora_theory.sweep.workbench import Workbench
from sims.common import answers, cli, prompts, tables
from sims.common.cells import Runner, run_with_bar
from sims.common.summaries import summarised

NAME = "rank_sweep"


OWN = (
    "method", "rule", "rank", "lr", "seed", "dtype", "quantization", "rank_pattern", "alpha_pattern", "virtual_tokens",
    "bottleneck", "non_linearity", "evaluate_every",
)  # fmt: skip
"""Settings that are a cell's own, or as published: no options."""

_Shared: Any = cli.fixed(FinetuneConfig, *OWN)


@dataclass(frozen=True)
class Training(_Shared):
    """What the fine-tuning runs of all cells share."""

    held_out: int = 512
    """records of the training files set aside for the validation loss, the same for every cell"""
    checkpoint_every: int = 500
    """steps between two checkpoints of a cell; a shorter cell has none and begins anew when it is stopped"""


@dataclass(frozen=True)
class Config(SweepConfig):
    """Which cells, and how each is trained and measured. What is not given is the design's."""

    data: cli.Data
    revision: cli.Revision = None
    training: Training = field(default_factory=Training)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    save_adapters: bool = False
    """keep each cell's adapter in PEFT's format; of full, the model"""
    out: Path | None = None
    """folder of the matrix; none is results/rank_sweep/ID. An existing one is continued and may grow"""
    list: bool = False
    """print the cells with their state and run nothing"""


def run(config: Config) -> None:
    """Check everything that can be checked, then do what the folder lacks."""
    plan = plan_sweep(config)
    first, shared, extensible = plan.cells(), plan.identity(), {"evaluation": plan.evaluation}
    models = check_cells(first, plan.located)
    path = path_of(NAME, shared | extensible, config.out)
    if config.list:
        show(config.design, path, first)
        return
    check_free(path)
    configs = {name: llama.model_config(found) for name, found in plan.located.items()}
    runner = config.cluster.runner(lambda cell: cell_memory(configs[cell.model], cell.training, cell.dtype))
    scored: dict[str, Any] = {"scoring": plan.scoring, "score_batch_size": config.score_batch_size}
    bench = Workbench(plan.training, plan.records, plan.tasks, plan.located, **scored)
    cli.tell(bench.open(first[0].model))
    extra, located = {"design": config.design, "models": models}, plan.located.values()
    folder = RunFolder.open(
        NAME, shared, out=path, seed=config.data_seed, extra=extra, extensible=extensible, models=located
    )
    prompts.tell(plan.records.source, plan.training.template)
    prompts.keep(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    failed = None
    try:
        work(config, folder, bench, first, runner)
        if plan.design.tuned and len(plan.design.seeds) > 1:
            best = results.marked_rates(results.read_results(path, replace_with_scored(first, path)))
            for words in results.describe_rates(best):
                print(words, flush=True)
            work(config, folder, bench, plan.cells(1, best), runner)
    except FailedError as error:
        failed = error
    rows = results.read_results(path)
    apart = differences.method_differences(rows, path / FOLDERS)
    folder.write_frame(differences.difference_table(apart), "differences.csv")
    if failed is not None:
        raise failed
    best = rows[rows["best_rate"].notna() | (rows["method"] == BASE)]
    scope, loss = ("model", "method", "rank", "alpha", "learning_rate", "seed"), "validation loss, nats per token"
    figures = key_figures(best, loss, "validation_loss", "validation_error", over="records", scope=scope)
    scored = best[best["average"].notna()]
    figures += key_figures(scored, "average accuracy", "average", "average_error", over="items", scope=scope)
    with summarised(folder, figures):
        report(rows)
    folder.finish()
    answers.tell_files(path)


def work(config: Config, folder: RunFolder, bench: Workbench, cells: Sequence[SweepCell], runner: Runner) -> None:
    """Do the cells that the folder lacks, with a line for each; `results.csv` follows."""
    save_adapter = config.save_adapters

    def do(cell: SweepCell, own: Path) -> Mapping[str, Any]:
        cli.tell(bench.open(cell.model))
        return bench.run(cell, own, save_adapter=save_adapter)

    def write(_: Sequence[Any]) -> None:
        folder.write_frame(results.read_results(folder.path))

    run_with_bar(
        replace_with_scored(cells, folder.path), do, folder, runner=runner, words=results.describe_result, write=write
    )


def report(rows: pd.DataFrame) -> None:
    """Print the lowest validation loss, and that of each method and rank at its best rate."""
    answers.say(results.describe_results(rows))
    forms = {"model": "{model}", "method": "{method}", "rank": "{rank}", "alpha": "{alpha:g}", "seed": "{seed}"}
    forms |= {"rate": "{learning_rate:.3g}", "of those tried": "{best_rate}"}
    forms |= {"validation loss": "{validation_loss:.4f} ± {validation_error:.4f}"}
    forms |= {"answers": "{answer_loss:.4f} ± {answer_error:.4f}", "accuracy": "{average:.3f} ± {average_error:.3f}"}
    best = rows[rows["best_rate"].notna() | (rows["method"] == BASE)]
    tables.print_records(
        "Each method and rank at its best rate (± over records and items)", best, forms, left=2, keys=5
    )


def show(design: str, path: Path, cells: Sequence[SweepCell]) -> None:
    """Print the cells with their state."""
    rows = cell_states(cells, path)
    forms = {name.replace("_", " "): f"{{{name}}}" for name in ("model", "method", "key")}
    forms |= {name.replace("_", " "): f"{{{name}:.6g}}" for name in ("rank", "alpha", "gamma", "learning_rate", "seed")}
    answers.say(f"{sum(row['state'] == 'done' for row in rows)} of {len(cells)} cells are there.")
    tables.print_records(f"{design}: {len(cells)} cells in {path}", rows, forms | {"state": "{state}"}, left=3)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
