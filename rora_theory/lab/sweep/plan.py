"""Configuration of a sweep, and its plan: grid, records, tasks and cells, without loading weights.

plan = plan_sweep(SweepConfig(("train.json",), grid=SweepGrid(ranks=(4, 8))))
cell_trainer = CellTrainer(plan)
outcomes = [cell_trainer.evaluate_cell(cell, Path("cells")) for cell in plan.cells()]
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.lab import llama
from rora_theory.lab.data import sources
from rora_theory.lab.data.prompts import Template
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.data.tasks import TASKS, TaskRecord
from rora_theory.lab.evaluate.scoring import Protocol, Scoring
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.cells import cells_of
from rora_theory.lab.sweep.grid import SweepCell, SweepGrid
from rora_theory.lab.sweep.records import RecordSplit, draw_records
from rora_theory.runs.reading import as_json
from rora_theory.validation.ranges import Count, check_ranges

NOT_SHARED = (
    "method", "rule", "rank", "alpha", "lr", "seed", "held_out", "steps", "epochs", "evaluate_every",
    "checkpoint_every",
)  # fmt: skip
"""Settings of a fine-tuning run that vary by cell, change no result, or have another name in a sweep's identity."""


@dataclass(frozen=True)
class SweepConfig:
    """Cells of a sweep and how to train and evaluate them.

    Attributes:
      grid: Settings that vary between cells.
      training: Settings that the fine-tuning runs of all cells share; settings that vary by cell are ignored.

    Raises:
      InputError: If a value is out of range.
    """

    data: tuple[str, ...]
    """Training files, see `rora_theory.lab.data.records.read_record_set`"""
    reading: DataConfig = field(default_factory=DataConfig)
    grid: SweepGrid = field(default_factory=SweepGrid)
    revision: str | None = None
    """Branch, tag or commit of a model on the hub"""

    train_records: int | None = None
    """Number of training records to sample; the default is all records that are not held out"""
    data_seed: int = 42
    """Seed of the samples of training and held-out records"""
    training: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(held_out=512, checkpoint_every=500))

    accuracy: bool = False
    """Score the tasks after each run; otherwise only losses are measured"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks to score"""
    protocol: Protocol = "label"
    """Protocol: label, generate (as in the papers) or harness, see sims.evaluate"""
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


@dataclass(frozen=True)
class SweepPlan:
    """Plan of a sweep, see `plan_sweep`.

    Attributes:
      grid: Settings that vary between cells.
      training: Settings that all fine-tuning runs share.
      scoring: Settings of the scoring.
      records: Training and held-out records.
      tasks: Items to score by task; empty if the cells are not scored.
      evaluation: Description of the scoring for `SweepCell`; None if the cells are not scored.
      located: Locations of the models by name.
      revision: Revision of the models.
    """

    grid: SweepGrid
    training: FinetuneConfig
    scoring: Scoring
    records: RecordSplit
    tasks: Mapping[str, list[TaskRecord]]
    evaluation: Mapping[str, Any] | None
    located: Mapping[str, llama.ModelSource]
    revision: str | None

    def cells(self) -> list[SweepCell]:
        """Return the cells, see `cells_of`."""
        train_records = len(self.records.train)
        return cells_of(self.grid, self.training, train_records=train_records, evaluation=self.evaluation)

    def identity(self) -> dict[str, Any]:
        """Return the settings that all cells share.

        Models are identified by the digests of their files.
        """
        training = self.training
        settings = {name: value for name, value in as_json(training).items() if name not in NOT_SHARED}
        return {
            "models": sorted(self.grid.model),
            "revision": self.revision,
            "commits": {name: location.commit for name, location in self.located.items()},
            "model_sha256": {name: location.sha256 for name, location in self.located.items()},
            "data": self.records.summary,
            "training": {"steps": training.steps, "epochs": training.epochs, "batch": training.batch_size},
            "settings": settings | {"targets": training.modules},
            "evaluation": self.evaluation,
        }


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Read the records and the tasks, and locate the models.

    Raises:
      InputError: If `draw_records`, `sources.read_tasks`, `Scoring` or `llama.locate` refuses a value.
    """
    training, scoring = config.training, Scoring(config.protocol, config.eval_template)
    # The records decide the default template, and are read before any model.
    records = draw_records(
        config.data,
        held_out=training.held_out,
        train_records=config.train_records,
        seed=config.data_seed,
        config=config.reading,
    )
    training = replace(training, template=records.source.template(training.template))
    tasks: dict[str, list[TaskRecord]] = {}
    evaluation: dict[str, Any] | None = None
    if config.accuracy:
        tasks, digests = sources.read_tasks(config.data_dir, config.tasks, config.limit)
        evaluation = asdict(scoring) | {"limit": config.limit, "data": digests}
    # Locate all models now, so that a missing one ends the command before any training.
    located = {name: llama.locate(name, config.revision) for name in config.grid.model}
    return SweepPlan(config.grid, training, scoring, records, tasks, evaluation, located, config.revision)
