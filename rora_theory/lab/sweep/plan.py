"""Configuration of a sweep, and its plan: design, records, tasks and cells, without loading weights.

plan = plan_sweep(SweepConfig(("train.json",), ranks=(4, 8)))
cell_trainer = CellTrainer(plan.training, plan.records, plan.tasks, plan.located, scoring=plan.scoring)
outcomes = [cell_trainer.evaluate_cell(cell, Path("cells")) for cell in plan.cells()]
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.lab import llama
from rora_theory.lab.data import sources
from rora_theory.lab.data.prompts import Template
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.data.tasks import TASKS, TaskRecord
from rora_theory.lab.evaluate.scoring import Protocol, Scoring
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.finetune.config import BaseDtype
from rora_theory.lab.sweep.cells import SweepCell, cells_of, sweep_identity
from rora_theory.lab.sweep.design import DESIGNS, AlphaRule, Design
from rora_theory.lab.sweep.records import RecordSplit, Shares, draw_records
from rora_theory.validation.ranges import Count, check_ranges


@dataclass(frozen=True)
class SweepConfig:
    """Cells of a sweep and how to train and evaluate them. Unset values come from the design.

    Attributes:
      training: Settings that the fine-tuning runs of all cells share; settings that vary by cell are ignored.

    Raises:
      InputError: If a value is out of range.
    """

    data: tuple[str, ...]
    """Training files, see `rora_theory.lab.data.records.read_record_set`"""
    reading: DataConfig = field(default_factory=DataConfig)
    design: Literal["grid", "fixed_alpha", "alpha_2r", "tuned_rate", "fig1", "fig3", "table1", "table2", "horizon"] = (
        "grid"
    )
    """Design: fixed_alpha has the same alpha at every rank; alpha_2r has alpha = 2 r; tuned_rate uses the best of
    several learning rates for each method and rank; horizon has values of G = gamma r, rates and numbers of steps;
    fig1, fig3, table1 and table2 are the paper's; grid has no presets"""
    model: tuple[str, ...] | None = None
    """One or more models: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub"""
    methods: tuple[str, ...] | None = None
    """Methods: base, full, prefix, series, parallel, lora, dora, rora, quarter, dora-rora. base is the model without an
    adapter, full trains the targets' own weights"""
    ranks: tuple[int, ...] | None = None
    """Ranks of the adapter"""
    alpha_rule: AlphaRule | None = None
    """Rule for alpha: fixed uses --alpha at every rank, 2r uses twice the rank and ignores --alpha"""
    gains: tuple[float, ...] | None = None
    """Values of G = gamma r (scaling times rank), in place of alpha; methods with a rank must scale by alpha / r"""
    tuned: bool = False
    """Choose the learning rate of each method and rank by validation loss at the first seed, and use it for the other
    seeds"""
    lrs: tuple[float, ...] | None = None
    """Peak learning rates. The default is the published rate of each method (3e-4; dora 2e-4, with LLaMA-3 1e-4; prefix
    3e-2; full 2e-5), or a grid of rates with --tuned"""
    full_lrs: tuple[float, ...] | None = None
    """Learning rates of full fine-tuning of the same modules; by default there are no such runs"""
    seeds: tuple[int, ...] | None = None
    """Seeds of initialisation, order and dropout; methods of the same rank and seed share initialisation and order"""
    read_at: tuple[int, ...] | None = None
    """Numbers of steps after which to evaluate the held-out records, in ascending order; by default the end of the run.
    A run at a constant rate has all of them; under another schedule each is the end of a run of its own"""
    axes: tuple[str, ...] | None = None
    """Further axes as NAME=VALUE,VALUE, such as schedule=constant,cosine batch_size=4,32 quantization=none,q4_0;
    supported: schedule, batch_size, warmup, weight_decay, lr_multiplier_A, quantization, clip"""
    dtype: BaseDtype | None = None
    """Type of the frozen base weights; the default is float32, or bfloat16 in the paper's designs"""

    train_records: int | None = None
    """Number of training records to sample; the default is all records that are not held out"""
    shares: Shares = "equal"
    """Share of each training file in both samples: equal, or proportional to its size"""
    data_seed: int = 42
    """Seed of the samples of training and held-out records"""
    training: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(held_out=512, checkpoint_every=500))

    accuracy: bool = False
    """Score the tasks after each run; otherwise only losses are measured"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks to score"""
    protocol: Protocol | None = None
    """Protocol: label, generate (as in the papers) or harness, see sims.evaluate; the default is label, or generate in
    the paper's designs"""
    eval_template: Template | None = None
    """Prompt of the protocol; the default is train for label and eval for generate"""
    limit: Count | None = None
    """Maximum number of items of each task to score"""
    data_dir: str | None = None
    """Folder of the tasks, or hf://datasets/OWNER/NAME; the default is the environment variable RORA_COMMONSENSE_DIR"""
    score_batch_size: Count = SCORE_BATCH_SIZE
    """Number of prompts in a batch for generate; number of device calls in flight for label and harness"""

    def __post_init__(self) -> None:
        check_ranges(self)

    def resolve_design(self) -> Design:
        """Return the named design, with its values replaced by those that are set."""
        names = (
            *("methods", "ranks", "lrs", "seeds", "alpha_rule", "protocol", "dtype"),
            *("gains", "full_lrs", "read_at", "axes"),
        )
        options = {name: getattr(self, name) for name in names} | {"models": self.model, "tuned": self.tuned or None}
        return replace(DESIGNS[self.design], **{name: value for name, value in options.items() if value is not None})


