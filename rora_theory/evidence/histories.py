"""Losses of every training step at several ranks: differences by phase of the run, and the speed of the descent.

All runs of a model and learning rate read the same batches in the same order, so that differences between ranks are
paired by step. With `alpha / r` at one alpha, equal losses are a coordinate check: the rank does not change the run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.evidence.sources import HISTORIES, original_path
from rora_theory.runs import frames

if TYPE_CHECKING:
    import pandas as pd

PHASES = ((5, 16), (17, 64), (65, 467))
"""First and last step of each phase of a run."""

FIRST_RANKS = (1, 8, 16)
"""Lowest ranks from which the largest difference between two ranks is computed."""

SPEED_STEPS = (8, 120)
"""First and last step from which the speed of the descent is estimated, far below the best rate."""

SPEED_RATE = 1e-5
"""Learning rate at which the speed is estimated: the lowest one, at which the loss still falls after `SPEED_STEPS`."""

DEGREE, FITTED_STEPS = 6, (4, 240)
"""Degree of the polynomial in the log step that describes how the mean loss over ranks falls, and its steps.

The steps reach beyond `SPEED_STEPS` on both sides, where a polynomial's slope is uncertain.
"""

DIFFERENCE_COLUMNS = (
    "source", "model", "learning_rate", "first_step", "last_step", "rank", "reference_rank", "mean_loss", "difference",
    "standard_error",
)  # fmt: skip
"""Columns of the table of `loss_differences`."""

SPREAD_COLUMNS = ("source", "model", "learning_rate", "first_step", "last_step", "from_rank", "to_rank", "spread")
"""Columns of the table of `loss_spreads`."""

SPEED_COLUMNS = ("source", "model", "learning_rate", "rank", "reference_rank", "speed", "low", "high", "steps")
"""Columns of the table of `speeds`."""

History = Mapping[int, Float[np.ndarray, " steps"]]
"""Training loss of every step, by rank."""


def load_histories(folder: Path) -> Mapping[tuple[str, float], History]:
    """Load the training losses by model and learning rate.

    Args:
      folder: Folder with the original files.

    Returns:
      The losses by model and learning rate; runs that diverged are left out.

    Raises:
      InputError: If the folder does not have the file.
    """
    frame = frames.read_csv(original_path(HISTORIES, folder), text_columns=("model",))
    histories: dict[tuple[str, float], dict[int, np.ndarray]] = {}
    for (model, rate, rank), rows in frame.groupby(["model", "learning_rate", "rank"]):
        losses = rows.sort_values("step")["train_loss"].to_numpy(float)
        # A run that ends above its first loss has diverged.
        if losses[-1] < losses[0]:
            histories.setdefault((model, float(rate)), {})[int(rank)] = losses
    return histories


def loss_differences(history: History, phase: tuple[int, int], reference_rank: int) -> dict[int, tuple[float, float]]:
    """Compute the mean difference of the loss to a reference rank in a phase of the run.

    Args:
      history: Training losses by rank.
      phase: First and last step.
      reference_rank: Rank that is subtracted.

    Returns:
      The mean difference by rank, and its standard error over steps. Differences of neighbouring steps are correlated,
      so that the error is a lower bound.
    """
    first, last = phase
    differences = {
        rank: losses[first - 1 : last] - history[reference_rank][first - 1 : last] for rank, losses in history.items()
    }
    return {
        rank: (float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))
        for rank, values in differences.items()
    }


def relative_speed(history: History, rank: int, reference_rank: int) -> tuple[float, float]:
    r"""Estimate the speed at which the loss of a rank falls, relative to another rank.

    If the loss after t steps is a function of the speed times t, plus the effect of the batch that both runs read, then
    the difference of two runs is to first order

    .. math:: L_r(t) - L_{ref}(t) = \log s \cdot \frac{d L}{d \log t}

    The slope of the loss comes from a polynomial of degree `DEGREE` in the log step, fitted to the mean over ranks over
    `FITTED_STEPS`; log s is the least-squares coefficient over `SPEED_STEPS`.

    Args:
      history: Training losses by rank, at a rate far below the best one.
      rank: Rank of interest.
      reference_rank: Rank to compare with.

    Returns:
      log s and its standard error over steps. Differences of neighbouring steps are correlated, so that the error is a
      lower bound.
    """
    fitted_first, fitted_last = FITTED_STEPS
    mean_loss = np.mean([losses[fitted_first - 1 : fitted_last] for losses in history.values()], axis=0)
    polynomial = np.polyfit(np.log(np.arange(fitted_first, fitted_last + 1)), mean_loss, DEGREE)
    first, last = SPEED_STEPS
    slope = np.polyval(np.polyder(polynomial), np.log(np.arange(first, last + 1)))
    difference = history[rank][first - 1 : last] - history[reference_rank][first - 1 : last]
    log_speed = float(slope @ difference / (slope @ slope))
    residuals = difference - log_speed * slope
    return log_speed, math.sqrt(float(residuals @ residuals) / (len(residuals) - 1) / float(slope @ slope))


def loss_difference_table(histories: Mapping[tuple[str, float], History]) -> "pd.DataFrame":
    """Return the difference of every rank's loss to the highest rank's, by phase, with columns `DIFFERENCE_COLUMNS`."""
    rows = []
    for (model, rate), history in histories.items():
        reference = max(history)
        for phase in PHASES:
            for rank, (difference, error) in sorted(loss_differences(history, phase, reference).items()):
                mean_loss = float(np.mean(history[rank][phase[0] - 1 : phase[1]]))
                rows.append(
                    {"source": HISTORIES, "model": model, "learning_rate": rate}
                    | {"first_step": phase[0], "last_step": phase[1], "rank": rank, "reference_rank": reference}
                    | {"mean_loss": mean_loss, "difference": difference, "standard_error": error}
                )
    return frames.from_rows(rows, DIFFERENCE_COLUMNS)


def spread_table(differences: "pd.DataFrame") -> "pd.DataFrame":
    """Return the largest difference of the mean loss between two ranks, by phase and lowest rank.

    Args:
      differences: `loss_difference_table`.

    Returns:
      A table with the columns `SPREAD_COLUMNS`; ``spread`` is in nats per token.

    Raises:
      InputError: If there are no differences.
    """
    if differences.empty:
        raise InputError("differences must have at least one row, got none")
    rows = []
    keys = ["source", "model", "learning_rate", "first_step", "last_step"]
    for phase, members in differences.groupby(keys, sort=False):
        for first in FIRST_RANKS:
            selected = members[members["rank"] >= first]
            if selected["rank"].min() == first and len(selected) > 1:
                spread = float(np.ptp(selected["mean_loss"].to_numpy(float)))
                rows.append(
                    dict(zip(keys, phase, strict=True))
                    | {"from_rank": first, "to_rank": int(selected["rank"].max()), "spread": spread}
                )
    return frames.from_rows(rows, SPREAD_COLUMNS)


def speed_table(histories: Mapping[tuple[str, float], History]) -> "pd.DataFrame":
    """Return the speed of every rank relative to the highest one at `SPEED_RATE`, with the columns `SPEED_COLUMNS`.

    ``low`` and ``high`` are the ends of the 95% interval over steps.
    """
    rows = []
    for (model, rate), history in histories.items():
        if not math.isclose(rate, SPEED_RATE):
            continue
        reference = max(history)
        for rank in sorted(history):
            log_speed, error = relative_speed(history, rank, reference)
            rows.append(
                {"source": HISTORIES, "model": model, "learning_rate": rate, "rank": rank, "reference_rank": reference}
                | {"speed": math.exp(log_speed), "low": math.exp(log_speed - 1.96 * error)}
                | {"high": math.exp(log_speed + 1.96 * error), "steps": f"{SPEED_STEPS[0]} to {SPEED_STEPS[1]}"}
            )
    return frames.from_rows(rows, SPEED_COLUMNS)
