"""Reader of the fine-tuning runs in a folder of sims.rank_sweep, with their losses by record."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory.errors import InputError
from rora_theory.lab.sweep import results
from rora_theory.runs import digests, frames, seals
from rora_theory.stats.trained_runs import TrainedRun

Loss = Literal["validation", "answer"]
"""Tokens of the held-out loss: all tokens, or those of the answers."""

REQUIRED_COLUMNS = ("key", "status", "model", "method", "rank", "gamma", "learning_rate", "seed")
"""Columns that `results.csv` must have."""


def read_runs(folder: Path, *, model: str | None = None, loss: Loss = "validation") -> list[TrainedRun]:
    """Read the finished cells of one model, without those of the base model.

    Args:
      folder: Run folder of sims.rank_sweep.
      model: Name of the model; None if the folder has one model only.
      loss: Tokens of the loss.

    Raises:
      InputError: If the file is missing, lacks a column, has an invalid line, several models, or no finished cell.
    """
    path = folder / "results.csv"
    # Only a table that nobody changed since the run wrote it.
    seals.check_unchanged(folder)
    rows = frames.read_csv(path, accepted="a folder of sims.rank_sweep")
    column = {"validation": "validation_loss", "answer": "answer_loss"}[loss]
    frames.check_columns(path, rows, (*REQUIRED_COLUMNS, column), advice="Pass the folder of a run of sims.rank_sweep.")
    # Finished cells with a rank: the base model has none.
    rows = rows[rows["rank"].notna() & (rows[column].notna() | (rows["status"] == "diverged"))]
    models = sorted(set(rows["model"]))
    if model is None and len(models) > 1:
        raise InputError(f"{path} has several models: {', '.join(models)}. Choose one with --matrix-model.")
    model_rows = frames.rows(rows if model is None else rows[rows["model"] == model])
    if not model_rows:
        raise InputError(f"{path} has no finished cell of model {model or 'any'}; its models: {', '.join(models)}")
    return [_read_run(folder, row, column) for row in model_rows]


def runs_digest(runs: Sequence[TrainedRun]) -> str:
    """Compute a digest of all fields of the runs."""

    def plain(values: np.ndarray | None) -> list[float] | None:
        return None if values is None else values.tolist()

    return digests.of_json(
        [
            (run.method, run.rank, run.gamma, run.rate, run.seed, run.loss, plain(run.records), plain(run.tokens))
            for run in runs
        ]
    )


def kappa_of(runs: Sequence[TrainedRun]) -> float:
    """Compute the exponent of gamma = alpha / r^kappa from the scalings of a method's runs; 0 if alpha = 2 r.

    Raises:
      InputError: If there is one rank only, several alphas, or scalings that are no power of the rank.
    """
    gammas = {run.rank: run.gamma for run in runs}
    method = f"method {runs[0].method}"
    # Two scalings at one rank come from two rules or alphas.
    deviating = sorted({run.gamma for run in runs if not math.isclose(run.gamma, gammas[run.rank], rel_tol=1e-9)})
    if deviating:
        raise InputError(f"{method} must have one rule and alpha, got the scalings {deviating} in addition to {gammas}")
    if len(gammas) < 2:
        raise InputError(f"{method} must have two or more ranks, got {runs[0].rank}")
    # Fit a power law, which must be exact.
    x, y = np.log(list(gammas)), np.log(list(gammas.values()))
    slope, level = np.polyfit(x, y, 1)
    if np.abs(level + slope * x - y).max() > 1e-6:
        raise InputError(f"{method} must have one rule and alpha, got the scalings {gammas}")
    return round(-float(slope), 6)


def _read_run(folder: Path, row: Mapping[str, Any], column: str) -> TrainedRun:
    try:
        value = math.inf if row["status"] == "diverged" else float(row[column])
        rank, seed = _as_integer(row["rank"]), _as_integer(row["seed"])
        gamma, rate = float(row["gamma"]), float(row["learning_rate"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'results.csv'}: cell {row['key']!r} is damaged ({error})") from error
    # Losses by record, if the run has them.
    records = tokens = None
    path = results.cell_file(folder / "cells", row["key"], results.LOSSES)
    if math.isfinite(value) and path.exists():
        seals.check_unchanged(folder, f"cells/{row['key']}")
        losses, kind = results.read_losses(path), column.removesuffix("loss").removeprefix("validation_")
        records, tokens = (losses[f"{kind}{name}"].to_numpy(np.float64) for name in ("loss", "tokens"))
    return TrainedRun(
        row["method"], rank, gamma, rate, seed, value if math.isfinite(value) else math.inf, records, tokens
    )


def _as_integer(value: Any) -> int:
    if not float(value).is_integer():
        raise ValueError(f"{value!r} is not an integer")
    return int(float(value))
