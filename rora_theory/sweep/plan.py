"""A sweep as it is asked for, and all that follows before a weight is read: design, records, tasks, cells, identity.

plan = plan_sweep(SweepConfig(("train.json",), ranks=(4, 8), accuracy=False))
bench = Workbench(plan.training, plan.records, plan.tasks, plan.located, scoring=plan.scoring)
bench.open(plan.design.models[0])
outcomes = [bench.measure(cell, Path("cells")) for cell in plan.cells()]
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from rora_theory import llama
from rora_theory.data import sources
from rora_theory.data.prompts import Template
from rora_theory.data.records import DataConfig
from rora_theory.data.tasks import TASKS, TaskRecord
from rora_theory.evaluate.scoring import Protocol, Scoring
from rora_theory.finetune import FinetuneConfig
from rora_theory.finetune.config import BaseDtype
from rora_theory.sweep.cells import SweepCell, cells_of, sweep_identity
from rora_theory.sweep.design import DESIGNS, AlphaRule, Design
from rora_theory.sweep.records import RecordSplit, Shares, draw_records
from rora_theory.validation.ranges import Count, check_ranges


@dataclass(frozen=True)
class SweepConfig:
    """Which cells, and how each is trained and measured. What is not given is the design's.

    Attributes:
      training: what the fine-tuning runs of all cells share; what is a cell's own is not read.

    Raises:
      InputError: a value out of range.
    """

    data: tuple[str, ...]
    """training files, as `rora_theory.data.records.read_record_set` takes them"""
    reading: DataConfig = field(default_factory=DataConfig)
    design: Literal["grid", "fixed_alpha", "alpha_2r", "tuned_rate", "fig1", "fig3", "table1", "table2"] = "grid"
    """fixed_alpha: alpha the same at every rank; alpha_2r: alpha = 2 r; tuned_rate: the best of several learning rates
    for each method and rank; fig1, fig3, table1, table2: the paper's; grid: whatever is given"""
    model: tuple[str, ...] | None = None
    """one or more: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
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
    training: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(held_out=512, checkpoint_every=500))

    accuracy: bool = True
    """score the tasks; without it the losses alone are measured"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks to score"""
    protocol: Protocol | None = None
    """label, generate (the papers') or harness, see sims.evaluate; none is label, in the paper's designs generate"""
    eval_template: Template | None = None
    """prompt of label (none is train) and generate (none is eval)"""
    limit: Count | None = None
    """score only the first so many items of each task"""
    data_dir: str | None = None
    """folder of the tasks, or hf://datasets/OWNER/NAME; none is the variable RORA_COMMONSENSE_DIR"""
    score_batch_size: Count = 8
    """generate: prompts at once; label and harness: device calls in flight"""

    def __post_init__(self) -> None:
        check_ranges(self)

    def the_design(self) -> Design:
        """The named design with what is given in its place."""
        names = ("methods", "ranks", "lrs", "seeds", "alpha_rule", "protocol", "dtype")
        given = {name: getattr(self, name) for name in names} | {"models": self.model, "tuned": self.tuned or None}
        return replace(DESIGNS[self.design], **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class SweepPlan:
    """What a `SweepConfig` comes to, see `plan_sweep`.

    Attributes:
      design, training, scoring: what varies, what all runs share, and how a cell is scored.
      records: training and held-out records.
      tasks: items to score, by task; none where the cells are not scored.
      evaluation: what `SweepCell` has of the scoring.
      located: where each model lies.
      revision: of the models.
    """

    design: Design
    training: FinetuneConfig
    scoring: Scoring
    records: RecordSplit
    tasks: Mapping[str, list[TaskRecord]]
    evaluation: Mapping[str, Any] | None
    located: Mapping[str, llama.Located]
    revision: str | None

    def cells(self, stage: int = 0, best: pd.DataFrame | None = None) -> list[SweepCell]:
        """The cells of a stage, see `cells_of`."""
        shared: dict[str, Any] = {"data": self.records.summary, "evaluation": self.evaluation}
        return cells_of(self.design, self.training, revision=self.revision, **shared, stage=stage, best=best)

    def identity(self) -> dict[str, Any]:
        """What all cells share beside how they are scored, see `sweep_identity`."""
        return sweep_identity(self.design, self.training, self.records, self.located, revision=self.revision)


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Read the records and the tasks, and find the models.

    Raises:
      InputError: as `draw_records`, `sources.read_tasks`, `Scoring`, `Design` and `llama.locate`.
    """
    design = config.the_design()
    training, scoring = replace(config.training, dtype=design.dtype), Scoring(design.protocol, config.eval_template)
    sample: dict[str, Any] = {name: getattr(config, name) for name in ("train_records", "shares")}
    sample |= {"held_out": training.held_out, "seed": config.data_seed}
    records = draw_records(config.data, **sample, config=config.reading)
    training = replace(training, template=records.source.template(training.template))
    tasks: dict[str, list[TaskRecord]] = {}
    evaluation: dict[str, Any] | None = None
    if config.accuracy:
        otherwise = "a folder with TASK/test.json, or --no-accuracy"
        tasks, digests = sources.read_tasks(config.data_dir, config.tasks, config.limit, otherwise=otherwise)
        evaluation = asdict(scoring) | {"limit": config.limit, "data": digests}
    located = {name: llama.locate(name, config.revision) for name in design.models}
    return SweepPlan(design, training, scoring, records, tasks, evaluation, located, config.revision)
