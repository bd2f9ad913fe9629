"""Fine-tune and score over methods x ranks x learning rates x seeds: a matrix that goes on and may grow.

    python -m sims.rank_sweep --design fixed_alpha --data DATA/*/train.json --data-dir DATA --train-records 960
    python -m sims.rank_sweep --design fig1 --list

Every cell fine-tunes one adapter, merges it, and measures the loss on held-out training-distribution records (all
tokens, and the answers alone) and the accuracy on the eight tasks. A cell that is done is not done again: the same
command goes on where it was stopped, tries again what failed, and further ranks or seeds extend the folder.
`results.csv` has a line a cell, `differences.csv` the methods against the base and LoRA, record by record; a cell's
folder has its losses a record, its right answers and its training curve. A loss that is no number is a result,
``diverged``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tyro.conf import Fixed

from rora_theory import llama
from rora_theory.adapters.bottleneck import NonLinearity
from rora_theory.cluster import ClusterConfig
from rora_theory.data import sources
from rora_theory.data.prompts import Template
from rora_theory.data.records import DataConfig
from rora_theory.data.tasks import TASKS
from rora_theory.errors import FailedError
from rora_theory.evaluate.scoring import Protocol, Scoring
from rora_theory.finetune import FinetuneConfig
from rora_theory.finetune.config import BaseDtype, Method
from rora_theory.llama.quantised import Quantization
from rora_theory.rules import check_integers
from rora_theory.runs.cells import ERROR, FOLDERS
from rora_theory.runs.folder import RunFolder, check_free
from rora_theory.runs.reading import finished, key_of
from rora_theory.scaling import Rule
from rora_theory.sweep import differences, results
from rora_theory.sweep.cells import SweepCell, cells_of, check_cells, stand_ins, sweep_identity
from rora_theory.sweep.design import BASE, DESIGNS, AlphaRule, Design
from rora_theory.sweep.memory import cell_memory
from rora_theory.sweep.records import Shares, draw_records
from rora_theory.sweep.workbench import Workbench
from sims.common import answers, cli, prompts, tables
from sims.common.cells import Runner, run_cells

NAME = "rank_sweep"


@dataclass(frozen=True)
class Training(FinetuneConfig):
    """What the fine-tuning runs of all cells share: all but what is a cell's own, or as published."""

    method: Fixed[Method] = "lora"
    rule: Fixed[Rule] = "rora"
    rank: Fixed[int] = 32
    lr: Fixed[float | None] = None
    seed: Fixed[int] = 42
    dtype: Fixed[BaseDtype] = "float32"
    quantization: Fixed[Quantization] = "none"
    rank_pattern: Fixed[dict[str, int]] = field(default_factory=dict)
    alpha_pattern: Fixed[dict[str, float]] = field(default_factory=dict)
    virtual_tokens: Fixed[int] = 10
    bottleneck: Fixed[int] = 256
    non_linearity: Fixed[NonLinearity] = "tanh"
    evaluate_every: Fixed[int] = 80
    held_out: int = 512
    """records of the training files set aside for the validation loss, the same for every cell"""
    checkpoint_every: int = 500
    """steps between two checkpoints of a cell; a shorter cell has none and begins anew when it is stopped"""


