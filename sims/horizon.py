r"""Measure how the best learning rate under Adam depends on the scaling, the rank and the number of steps.

    python -m sims.horizon --data DATA/*/train.json --ranks 8 128 --gains 64 --seeds 0 1 2 3 4 \
        --lrs 1.8e-4 3.2e-4 5.6e-4 1e-3 1.8e-3 3.2e-3 5.6e-3

This is `sims.sweep` with other defaults: the model is trained at every rank, gain G (scaling times rank) and
learning rate, constant after a warm-up, and the held-out loss is measured after each of ``--read-at`` steps of a run.
``--full-lrs`` also trains the same modules in full. The same command with another gain and rates around its best rate
extends the run folder; fewer seeds or rates leave most verdicts on exponents undecided.
"""

from dataclasses import dataclass, field
from typing import Any

from rora_theory.defaults import SMALL_BATCH_SIZE
from sims import sweep
from sims.common import cli


@dataclass(frozen=True)
class Training(sweep.Training):
    batch_size: int = SMALL_BATCH_SIZE
    warmup: int = 4
    schedule: Any = "constant"
    dropout: float = 0.0
    template: Any = "clean"
    cutoff: int = 96
    widths: int = 3
    held_out: int = 96
    checkpoint_every: int = 128


@dataclass(frozen=True)
class HorizonOptions(sweep.SweepOptions):
    data: cli.Data
    design: Any = "horizon"
    train_records: int | None = 2048
    parts: bool = True
    training: Training = field(default_factory=Training)


main = cli.command(HorizonOptions, sweep.run_matrix, __doc__)

if __name__ == "__main__":
    main()
