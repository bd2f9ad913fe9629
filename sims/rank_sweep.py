"""Fine-tune and score over methods x ranks x learning rates x seeds: one matrix that any number of processes share.

    python -m sims.rank_sweep --design fixed_alpha --data DATA/*/train.json --data-dir DATA --train-records 960
    python -m sims.rank_sweep --design fig1 --list True

Every cell fine-tunes one adapter, merges it, and measures the loss on held-out training-distribution records (all
tokens, and the answers alone) and the accuracy on the eight tasks. A cell that is done is not done again: the same
command goes on where it was stopped, further ranks or seeds extend the folder, and further processes with the same
``--out`` help. `results.csv` has a line a cell, `differences.csv` the methods against the base and LoRA, record by
record; a cell's folder has its losses a record, its right answers and its training curve. A loss that is no number is
a result, ``diverged``.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory import digests, llama
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data import sources
from rora_theory.data.prompts import Template
from rora_theory.data.tasks import TASKS, task_named
from rora_theory.data.tasks import Record as TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate.levels import levels
from rora_theory.evaluate.scoring import Protocol, Scoring, score
from rora_theory.files import write_whole
from rora_theory.finetune import (
    Batches,
    Examples,
    FinetuneConfig,
    NonFiniteLossError,
    Record,
    Trainer,
    choose_widths,
    read_records,
    tokenize,
)
from rora_theory.finetune.config import LEARNING_RATES, BaseDtype, LossOn, TrainTemplate
from rora_theory.finetune.held_out import RecordLoss, mean_per_token, record_losses
from rora_theory.finetune.step import SharedSteps
from rora_theory.scaling import check_positive, scaling_factor
from rora_theory.seeds import check_seed
from sims import differences, rank_results
from sims.common import cli, matrix, scalings, tables
from sims.common.progress import progress_bar
from sims.common.run_folder import as_json
from sims.rank_results import BASE

NAME = "rank_sweep"


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables: its printed name, and what it sets in a fine-tuning run."""

    name: str
    settings: Mapping[str, Any]

    @property
    def ranked(self) -> bool:
        """Whether it has a rank, alpha and a scaling; the others are run once a seed, at their published size."""
        return self.settings["method"] in ("lora", "dora")


METHODS = {
    "prefix": Method("Prefix", {"method": "prefix"}),
    "series": Method("Series", {"method": "series"}),
    "parallel": Method("Parallel", {"method": "parallel"}),
    "lora": Method("LoRA", {"method": "lora", "rule": "lora"}),
    "dora": Method("DoRA", {"method": "dora", "rule": "lora"}),
    "rora": Method("RoRA", {"method": "lora", "rule": "rora"}),
    "quarter": Method("LoRA, alpha/r^(1/4)", {"method": "lora", "rule": 0.25}),
    "dora-rora": Method("DoRA with RoRA's scaling", {"method": "dora", "rule": "rora"}),
}
"""Methods by name. A new kind of adapter is one more line here."""

AlphaRule = Literal["fixed", "2r"]


@dataclass(frozen=True)
class Design:
    """What varies, where the command line does not say otherwise.

    Attributes:
      models: by hub id or built-in name.
      methods, ranks, seeds: every combination of these is a cell.
      alpha_rule: ``fixed``: `Config.alpha` at every rank; ``2r``: twice the rank, which makes alpha/r constant.
      rates: learning rates; None is each method's published one, or under ``tuned`` its grid, `RATE_GRIDS`.
      tuned: choose among the rates at the first seed by validation loss, a method and rank at a time, and run the
        other seeds at the chosen rate.
      protocol: of scoring.
      dtype: of the frozen base weights.
    """

    models: tuple[str, ...] = ("smollm2-135m",)
    methods: tuple[str, ...] = (BASE, "lora", "dora", "rora")
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    alpha_rule: AlphaRule = "fixed"
    rates: tuple[float, ...] | None = None
    seeds: tuple[int, ...] = (0, 1)
    tuned: bool = False
    protocol: Protocol = "label"
    dtype: BaseDtype = "float32"