@dataclass(frozen=True)
class SweepPlan:
    """Plan of a sweep, see `plan_sweep`.

    Attributes:
      design: Settings that vary between cells.
      training: Settings that all fine-tuning runs share.
      scoring: Settings of the scoring.
      records: Training and held-out records.
      tasks: Items to score by task; empty if the cells are not scored.
      evaluation: Description of the scoring for `SweepCell`; None if the cells are not scored.
      located: Locations of the models by name.
      revision: Revision of the models.
    """

    design: Design
    training: FinetuneConfig
    scoring: Scoring
    records: RecordSplit
    tasks: Mapping[str, list[TaskRecord]]
    evaluation: Mapping[str, Any] | None
    located: Mapping[str, llama.ModelSource]
    revision: str | None

    def cells(self, stage: int = 0, best: pd.DataFrame | None = None) -> list[SweepCell]:
        """Return the cells of a stage, see `cells_of`."""
        shared: dict[str, Any] = {"train_records": len(self.records.train), "evaluation": self.evaluation}
        return cells_of(self.design, self.training, **shared, stage=stage, best=best)

    def identity(self) -> dict[str, Any]:
        """Return the settings that all cells share, except those of the scoring, see `sweep_identity`."""
        return sweep_identity(self.design, self.training, self.records, self.located, revision=self.revision)


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Read the records and the tasks, and locate the models.

    Raises:
      InputError: If `draw_records`, `sources.read_tasks`, `Scoring`, `Design` or `llama.locate` refuses a value.
    """
    design = config.resolve_design()
    training, scoring = replace(config.training, dtype=design.dtype), Scoring(design.protocol, config.eval_template)
    sample: dict[str, Any] = {name: getattr(config, name) for name in ("train_records", "shares")}
    sample |= {"held_out": training.held_out, "seed": config.data_seed}
    # The records decide the default template, and are read before any model.
    records = draw_records(config.data, **sample, config=config.reading)
    training = replace(training, template=records.source.template(training.template))
    tasks: dict[str, list[TaskRecord]] = {}
    evaluation: dict[str, Any] | None = None
    if config.accuracy:
        advice = "Pass a folder with TASK/test.json, or leave out accuracy."
        tasks, digests = sources.read_tasks(config.data_dir, config.tasks, config.limit, advice=advice)
        evaluation = asdict(scoring) | {"limit": config.limit, "data": digests}
    # Locate all models now, so that a missing one ends the command before any training.
    located = {name: llama.locate(name, config.revision) for name in design.models}
    return SweepPlan(design, training, scoring, records, tasks, evaluation, located, config.revision)
