"""Fine-tune and score over methods x ranks x learning rates x seeds: one matrix that any number of processes share.

    python -m sims.rank_sweep --design fixed_alpha --data DATA/*/train.json --data-dir DATA --train-records 960
    python -m sims.rank_sweep --design fig1 --list

Every cell fine-tunes one adapter, merges it, and measures the loss on held-out training-distribution records (all
tokens, and the answers alone) and the accuracy on the eight tasks. A cell that is done is not done again: the same
command goes on where it was stopped, further ranks or seeds extend the folder, and further processes with the same
``--out`` help. `results.csv` has a line a cell, `differences.csv` the methods against the base and LoRA, record by
record; a cell's folder has its losses a record, its right answers and its training curve. A loss that is no number is
a result, ``diverged``.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rora_theory import adapters, llama
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data import sources
from rora_theory.data.prompts import Template
from rora_theory.data.tasks import TASKS, task_named
from rora_theory.data.tasks import Record as TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Protocol, Scoring
from rora_theory.finetune import FinetuneConfig, Trainer
from rora_theory.finetune.config import BaseDtype, LossOn, TrainTemplate
from rora_theory.rules import check_list, check_ranks
from rora_theory.scaling import check_integer, check_positive
from rora_theory.seeds import check_seed
from rora_theory.sweep import differences, results
from rora_theory.sweep.cells import Cell, cells_of, check_cells, identity
from rora_theory.sweep.design import DESIGNS, AlphaRule, Design
from rora_theory.sweep.records import RecordSplit, Shares, draw_records
from rora_theory.sweep.results import Outcome
from rora_theory.sweep.workbench import Measured, Workbench
from sims.common import cli, matrix, tables
from sims.common.progress import progress_bar
from sims.finetune import METRICS, Metrics

NAME = "rank_sweep"


@dataclass(frozen=True)
class Config:
    """Which cells, and how each is trained and measured. What is not given is the design's."""

    data: tuple[str, ...] = ()
    """training files in the LLM-Adapters schema, .json or .jsonl, or hf://datasets/OWNER/NAME[@REVISION]/FILE"""
    design: Literal["grid", "fixed_alpha", "alpha_2r", "tuned_rate", "fig1", "fig3", "table1", "table2"] = "grid"
    """fixed_alpha: alpha the same at every rank; alpha_2r: alpha = 2 r; tuned_rate: the best of several learning rates
    for each method and rank; fig1, fig3, table1, table2: the paper's; grid: whatever is given"""
    model: tuple[str, ...] | None = None
    """one or more: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    methods: tuple[str, ...] | None = None
    """any of base prefix series parallel lora dora rora quarter dora-rora; base is the model alone"""
    ranks: tuple[int, ...] | None = None
    """ranks of the adapter"""
    alpha_rule: AlphaRule | None = None
    """fixed: --alpha at every rank; 2r: twice the rank"""
    tuned: bool | None = None
    """choose each method's rate at the first seed by validation loss, and run the other seeds at it"""
    alpha: float = 64.0
    """strength of the adapter, before the rule divides it; not read under 2r"""
    rates: tuple[float, ...] | None = None
    """peak learning rates; none is the published one of each method: 3e-4, for dora 2e-4 (LLaMA-3: 1e-4), for prefix
    3e-2; or its grid where they are tuned"""
    seeds: tuple[int, ...] | None = None
    """seeds of initialisation, order and dropout; methods of one rank and seed share the first two"""

    train_records: int | None = None
    """a seeded sample of so many training records; none is all that are not held out"""
    held_out: int = 512
    """records of the training files set aside for the validation loss, the same for every cell"""
    shares: Shares = "equal"
    """what each training file gives to both: as many as the others, or in proportion to its size"""
    data_seed: int = 42
    """seed of the two samples"""
    steps: int | None = None
    """steps of a cell, at most the epochs'; the learning-rate schedule ends there"""
    epochs: int = 3
    """passes over the training records"""
    batch: int = 16
    """records a step"""
    accumulation: int = 1
    """parts a batch is worked in, one after another, to save memory"""
    warmup: int = 100
    """steps of linear warm-up from 0, before the linear decay to 0"""
    dropout: float = 0.05
    """dropout of a low-rank adapter's input; the others have none, as published"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    template: TrainTemplate = "train"
    """training prompt: train (published, to the byte) or clean"""
    cutoff: int = 256
    """longest training example in tokens"""
    loss_on: LossOn = "all"
    """tokens in the training loss"""
    widths: int = 6
    """padded lengths that batches come in, each compiled once"""
    dtype: BaseDtype | None = None
    """type of the frozen base weights; none is float32, in the paper's designs bfloat16"""
    remat: bool | Literal["mlp"] = False
    """made again in the backward pass, to save memory: False, mlp or True"""
    checkpoint_every: int = 500
    """steps between two checkpoints of a cell; a shorter cell has none and begins anew when it is stopped"""
    save_adapters: bool = False
    """keep each cell's adapter in PEFT's format"""

    accuracy: bool = True
    """score the tasks; False measures the losses alone"""
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
    batch_size: int = 8
    """generate: prompts at once; label and harness: device calls in flight"""

    out: Path | None = None
    """folder of the matrix; none is results/rank_sweep/ID. An existing one is continued and may grow"""
    attempts: int = 3
    """most attempts at a cell, over all runs and processes; an interrupted one (Ctrl-C, SIGTERM) does not count, a
    killed one does"""
    list: bool = False
    """print the cells with their state and run nothing"""

    def the_design(self) -> Design:
        """The named design with what the command line gives in its place."""
        given: dict[str, Any] = {
            "models": self.model,
            "methods": self.methods,
            "ranks": self.ranks,
            "rates": self.rates,
        }
        given |= {name: getattr(self, name) for name in ("seeds", "alpha_rule", "tuned", "protocol", "dtype")}
        changes = {name: value for name, value in given.items() if value is not None}
        return replace(DESIGNS[self.design], **changes)

    def scoring(self) -> Scoring:
        """The evaluation protocol with its settings."""
        return Scoring(self.the_design().protocol, self.eval_template)

    def training(self) -> FinetuneConfig:
        """What the fine-tuning runs of all cells share."""
        names = ("alpha", "targets", "dropout", "template", "cutoff", "loss_on", "widths", "epochs", "batch")
        own = {name: getattr(self, name) for name in (*names, "accumulation", "warmup", "remat")}
        return FinetuneConfig(validation=0, max_steps=self.steps, dtype=self.the_design().dtype, **own)

    def records(self) -> RecordSplit:
        """Training and held-out records. Raises `InputError` as `draw_records`."""
        return draw_records(
            self.data,
            held_out=self.held_out,
            train_records=self.train_records,
            shares=self.shares,
            seed=self.data_seed,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit status 1 where cells have failed."""

    def run() -> None:
        config = cli.parse(Config, argv, description=(__doc__ or "").split("\n", 1)[0])
        if not sweep(config):
            sys.exit(1)

    cli.run(run)


def sweep(config: Config) -> bool:
    """Check everything that can be checked, then do what the matrix lacks; whether no cell has failed."""
    design, training = config.the_design(), config.training()
    check(config, design)
    records = config.records()
    tasks, evaluation = read_tasks(config)
    revision = config.revision
    make = partial(cells_of, design, training, revision=revision, data=records.summary, evaluation=evaluation)
    first = make(stage=0)
    located = {name: llama.locate(name, revision) for name in design.models}
    models = check_cells(first, located)
    shared = identity(design, training, records, evaluation, located, revision=revision)
    path = config.out or Path("results") / NAME / matrix.key_of(shared)[:12]
    if config.list:
        show(config, path, first)
        return True
    bench = Workbench(
        training,
        records,
        tasks,
        located,
        scoring=config.scoring(),
        score_batch_size=config.batch_size,
        checkpoint_every=config.checkpoint_every,
    )
    cli.tell(bench.open(first[0].model))
    folder = matrix.Matrix(path, NAME, shared)
    folder.update({"command": sys.argv[1:], "design": config.design}, models=models)
    whole = work(config, folder, bench, first)
    if design.tuned and len(design.seeds) > 1:
        if all(cell.status().state == "done" for cell in whole):
            whole += work(config, folder, bench, make(stage=1, rates=choose_rates(folder, first)))
        else:
            print("the other seeds wait: not all learning rates have been tried at the first", flush=True)
    statuses = [cell.status() for cell in whole]
    failed = [cell for cell, status in zip(whole, statuses, strict=True) if status.state != "done"]
    for cell in failed:
        print(f"not done: {cell.path} ({cell.status().error or cell.status().state})", flush=True)
    folder.write_table(lambda: differences_of(folder), "differences.csv")
    folder.finish("failed" if failed else "complete")
    print(f"{path}: {len(whole) - len(failed)} of {len(whole)} cells done; results.csv", flush=True)
    return not failed


def differences_of(folder: matrix.Matrix) -> str:
    """`differences.csv` from every finished cell in the folder."""
    return differences.as_csv(differences.method_differences(results.table(outcomes(folder)), folder.cells_path))


def outcomes(folder: matrix.Matrix) -> Iterator[Outcome]:
    """How far every cell has come that was begun."""
    for place in folder.begun():
        result, status = place.result(), place.status()
        yield Outcome(place.key, place.config, status.state, status.attempts, result)


def check(config: Config, design: Design) -> None:
    """Raise `InputError` for a value out of range."""
    check_ranks(design.ranks, fewest=1)
    if design.rates is not None:
        check_list("--rates", design.rates)
        for rate in design.rates:
            check_positive("--rates", rate)
    least = {"train_records": 1, "held_out": 2, "steps": 1, "limit": 1, "batch_size": 1, "attempts": 1}
    cli.check_integers(config, **least)
    check_integer("checkpoint_every", config.checkpoint_every)
    check_seed(config.data_seed, "data_seed")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise InputError(f"tasks are {' '.join(config.tasks)!r}; accepted are one or more, each once")
    for key in config.tasks:
        task_named(key)
    config.scoring()


def read_tasks(config: Config) -> tuple[dict[str, list[TaskRecord]], dict[str, Any] | None]:
    """Items of each task, and what determines their scoring; nothing and None without accuracy."""
    if not config.accuracy:
        return {}, None
    tasks, digests = sources.read_tasks(
        config.data_dir, config.tasks, config.limit, otherwise="a folder with TASK/test.json, or --no-accuracy"
    )
    return tasks, asdict(config.scoring()) | {"limit": config.limit, "data": digests}


def work(config: Config, folder: matrix.Matrix, bench: Workbench, cells: Sequence[Cell]) -> list[matrix.Place]:
    """Do the cells that the matrix lacks, with a line for each; `results.csv` follows."""
    places = [place_of(folder.cells_path, folder.config, cell) for cell in cells]

    def seen(index: int, status: matrix.Status) -> None:
        if status.state in ("dead", "failed"):
            again = (
                "tried again"
                if status.attempts < config.attempts
                else f"given up, most is {config.attempts} (--attempts)"
            )
            why = status.error or "its process was gone before it had a result"
            print(f"{cells[index].label}: attempt {status.attempts}: {why}; {again}", flush=True)

    def run(index: int, path: Path) -> Mapping[str, Any]:
        cell = cells[index]
        cli.tell(bench.open(cell.model))
        measured = bench.run(cell, path / "checkpoints", partial(follow, path))
        keep(path, measured, bench, adapter=config.save_adapters)
        return measured.result

    def table() -> str:
        return results.table_csv(outcomes(folder))

    done = 0
    with progress_bar("cells", len(cells), fields="{cell}") as bar:
        for worked in matrix.work_through(places, run, most=config.attempts, seen=seen):
            done += 1
            folder.write_table(table)
            print(
                f"[{worked.index + 1}/{len(cells)}] {line(cells[worked.index], places[worked.index], worked)}",
                flush=True,
            )
            bar.advance(1, cell=cells[worked.index].label)
    if not done:
        folder.write_table(table)
    return places


def follow(path: Path, trainer: Trainer) -> list[float]:
    """Run a cell's trainer to its end, its events in the cell's folder; the losses of all its steps."""
    metrics = Metrics(path / METRICS, trainer, path.name)
    for event in trainer.run():
        metrics.add(event)
    return [event["loss"] for event in metrics.events]


def keep(path: Path, measured: Measured, bench: Workbench, *, adapter: bool) -> None:
    """Write a cell's losses a record and answers an item, and its adapter where that is asked for."""
    if adapter and measured.adapter is not None:
        adapters.save_peft(path / "adapter", measured.adapter, base_model=bench.model.origin)
    if measured.losses:
        results.write_losses(path / results.LOSSES, bench.records.held_out, measured.losses)
    if measured.samples:
        results.write_answers(path / results.ANSWERS, measured.samples)


def place_of(cells: Path, config: Mapping[str, Any], cell: Cell) -> matrix.Place:
    """Where a cell is done: for one that is not to be scored, its scored twin where that is done already.

    Args:
      cells: the folder of the cells.
      config: of the matrix, see `identity`.
      cell: which.
    """
    scored = config.get("evaluation")
    if cell.evaluation is None and scored is not None:
        twin = matrix.Place(cells, replace(cell, evaluation=scored))
        if twin.status().state == "done":
            return twin
    return matrix.Place(cells, cell)


def line(cell: Cell, place: matrix.Place, worked: matrix.Worked) -> str:
    """A finished cell in words."""
    result = place.result()
    if result is None:
        return f"{cell.label}: failed ({worked.status.error}) after {worked.seconds:.0f} s"
    if result["status"] == "diverged":
        return f"{cell.label}: diverged at step {result['diverged_at']} after {worked.seconds:.0f} s"
    text = f"{cell.label}: loss {result['validation_loss']:.4f} ± {result['validation_error']:.4f}"
    text += f", answers {result['answer_loss']:.4f} ± {result['answer_error']:.4f}"
    if "levels" in result:
        last = result["levels"][-1]
        text += f", {last['task']} {100 * last['accuracy']:.1f} ± {100 * last['error']:.1f} %"
        text += f" ({100 * last['unparsed']:.1f} % unparsed)" if last["unparsed"] else ""
    parts = [
        f"{name} {result[f'{name}_seconds']:.0f}"
        for name in ("train", "loss", "accuracy")
        if f"{name}_seconds" in result
    ]
    return f"{text}, {worked.seconds:.0f} s ({', '.join(parts)})"


def choose_rates(folder: matrix.Matrix, cells: Sequence[Cell]) -> dict[tuple[str, str, int | None], float]:
    """The best learning rate of each model, method and rank among the cells, see `results.best_rates`."""
    keys = {place_of(folder.cells_path, folder.config, cell).key for cell in cells}
    rows = [row for row in results.table(outcomes(folder)) if row["key"] in keys]
    chosen = {}
    for (model, method, rank, _), (rate, word) in results.best_rates(rows).items():
        size = f" r={rank}" if rank else ""
        edge = "; it is at the edge of the rates tried: the best may lie beyond" if word == "edge" else ""
        print(f"{model}: {method}{size}: learning rate {float(rate):g}{edge}", flush=True)
        chosen[model, method, int(rank) if rank else None] = float(rate)
    return chosen


def show(config: Config, path: Path, cells: Sequence[Cell]) -> None:
    """Print the cells with their state."""
    rows = []
    shared = matrix.config_of(path)
    for cell in cells:
        place = place_of(path / "cells", shared, cell)
        status = place.status()
        words = [cell.model, cell.method, place.key]
        figures = [cell.rank, cell.alpha, cell.gamma, cell.learning_rate, cell.seed]
        state = f"{status.state}" + (f" ({status.attempts})" if status.attempts > 1 else "")
        rows.append([*words, *("" if value is None else f"{value:.6g}" for value in figures), state])
    columns = ("model", "method", "key", "rank", "alpha", "gamma", "learning rate", "seed", "state")
    tables.print_table(f"{config.design}: {len(cells)} cells in {path}", columns, rows, left=3)


if __name__ == "__main__":
    main()
