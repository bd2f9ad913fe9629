"""The fine-tuning runs of a folder of sims.rank_sweep, each with its loss a record, for curves over rates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory.errors import InputError
from rora_theory.io import digests, frames
from rora_theory.runs import seals
from rora_theory.stats.paired import resampled_ratios
from rora_theory.sweep import results

Loss = Literal["validation", "answer"]
NEEDED = ("key", "status", "model", "method", "rank", "gamma", "learning_rate", "seed")
BOOTSTRAPS = 400


@dataclass(frozen=True)
class TrainedRun:
    """One fine-tuning run.

    Attributes:
      method, rank, gamma, rate, seed: what it was.
      loss: held-out nats a token; infinite where it diverged.
      records: summed loss of each held-out record; None where the folder has no such file, or the run diverged.
      tokens: of each record.
    """

    method: str
    rank: int
    gamma: float
    rate: float
    seed: int
    loss: float
    records: np.ndarray | None
    tokens: np.ndarray | None


def read_runs(folder: Path, *, model: str | None = None, loss: Loss = "validation") -> list[TrainedRun]:
    """The finished cells of one model; the base model's and unfinished ones are left out.

    Args:
      folder: of sims.rank_sweep.
      model: which, where there are several.
      loss: on all tokens, or on the answers' alone.

    Raises:
      InputError: no such file, columns missing, a line that can't be read, several models, or no cell.
    """
    path = folder / "results.csv"
    _check(folder)
    rows = frames.read_csv(path, accepted="a folder of sims.rank_sweep")
    column = {"validation": "validation_loss", "answer": "answer_loss"}[loss]
    missing = [name for name in (*NEEDED, column) if name not in rows]
    if missing:
        raise InputError(f"{path}: has no column {missing[0]}; accepted is the results.csv of sims.rank_sweep")
    rows = rows[rows["rank"].notna() & (rows[column].notna() | (rows["status"] == "diverged"))]
    models = sorted(set(rows["model"]))
    if model is None and len(models) > 1:
        raise InputError(f"{path}: has the models {', '.join(models)}; accepted is one, chosen by --matrix-model")
    chosen = frames.rows(rows if model is None else rows[rows["model"] == model])
    if not chosen:
        raise InputError(f"{path}: has no finished cell of model {model or 'any'}; its models are {', '.join(models)}")
    return [_run(folder, row, column) for row in chosen]


def _check(folder: Path, within: str = "") -> None:
    problem = seals.problem(folder, within)
    if problem is not None:
        raise InputError(f"{problem}; accepted is the file as sims.rank_sweep wrote it")


def runs_digest(runs: Sequence[TrainedRun]) -> str:
    """Of all that was read."""

    def plain(values: np.ndarray | None) -> list[float] | None:
        return None if values is None else values.tolist()

    return digests.of_json(
        [(r.method, r.rank, r.gamma, r.rate, r.seed, r.loss, plain(r.records), plain(r.tokens)) for r in runs]
    )


def kappa_of(runs: Sequence[TrainedRun]) -> float:
    """The exponent of gamma = alpha / r^kappa that the runs of one method really had: 0 for alpha = 2 r.

    Raises:
      InputError: one rank alone, runs of several alphas, or a gamma that is no power of the rank.
    """
    gammas = {run.rank: run.gamma for run in runs}
    several = sorted({run.gamma for run in runs if not math.isclose(run.gamma, gammas[run.rank], rel_tol=1e-9)})
    if several:
        raise InputError(
            f"method {runs[0].method} has scalings {several} beside {gammas}; accepted are those of one rule and alpha"
        )
    if len(gammas) < 2:
        raise InputError(f"method {runs[0].method} has one rank, {runs[0].rank}; accepted are two or more")
    x, y = np.log(list(gammas)), np.log(list(gammas.values()))
    slope, level = np.polyfit(x, y, 1)
    if np.abs(level + slope * x - y).max() > 1e-6:
        raise InputError(f"method {runs[0].method} has scalings {gammas}; accepted are those of one rule and alpha")
    return round(-float(slope), 6)


def bootstrap(runs: Sequence[TrainedRun], draws: int = BOOTSTRAPS, seed: int = 0) -> np.ndarray | None:
    """Losses over resampled held-out records, [draws, runs]; the same records for every run.

    Args:
      runs: of one set of records.
      draws, seed: of the bootstrap; the same seed draws the same records in every call.

    Returns:
      None where a run that did not diverge has no losses a record.

    Raises:
      InputError: runs of different records.
    """
    finite = [run for run in runs if math.isfinite(run.loss)]
    known = [run.records for run in finite if run.records is not None]
    if len(known) < len(finite):
        return None
    found = np.full((draws, len(runs)), np.inf)
    if finite:
        columns = [math.isfinite(run.loss) for run in runs]
        found[:, columns] = resampled_ratios(known, tokens_of(finite), draws=draws, seed=seed)
    return found


def stacked(runs: Sequence[TrainedRun]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Losses a record averaged over runs, and tokens; None where a run has none. Raises `InputError` as `tokens_of`."""
    known = [run.records for run in runs if run.records is not None]
    if len(known) < len(runs):
        return None, None
    tokens = tokens_of(runs)
    return np.mean(np.stack(known), axis=0), tokens


def tokens_of(runs: Sequence[TrainedRun]) -> np.ndarray:
    """The tokens of each held-out record, the same for all runs.

    Raises:
      InputError: runs of different records.
    """
    first = np.asarray(runs[0].tokens)
    for run in runs:
        if not np.array_equal(first, np.asarray(run.tokens)):
            said = [f"{one.method} of rank {one.rank} at {one.rate:g}, seed {one.seed}" for one in (runs[0], run)]
            raise InputError(f"{' and '.join(said)}: have other held-out records; accepted are the same ones")
    return first


def _run(folder: Path, row: Mapping[str, Any], column: str) -> TrainedRun:
    try:
        value = math.inf if row["status"] == "diverged" else float(row[column])
        rank, seed = _whole(row["rank"]), _whole(row["seed"])
        gamma, rate = float(row["gamma"]), float(row["learning_rate"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'results.csv'}: cell {row['key']!r} is damaged ({error})") from error
    records = tokens = None
    path = results.cell_file(folder / "cells", row["key"], results.LOSSES)
    if math.isfinite(value) and path.exists():
        _check(folder, f"cells/{row['key']}")
        found, kind = results.read_losses(path), column.removesuffix("loss").removeprefix("validation_")
        records, tokens = (found[f"{kind}{name}"].to_numpy(np.float64) for name in ("loss", "tokens"))
    return TrainedRun(
        row["method"], rank, gamma, rate, seed, value if math.isfinite(value) else math.inf, records, tokens
    )


def _whole(value: Any) -> int:
    if not float(value).is_integer():
        raise ValueError(f"{value!r} is no integer")
    return int(float(value))