@dataclass(frozen=True)
class Config:
    """Which cells, and how each is trained and measured. What is not given is the design's."""

    data: cli.Data = ()
    reading: DataConfig = field(default_factory=DataConfig)
    design: Literal["grid", "fixed_alpha", "alpha_2r", "tuned_rate", "fig1", "fig3", "table1", "table2"] = "grid"
    """fixed_alpha: alpha the same at every rank; alpha_2r: alpha = 2 r; tuned_rate: the best of several learning rates
    for each method and rank; fig1, fig3, table1, table2: the paper's; grid: whatever is given"""
    model: tuple[str, ...] | None = None
    """one or more: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: cli.Revision = None
    methods: tuple[str, ...] | None = None
    """any of base full prefix series parallel lora dora rora quarter dora-rora; base is the model alone, full trains
    the targets' own weights"""
    ranks: tuple[int, ...] | None = None
    """ranks of the adapter"""
    alpha_rule: AlphaRule | None = None
    """fixed: --alpha at every rank; 2r: twice the rank, whatever --alpha is"""
    tuned: bool = False
    """choose each method's rate at the first seed by validation loss, and run the other seeds at it, as tuned_rate"""
    lrs: tuple[float, ...] | None = None
    """peak learning rates; none is the published one of each method: 3e-4, for dora 2e-4 (LLaMA-3: 1e-4), for prefix
    3e-2, for full 2e-5; or its grid where they are tuned"""
    seeds: tuple[int, ...] | None = None
    """seeds of initialisation, order and dropout; methods of one rank and seed share the first two"""
    dtype: BaseDtype | None = None
    """type of the frozen base weights; none is float32, in the paper's designs bfloat16"""

    train_records: int | None = None
    """a seeded sample of so many training records; none is all that are not held out"""
    shares: Shares = "equal"
    """what each training file gives to both samples: as many as the others, or in proportion to its size"""
    data_seed: int = 42
    """seed of the samples of training and held-out records"""
    training: Training = field(default_factory=Training)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    save_adapters: bool = False
    """keep each cell's adapter in PEFT's format; of full, the model"""

    accuracy: bool = True
    """score the tasks; without it the losses alone are measured"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks to score"""
    protocol: Protocol | None = None
    """label, generate (the papers') or harness, see sims.evaluate; none is label, in the paper's designs generate"""
    eval_template: Template | None = None
    """prompt of label (none is train) and generate (none is eval)"""
    limit: int | None = None
    """score only the first so many items of each task"""
    data_dir: str | None = None
    """folder of the tasks, or hf://datasets/OWNER/NAME; none is the variable RORA_COMMONSENSE_DIR"""
    score_batch_size: int = 8
    """generate: prompts at once; label and harness: device calls in flight"""

    out: Path | None = None
    """folder of the matrix; none is results/rank_sweep/ID. An existing one is continued and may grow"""
    list: bool = False
    """print the cells with their state and run nothing"""

    def __post_init__(self) -> None:
        check_integers(self, limit=1, score_batch_size=1)

    def the_design(self) -> Design:
        """The named design with what the command line gives in its place."""
        names = ("methods", "ranks", "lrs", "seeds", "alpha_rule", "protocol", "dtype")
        given = {name: getattr(self, name) for name in names} | {"models": self.model, "tuned": self.tuned or None}
        return replace(DESIGNS[self.design], **{name: value for name, value in given.items() if value is not None})