RATE_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RATE_GRIDS = {"prefix": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
"""Learning rates of a tuned design, around the published one; `RATE_GRID` for a method that is not named."""

_PAPER = Design(("yahma/llama-7b-hf",), seeds=(42,), protocol="generate", dtype="bfloat16")
DESIGNS = {
    "grid": Design(),
    "fixed_alpha": Design(),
    "alpha_2r": Design(alpha_rule="2r"),
    "tuned_rate": Design(seeds=(0, 1, 2), tuned=True),
    "fig1": replace(_PAPER, ranks=(4, 8, 16, 32, 64, 128, 256)),
    "fig3": replace(_PAPER, methods=("lora", "dora", "rora"), ranks=(128,)),
    "table1": replace(
        _PAPER,
        models=("yahma/llama-7b-hf", "yahma/llama-13b-hf", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"),
        methods=(BASE, "prefix", "series", "parallel", "lora", "dora", "rora"),
        ranks=(32, 128),  # the paper's RoRA rows are at 128, the others at 32
    ),
    "table2": replace(_PAPER, models=("princeton-nlp/Sheared-LLaMA-1.3B",), ranks=(8, 16, 32, 64, 128)),
}
"""The last four are the paper's. One budget for every method: what the published prefix runs have otherwise (batch 8, 5
epochs), and their choice of the step of lowest validation loss, is not repeated; the last step counts."""


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
    shares: Literal["equal", "proportional"] = "equal"
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


@dataclass(frozen=True)
class Cell:
    """Everything that determines one cell's result; its key is the hash of this.

    Attributes:
      method: a name of `METHODS`, or `BASE`.
      rank, alpha, gamma, learning_rate, seed: None for `BASE`; the first three also for a method without a rank. gamma
        follows from the rule, alpha and the rank.
      accuracy: whether the tasks are scored.
      model, revision, dtype: the base model.
      training: the whole fine-tuning run; None for `BASE`.
      data: digests and sizes of the training and held-out records.
      evaluation: protocol, tasks, limit and digests of the task files; None without accuracy.
    """

    method: str
    rank: int | None
    alpha: float | None
    gamma: float | None
    learning_rate: float | None
    seed: int | None
    model: str
    revision: str | None
    dtype: str
    training: FinetuneConfig | None
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        """In words, for a line of output."""
        if self.training is None:
            return f"{self.model}: base"
        size = f"r={self.rank} alpha={self.alpha:g} gamma={self.gamma:.4g} " if self.rank is not None else ""
        return f"{self.model}: {self.method} {size}lr={self.learning_rate:g} seed={self.seed}"


@dataclass(frozen=True)
class Sample:
    """The records of all cells.

    Attributes:
      train: training records.
      held_out: records of the validation loss, with the file and the index each comes from.
      summary: sizes and digests.
    """

    train: list[Record]
    held_out: list[tuple[str, int, Record]]
    summary: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit status 1 where cells have failed."""

    def run() -> None:
        config = cli.parse(Config, argv, description=(__doc__ or "").split("\n", 1)[0])
        if not sweep(config):
            sys.exit(1)

    cli.run(run)


def sweep(config: Config) -> bool:
    """Check everything that can be checked, then do what the matrix lacks; whether no cell has failed."""
    design = config.the_design()
    check(config, design)
    sample = draw(config)
    tasks, evaluation = read_tasks(config)
    make = partial(cells_of, config, design, data=sample.summary, evaluation=evaluation)
    first = make(stage=0)
    located = {name: llama.locate(name, config.revision) for name in design.models}
    models = check_cells(first, located)
    shared = identity(config, design, sample, evaluation, located)
    path = config.out or Path("results") / NAME / matrix.key_of(shared)[:12]
    if config.list:
        show(config, path, first)
        return True
    bench = Workbench(config, sample, tasks, located)
    bench.open(first[0].model)
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
    rows = rank_results.table(folder, tuple(METHODS))
    return differences.as_csv(differences.differences(rows, folder.cells_path))


def check(config: Config, design: Design) -> None:
    """Raise `InputError` for a value out of range."""
    for name, values in (("model", design.models), ("methods", design.methods), ("seeds", design.seeds)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} is {' '.join(map(str, values))!r}; accepted are one or more, each once")
    for method in design.methods:
        if method not in (BASE, *METHODS):
            raise InputError(f"method is {method!r}; accepted are {', '.join((BASE, *METHODS))}")
    scalings.check_ranks(design.ranks, fewest=1)
    if design.rates is not None:
        scalings.check_list("rates", design.rates)
        for rate in design.rates:
            check_positive("--rates", rate)
    least = {"train_records": 1, "held_out": 2, "steps": 1, "limit": 1, "batch_size": 1, "attempts": 1}
    cli.check_integers(config, **least)
    for name, values in (("data_seed", (config.data_seed,)), ("seeds", design.seeds)):
        for value in values:
            check_seed(value, name)
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise InputError(f"tasks are {' '.join(config.tasks)!r}; accepted are one or more, each once")
    for key in config.tasks:
        task_named(key)
    config.scoring()


def draw(config: Config) -> Sample:
    """Held-out and training records, seeded, no instruction in both.

    Raises:
      InputError: a file is missing or bad, or has too few records for its share.
    """
    files = [read_records([source]) for source in config.data] or [read_records([])]
    random = np.random.default_rng(config.data_seed)
    orders = [random.permutation(len(records)).tolist() for records in files]
    sizes = [len(records) for records in files]
    held_out: list[tuple[str, int, Record]] = []
    taken: set[str] = set()
    wanted = share(config.held_out, sizes, config.shares)
    for source, records, order, count in zip(config.data, files, orders, wanted, strict=True):
        fresh = [i for i in order if records[i].instruction not in taken]
        fresh = list({records[i].instruction: i for i in reversed(fresh)}.values())[::-1]
        if len(fresh) < count:
            raise InputError(f"{source}: has {len(fresh)} records to hold out; accepted is {count}, its share")
        held_out += [(_short(source), i, records[i]) for i in fresh[:count]]
        taken |= {records[i].instruction for i in fresh[:count]}
    train: list[Record] = []
    rest = [
        [records[i] for i in order if records[i].instruction not in taken]
        for records, order in zip(files, orders, strict=True)
    ]
    shares = [len(part) for part in rest]
    if config.train_records is not None:
        shares = share(config.train_records, sizes, config.shares)
    for source, part, count in zip(config.data, rest, shares, strict=True):
        if len(part) < count:
            raise InputError(
                f"{source}: has {len(part)} records beside the held-out ones; accepted is {count}, its share of "
                f"train_records {config.train_records} in {config.shares} shares"
            )
        train += part[:count]
    if not train:
        raise InputError(f"held_out is {config.held_out} of {sum(sizes)} records; accepted are fewer than all")
    summary = {
        "train_records": len(train),
        "train_sha256": digests.of_json(train),
        "held_out": len(held_out),
        "held_out_sha256": digests.of_json([record for _, _, record in held_out]),
    }
    return Sample(train, held_out, summary)


def share(total: int, sizes: Sequence[int], how: str) -> list[int]:
    """``total`` split over the files: evenly, or by size with the largest remainders rounded up."""
    weights = [1] * len(sizes) if how == "equal" else list(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _short(source: str) -> str:
    """The last folder and the name of a file."""
    return "/".join(Path(source).parts[-2:])


def read_tasks(config: Config) -> tuple[dict[str, list[TaskRecord]], dict[str, Any] | None]:
    """Items of each task, and what determines their scoring; nothing and None without accuracy."""
    if not config.accuracy:
        return {}, None
    tasks, digests = sources.read_tasks(
        config.data_dir, config.tasks, config.limit, otherwise="a folder with TASK/test.json, or --accuracy False"
    )
    return tasks, asdict(config.scoring()) | {"limit": config.limit, "data": digests}


def identity(
    config: Config,
    design: Design,
    sample: Sample,
    evaluation: Mapping[str, Any] | None,
    located: Mapping[str, llama.Located],
) -> dict[str, Any]:
    """What all cells of a matrix share; a model enters with what its files hold."""
    settings = ("warmup", "dropout", "targets", "template", "cutoff", "loss_on", "widths", "accumulation", "remat")
    return {
        "models": sorted(design.models),
        "revision": config.revision,
        "commits": {name: found.commit for name, found in located.items()},
        "model_sha256": {name: found.sha256 for name, found in located.items()},
        "data": sample.summary,
        "training": {name: getattr(config, name) for name in ("steps", "epochs", "batch")},
        "settings": {name: getattr(config, name) for name in settings} | {"dtype": design.dtype},
        "evaluation": evaluation,
    }


def cells_of(
    config: Config,
    design: Design,
    *,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    stage: int,
    rates: Mapping[tuple[str, str, int | None], float] | None = None,
) -> list[Cell]:
    """The cells of a design in the order of work: by seed, then rank (those without one first), then method.

    Args:
      stage: 0 is everything, or, for a tuned design, the first seed at every rate without accuracy; 1 is the other
        seeds at the chosen rates.
      rates: of stage 1, by model, method and rank.
    """
    first = design.tuned and stage == 0
    seeds = design.seeds[:1] if first else design.seeds[1:] if design.tuned else design.seeds
    measured = None if first and len(design.seeds) > 1 else evaluation
    common: dict[str, Any] = {"revision": config.revision, "dtype": design.dtype, "data": dict(data)}
    found = []
    for model in design.models:
        if BASE in design.methods and stage == 0:
            nothing: dict[str, Any] = dict.fromkeys(("rank", "alpha", "gamma", "learning_rate", "seed", "training"))
            found.append(Cell(method=BASE, model=model, evaluation=evaluation, **nothing, **common))
        for seed in seeds:
            for rank in (None, *design.ranks):
                for method in design.methods:
                    if method == BASE or METHODS[method].ranked == (rank is None):
                        continue
                    if stage == 1:
                        chosen = (rates or {}).get((model, method, rank))
                        several: tuple[float, ...] = () if chosen is None else (chosen,)
                    else:
                        several = design.rates or rates_of(method, model, tuned=design.tuned)
                    for rate in several:
                        training = training_of(config, design, method, rank, rate, seed)
                        strength: dict[str, Any] = {"alpha": None, "gamma": None}
                        if rank is not None:
                            gamma = scaling_factor(training.rule, alpha=training.alpha, rank=rank)
                            strength = {"alpha": training.alpha, "gamma": gamma}
                        found.append(
                            Cell(
                                method=method,
                                rank=rank,
                                learning_rate=rate,
                                seed=seed,
                                model=model,
                                training=training,
                                evaluation=measured,
                                **strength,
                                **common,
                            )
                        )
    return found


def rates_of(method: str, model: str, *, tuned: bool) -> tuple[float, ...]:
    """The learning rates of a method where none are given: its published one, or its grid."""
    kind = METHODS[method].settings["method"]
    if tuned:
        return RATE_GRIDS.get(kind, RATE_GRID)
    return (1e-4,) if kind == "dora" and "Llama-3" in model else (LEARNING_RATES[kind],)  # as DoRA's scripts


def training_of(
    config: Config, design: Design, method: str, rank: int | None, rate: float, seed: int
) -> FinetuneConfig:
    """The fine-tuning run of a cell. Raises `InputError` for a value out of range."""
    own: dict[str, Any] = dict(METHODS[method].settings)
    if rank is not None:
        alpha = 2.0 * rank if design.alpha_rule == "2r" else config.alpha
        own |= {"rank": rank, "alpha": alpha, "targets": config.targets}
    training = FinetuneConfig(
        learning_rate=rate,
        seed=seed,
        dropout=config.dropout if rank is not None else 0.0,
        template=config.template,
        cutoff=config.cutoff,
        loss_on=config.loss_on,
        widths=config.widths,
        validation=0,
        epochs=config.epochs,
        max_steps=config.steps,
        batch=config.batch,
        accumulation=config.accumulation,
        warmup=config.warmup,
        dtype=design.dtype,
        remat=config.remat,
        **own,
    )
    training.check()
    replace(training, checkpoint_every=config.checkpoint_every).check()
    return training


def check_cells(cells: Sequence[Cell], located: Mapping[str, llama.Located]) -> dict[str, dict[str, int]]:
    """Number of parameters of each model.

    Raises:
      InputError: a model is not to be had, or an adapter does not fit it.
    """
    from rora_theory import adapters
    from rora_theory.llama import count_parameters
    from sims import finetune

    configs: dict[str, Any] = {}
    for cell in cells:
        if cell.model not in configs:
            configs[cell.model] = finetune.model_config(located[cell.model])
        if cell.training is not None:
            adapters.table(cell.training.adapter(), configs[cell.model])
    return {name: {"parameters": count_parameters(config)} for name, config in configs.items()}


class Workbench:
    """One model in memory with its tokenized records and compiled steps; does cells.

    Args:
      config: of the sweep.
      sample: training and held-out records.
      tasks: items to score.
      located: where each model lies.
    """

    def __init__(
        self,
        config: Config,
        sample: Sample,
        tasks: Mapping[str, list[TaskRecord]],
        located: Mapping[str, llama.Located],
    ) -> None:
        self.config, self.sample, self.tasks, self.located = config, sample, tasks, located
        self._name: str | None = None
        self.steps = SharedSteps()

    def open(self, model: str) -> None:
        """Load a model, unless it is the one in memory. Raises `InputError` as loading does."""
        import jax.numpy as jnp

        if model == self._name:
            return
        config = self.config
        self._model: Any = None  # the old one's memory is free before the new one takes its own
        self._model = llama.load(self.located[model], jnp.dtype(config.the_design().dtype))
        cli.tell(self._model.remarks)
        self._name, self.steps = model, SharedSteps()
        encode = partial(tokenize, tokenizer=self._model.tokenizer, template=config.template)
        self._train: Examples = encode(self.sample.train, cutoff=config.cutoff, answer_only=config.loss_on == "answer")
        self._widths = choose_widths(self._train.sizes, config.widths)
        longest = self._model.config.max_position_embeddings
        self._held_out: Examples = encode(
            [record for _, _, record in self.sample.held_out], cutoff=longest, answer_only=True
        )
        if self._held_out.skipped:
            raise InputError(f"a held-out record is longer than the {longest} tokens {model} reads")

    def run(self, cell: Cell, path: Path) -> dict[str, Any]:
        """The result of a cell; its losses, answers and training curve are written to ``path``."""
        self.open(cell.model)
        begun = time.perf_counter()
        params, adapter = self._model.params, None
        result: dict[str, Any] = {"status": "complete"}
        if cell.training is not None:
            result |= (trained := self._finetune(cell.training, path)).result
            if trained.adapter is None:
                return result
            adapter = trained.adapter
            if cell.training.adapter().mergeable:  # faster than beside the weights
                params, adapter = adapter.merge(params), None
        trained_at = time.perf_counter()
        losses = record_losses(params, self._model.config, self._held_out, adapter=adapter)
        result |= {"train_seconds": trained_at - begun} | self._losses(losses, path)
        if not math.isfinite(result["validation_loss"]):
            step = result.get("steps", 0)
            return {
                "status": "diverged",
                "diverged_at": step,
                "steps": step,
                "error": "the validation loss is no number",
            }
        lost_at = time.perf_counter()
        result["loss_seconds"] = lost_at - trained_at
        if cell.evaluation is not None:
            result |= self._accuracy(params, adapter, path) | {"accuracy_seconds": time.perf_counter() - lost_at}
        return result | {"seconds": time.perf_counter() - begun}

    def begin(self, training: FinetuneConfig) -> tuple[Any, Batches]:
        """The fresh adapter of a run and its batches in order: by the seed alone, the same for every rule."""
        import jax

        from rora_theory import adapters

        batches = Batches(
            self._train,
            self._widths,
            batch=training.batch,
            epochs=training.epochs,
            seed=training.seed,
            answer_only=training.loss_on == "answer",
        )
        key = jax.random.key(training.seed)
        return adapters.init(key, training.adapter(), self._model.config, self._model.params), batches

    def _finetune(self, training: FinetuneConfig, path: Path) -> "Trained":
        from rora_theory import adapters
        from sims.finetune import METRICS, Metrics

        config, model = self.config, self._model
        training = replace(training, checkpoint_every=config.checkpoint_every)
        adapter, batches = self.begin(training)
        steps = min(len(batches), training.max_steps or len(batches))
        checkpoints = path / "checkpoints" if steps > config.checkpoint_every else None
        before = self.steps.compilations
        trainer = Trainer(model.params, model.config, adapter, training, batches, None, checkpoints, shared=self.steps)
        metrics = Metrics(path / METRICS, trainer, path.name)
        result: dict[str, Any] = {"trainable_parameters": adapters.count(adapter), "steps": trainer.steps}
        try:
            for event in trainer.run():
                metrics.add(event)
        except NonFiniteLossError as error:
            return Trained(result | {"status": "diverged", "diverged_at": error.step, "error": str(error)}, None)
        finally:
            trainer.close()
        events = metrics.events
        result["compilations"] = self.steps.compilations - before
        result["train_loss"] = float(np.mean([event["loss"] for event in events[-10:]]))
        kept = trainer.adapter("last")
        if config.save_adapters:
            adapters.save_peft(path / "adapter", kept, base_model=model.origin)
        return Trained(result, kept)

    def _losses(self, losses: Sequence[RecordLoss], path: Path) -> dict[str, Any]:
        """Write them; their means a token."""
        rows = [
            [source, index, *map(repr, asdict(loss).values())]
            for (source, index, _), loss in zip(self.sample.held_out, losses, strict=True)
        ]
        _write_csv(path / "losses.csv", ("file", "index", *asdict(losses[0])), rows)
        loss, error = mean_per_token([one.loss for one in losses], [one.tokens for one in losses])
        answer, answer_error = mean_per_token(
            [one.answer_loss for one in losses], [one.answer_tokens for one in losses]
        )
        return {
            "validation_loss": loss,
            "validation_error": error,
            "answer_loss": answer,
            "answer_error": answer_error,
        }

    def _accuracy(self, params: Any, adapter: Any, path: Path) -> dict[str, Any]:
        """Score the tasks and write which items were right; accuracies with their standard errors."""
        config, model = self.config, self._model
        samples = [
            sample
            for items in self.tasks.values()
            for sample in score(
                params,
                model.config,
                model.tokenizer,
                items,
                config.scoring(),
                adapter=adapter,
                batch_size=config.batch_size,
            )
        ]
        order = list(TASKS)
        samples.sort(key=lambda sample: (order.index(sample.task), sample.index))
        rows = [[s.task, s.index, s.prediction or "", int(s.correct)] for s in samples]
        _write_csv(path / "answers.csv", ("task", "index", "prediction", "correct"), rows)
        found = levels(samples, [record for items in self.tasks.values() for record in items])
        return {"levels": as_json(found)}


@dataclass(frozen=True)
class Trained:
    """What became of a fine-tuning run: entries of the result, and the adapter, None if it diverged."""

    result: dict[str, Any]
    adapter: Any


def work(config: Config, folder: matrix.Matrix, bench: Workbench, cells: Sequence[Cell]) -> list[matrix.Cell]:
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

    done = 0
    with progress_bar("cells", len(cells), fields="{cell}") as bar:
        for worked in matrix.work_through(
            places, lambda index, path: bench.run(cells[index], path), most=config.attempts, seen=seen
        ):
            done += 1
            rank_results.write(folder, tuple(METHODS))
            print(
                f"[{worked.index + 1}/{len(cells)}] {line(cells[worked.index], places[worked.index], worked)}",
                flush=True,
            )
            bar.advance(1, cell=cells[worked.index].label)
    if not done:
        rank_results.write(folder, tuple(METHODS))
    return places


def place_of(cells: Path, config: Mapping[str, Any], cell: Cell) -> matrix.Cell:
    """Where a cell is done: for one that is not to be scored, its scored twin where that is done already.

    Args:
      cells: the folder of the cells.
      config: of the matrix, see `identity`.
      cell: which.
    """
    scored = config.get("evaluation")
    if cell.evaluation is None and scored is not None:
        twin = matrix.Cell(cells, replace(cell, evaluation=scored))
        if twin.status().state == "done":
            return twin
    return matrix.Cell(cells, cell)


def line(cell: Cell, place: matrix.Cell, worked: matrix.Worked) -> str:
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
    """The best learning rate of each model, method and rank among the cells, see `rank_results.best_rates`."""
    keys = {place_of(folder.cells_path, folder.config, cell).key for cell in cells}
    rows = [row for row in rank_results.table(folder, tuple(METHODS)) if row["key"] in keys]
    chosen = {}
    for (model, method, rank, _), (rate, word) in rank_results.best_rates(rows).items():
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


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    write_whole(path, rank_results.as_csv(columns, rows))


if __name__ == "__main__":
    main()
