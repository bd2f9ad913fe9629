"""Plans of sweeps without a command."""

from collections.abc import Mapping

from rora_theory.lab.data.tasks import TaskRecord
from rora_theory.lab.evaluate.scoring import Scoring
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.llama import ModelSource
from rora_theory.lab.sweep.grid import SweepGrid
from rora_theory.lab.sweep.plan import SweepPlan
from rora_theory.lab.sweep.records import RecordSplit


def sweep_plan(
    training: FinetuneConfig,
    records: RecordSplit,
    located: Mapping[str, ModelSource],
    *,
    grid: SweepGrid | None = None,
    tasks: Mapping[str, list[TaskRecord]] | None = None,
    scoring: Scoring | None = None,
) -> SweepPlan:
    """Return a plan of these runs, whose cells are not scored."""
    scoring = scoring or Scoring("label", "clean")
    return SweepPlan(grid or SweepGrid(), training, scoring, records, tasks or {}, None, located, None)