def run(config: Config) -> None:
    """Check everything that can be checked, then do what the folder lacks."""
    design, revision = config.the_design(), config.revision
    training, scoring = replace(config.training, dtype=design.dtype), Scoring(design.protocol, config.eval_template)
    sample: dict[str, Any] = {name: getattr(config, name) for name in ("train_records", "shares")}
    sample |= {"held_out": training.held_out, "seed": config.data_seed}
    records = draw_records(config.data, **sample, config=config.reading)
    training = replace(training, template=records.source.template(training.template))
    tasks: dict[str, Any] = {}
    evaluation: dict[str, Any] | None = None
    if config.accuracy:
        otherwise = "a folder with TASK/test.json, or --no-accuracy"
        tasks, digests = sources.read_tasks(config.data_dir, config.tasks, config.limit, otherwise=otherwise)
        evaluation = asdict(scoring) | {"limit": config.limit, "data": digests}
    make = partial(cells_of, design, training, revision=revision, data=records.summary, evaluation=evaluation)
    first = make(stage=0)
    located = {name: llama.locate(name, revision) for name in design.models}
    models = check_cells(first, located)
    shared = sweep_identity(design, training, records, located, revision=revision)
    path = config.out or Path("results") / NAME / key_of(shared | {"evaluation": evaluation})[:12]
    if config.list:
        show(config.design, path, first)
        return
    check_free(path)
    configs = {name: llama.model_config(found) for name, found in located.items()}
    runner = config.cluster.runner(lambda cell: cell_memory(configs[cell.model], cell.training, cell.dtype))
    bench = Workbench(training, records, tasks, located, scoring=scoring, score_batch_size=config.score_batch_size)
    cli.tell(bench.open(first[0].model))
    extra, grows = {"design": config.design, "models": models}, {"evaluation": evaluation}
    folder = RunFolder.open(
        NAME, shared, out=path, seed=config.data_seed, extra=extra, grows=grows, models=located.values()
    )
    prompts.tell(records.source, training.template)
    prompts.keep(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    failed = None
    try:
        work(config, folder, bench, first, runner)
        if design.tuned and len(design.seeds) > 1:
            best = results.marked_rates(results.read_results(path, stand_ins(first, path)))
            for words in results.rates_in_words(best):
                print(words, flush=True)
            work(config, folder, bench, make(stage=1, best=best), runner)
    except FailedError as error:
        failed = error
    rows = results.read_results(path)
    folder.write_frame(
        differences.difference_table(differences.method_differences(rows, path / FOLDERS)), "differences.csv"
    )
    if failed is not None:
        raise failed
    folder.finish()
    report(rows)
    answers.tell_files(path)


def work(config: Config, folder: RunFolder, bench: Workbench, cells: Sequence[SweepCell], runner: Runner) -> None:
    """Do the cells that the folder lacks, with a line for each; `results.csv` follows."""
    save_adapter = config.save_adapters

    def do(cell: SweepCell, own: Path) -> Mapping[str, Any]:
        cli.tell(bench.open(cell.model))
        return bench.run(cell, own, save_adapter=save_adapter)

    def write(_: Sequence[Any]) -> None:
        folder.write_frame(results.read_results(folder.path))

    run_cells(stand_ins(cells, folder.path), do, folder, runner=runner, words=results.result_in_words, write=write)


def report(rows: pd.DataFrame) -> None:
    """Print the lowest validation loss, and that of each method and rank at its best rate."""
    answers.say(results.results_in_words(rows))
    forms = {"model": "{model}", "method": "{method}", "rank": "{rank}", "alpha": "{alpha:g}", "seed": "{seed}"}
    forms |= {"rate": "{learning_rate:.3g}", "of those tried": "{best_rate}"}
    forms |= {"validation loss": "{validation_loss:.4f} ± {validation_error:.4f}"}
    forms |= {"answers": "{answer_loss:.4f} ± {answer_error:.4f}", "accuracy": "{average:.3f} ± {average_error:.3f}"}
    best = rows[rows["best_rate"].notna() | (rows["method"] == BASE)]
    tables.print_records("Each method and rank at its best rate (± over records and items)", best, forms, left=2)


def show(design: str, path: Path, cells: Sequence[SweepCell]) -> None:
    """Print the cells with their state."""
    rows, done = [], finished(path)
    for cell in stand_ins(cells, path):
        key = key_of(cell)
        state = "done" if key in done else "failed" if (path / FOLDERS / key / ERROR).exists() else "new"
        rows.append(vars(cell) | {"key": key, "state": state})
    forms = {name.replace("_", " "): f"{{{name}}}" for name in ("model", "method", "key")}
    forms |= {name.replace("_", " "): f"{{{name}:.6g}}" for name in ("rank", "alpha", "gamma", "learning_rate", "seed")}
    answers.say(f"{sum(row['state'] == 'done' for row in rows)} of {len(cells)} cells are there.")
    tables.print_records(f"{design}: {len(cells)} cells in {path}", rows, forms | {"state": "{state}"}, left=3)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
