"""Best learning rate of a probe, with its uncertainty, fitted to the held-out losses of its runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rora_theory.errors import InputError
from rora_theory.laws.displacement import measured_constant
from rora_theory.measure.tuning.plan import ProbePlan, ProbeRun
from rora_theory.runs import frames
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.rate_curves import combine_errors, weighted_log2_rates
from rora_theory.stats.rate_optimum import Edge
from rora_theory.stats.trained_runs import TrainedRun, curve_of_runs

if TYPE_CHECKING:  # pandas takes as long to import as a short command to run
    import pandas as pd

CURVE_COLUMNS = ("learning_rate", "steps", "held_out_loss", "stopped_early", "diverged_at")
"""Columns of `curve_frame`."""

SEED_LOG2_ERROR = 0.25
"""Standard deviation between seeds of log2 of the best rate, above its mean in `results/published/horizon/best.csv`.

A probe has one seed, so that its own runs do not show it.
"""

SEED_DEGREES = 36
"""Degrees of freedom of `SEED_LOG2_ERROR`: those of all spreads between seeds in the same file."""

EDGE_FACTOR = 4.0
"""Factor by which the range is extended on the side of an edge at which the best rate lies."""

RATE_TOLERANCE = 10 ** (1 / 8)
"""Largest ratio of a run's rate to the best rate at which the run may provide the displacement constant."""

DRAWS = 1000
"""Number of bootstrap samples of the held-out records."""


@dataclass(frozen=True)
class FittedRate:
    """Best learning rate of the full runs of a probe.

    Attributes:
      learning_rate: Best learning rate.
      low: Lower end of its 95% interval over held-out records and seeds.
      high: Upper end of the interval.
      edge: End of the grid at which the best rate lies, so that the true one may lie beyond; empty otherwise.
      displacement_constant: K of the run at the best rate, or at the highest rate below it; None if unknown.
    """

    learning_rate: float
    low: float
    high: float
    edge: Edge
    displacement_constant: float | None


def fit_best_rate(plan: ProbePlan, runs: Sequence[ProbeRun], tokens: Sequence[int]) -> FittedRate:
    """Fit the best rate of the full runs of a probe.

    The best rate is the vertex of a parabola through the lowest loss and its neighbours, in log loss against log rate.
    The interval combines the error over held-out records with `SEED_LOG2_ERROR`, see `rate_curves.combine_errors`.

    Args:
      plan: Plan of the probe.
      runs: Finished runs.
      tokens: Number of tokens of each held-out record.

    Returns:
      The best rate with its interval.

    Raises:
      InputError: If every run diverged, or all have the same loss.
    """
    full = sorted((run for run in runs if run.steps == plan.probe_steps), key=lambda run: run.learning_rate)
    if not any(math.isfinite(run.total) for run in full):
        rates = [run.learning_rate for run in runs]
        lowest = f", the lowest at {min(rates):.3g}" if rates else ""
        raise InputError(f"every run of the probe diverged{lowest}. Pass a lower learning_rate.")
    # Equal losses have no minimum, and would look like an edge.
    finished = [run.losses for run in full if run.diverged_at is None]
    if len(finished) > 1 and len(set(finished)) == 1:
        raise InputError(
            "the probe must change the held-out loss, got the same loss at every learning rate. Check that the "
            "optimizer uses the rate and that the loss depends on the adapters."
        )
    # A parabola needs three points: add rates above the grid, as if they had diverged.
    measured = [(run.learning_rate, None if run.diverged_at is not None else run.losses) for run in full]
    while len(measured) < 3:
        measured.append((measured[-1][0] * plan.spacing, None))
    # The vertex depends on neither the method nor the rank, which no run of a probe varies.
    trained = [TrainedRun.from_records("lora", 1, plan.strength, rate, 0, losses, tokens) for rate, losses in measured]
    curve = curve_of_runs(trained, kappa=1.0, draws=DRAWS)
    logs = weighted_log2_rates((1.0,), curve)
    # Add the variance between seeds, which a single seed does not show.
    over_seeds = Estimate(logs.value, SEED_LOG2_ERROR, SEED_DEGREES + 1, "seeds")
    half_width = combine_errors(over_seeds, replace(logs, bound=0.0)).half_width() + logs.bound
    # At an edge of the grid the best rate may lie beyond it, so the interval is extended on that side.
    edge = _edge(full)
    low = 2 ** (logs.value - half_width) / (EDGE_FACTOR if edge == "low" else 1.0)
    high = 2 ** (logs.value + half_width) * (EDGE_FACTOR if edge == "high" else 1.0)
    best = 2**logs.value
    return FittedRate(best, low, high, edge, _displacement_constant(plan, full, best))


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


def _edge(full: Sequence[ProbeRun]) -> Edge:
    """Return the end at which the lowest loss lies. Below a rate that diverged there is no upper edge."""
    losses = [run.total for run in full]
    index = losses.index(min(losses))
    if index == 0:
        return "low"
    return "high" if index == len(losses) - 1 else ""


def _displacement_constant(plan: ProbePlan, full: Sequence[ProbeRun], best: float) -> float | None:
    """Compute K from the run at the best rate or the highest one below it; above the best rate K is too large."""
    usable_runs = [
        run for run in full if run.ratios and run.diverged_at is None and run.learning_rate <= best * RATE_TOLERANCE
    ]
    return measured_constant(plan.strength, usable_runs[-1].ratios) if usable_runs else None
