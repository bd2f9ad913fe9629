"""Held-out losses of a probe's runs as a table, and the displacement constant that the runs measured."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rora_theory.laws.displacement import measured_constant
from rora_theory.measure.tuning.plan import ProbePlan
from rora_theory.measure.tuning.trial import ProbeRun
from rora_theory.runs import frames

if TYPE_CHECKING:  # pandas takes as long to import as a short command to run
    import pandas as pd

CURVE_COLUMNS = ("learning_rate", "steps", "held_out_loss", "stopped_early", "diverged_at")
"""Columns of `curve_frame`."""

RATE_TOLERANCE = 10 ** (1 / 8)
"""Largest ratio of a run's rate to the best rate at which the run may provide the displacement constant."""


def curve_frame(plan: ProbePlan, runs: Sequence[ProbeRun], tokens: Sequence[int]) -> "pd.DataFrame":
    """Return a row for each run of a probe, by steps and rate.

    Args:
      plan: Plan of the probe.
      runs: Finished runs.
      tokens: Number of tokens of each held-out record.

    Returns:
      A frame with the columns `CURVE_COLUMNS`. The loss is in nats per token, and infinite if the run diverged. A run
      is stopped early if its rate was not trained for the probe's full number of steps, or if it diverged.
    """
    full_rates = [run.learning_rate for run in runs if run.steps == plan.probe_steps]
    rows = [
        {"learning_rate": run.learning_rate, "steps": run.steps, "held_out_loss": run.total / sum(tokens)}
        | {"stopped_early": run.diverged_at is not None or not _is_among(run.learning_rate, full_rates)}
        | {"diverged_at": run.diverged_at}
        for run in sorted(runs, key=lambda run: (run.steps, run.learning_rate))
    ]
    return frames.from_rows(rows, CURVE_COLUMNS)


def _is_among(rate: float, rates: Sequence[float]) -> bool:
    return any(math.isclose(rate, other, rel_tol=1e-6) for other in rates)


def compute_displacement_constant(plan: ProbePlan, runs: Sequence[ProbeRun], best: float) -> float | None:
    """Compute K from the full run at the best rate or the highest one below it; above the best rate K is too large.

    Args:
      plan: Plan of the probe.
      runs: Finished runs.
      best: Best rate of the probe's full runs.

    Returns:
      The displacement constant; None if no such run measured the parts of the change.
    """
    usable_runs = [
        run
        for run in sorted(runs, key=lambda run: run.learning_rate)
        if run.steps == plan.probe_steps
        and run.ratios
        and run.diverged_at is None
        and run.learning_rate <= best * RATE_TOLERANCE
    ]
    return measured_constant(plan.run.gain, usable_runs[-1].ratios) if usable_runs else None
