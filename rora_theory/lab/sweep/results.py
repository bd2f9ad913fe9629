"""Results of a matrix: a table of all runs, the best learning rates, and the answers of each cell."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.errors import InputError
from rora_theory.lab.data.tasks import TASKS
from rora_theory.lab.evaluate.scoring import Sample
from rora_theory.lab.sweep.methods import BASE, METHODS, find_method
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.runs import files, frames
from rora_theory.stats.paired import mean_per_token
from rora_theory.stats.trained_runs import TrainedRun, curve_of_runs

ANSWERS = "answers.csv"
"""File in a cell's folder with its answers by item."""

ANSWER_COLUMNS = ("task", "index", "prediction", "correct")
ACCEPTED = "the file as sims.sweep wrote it"
"""Description of the expected file in messages."""

COLUMNS = (
    "key", "status", "model", "method", "rule", "rank", "alpha", "gain", "gamma", "learning_rate", "best_rate",
    "seed", "trainable_parameters", "steps", "step", "diverged_at", "train_loss", "validation_loss", "validation_error",
    "answer_loss", "answer_error", "protocol", "average", "average_error", "average_chance", "average_unparsed",
    *(f"{key}{part}" for key in TASKS for part in ("", "_error", "_unparsed")),
    "seconds", "train_seconds", "accuracy_seconds",
)  # fmt: skip
"""Columns of `results.csv`, after which the further axes of the matrix follow. Losses are in nats per token.

``best_rate`` is set at the cells of the learning rate of the lowest validation loss, see `marked_rates`: ``only`` if
one rate was tried, ``edge`` if it is the lowest or highest tried, otherwise ``yes``. ``average`` is over the tasks that
were scored.
"""

LOSS_COLUMNS: Mapping[str, str] = {"all": "validation_loss", "answer": "answer_loss"}
"""Columns of the losses by which rates are compared, by the tokens that the runs learned."""

GROUP = ["model", "method", "rank", "alpha"]
"""Columns that identify the cells among which a learning rate is chosen."""


def results_table(runs: Iterable[SweepRun], tokens: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> pd.DataFrame:
    """Return `results.csv`: a row for each read-out, and one for each divergence.

    The order is base, method in the order of `METHODS`, rank, G, learning rate, seed and step.

    Args:
      runs: Runs of the matrix, see `runs.read_runs`.
      tokens: Numbers of tokens of the held-out records and of their answers by model, see `runs.read_tokens`.
    """
    runs = list(runs)
    all_rows = [row for run in runs for row in _rows(run, *tokens[run.model])]
    loss = LOSS_COLUMNS[runs[0].loss_on] if runs else "validation_loss"
    axes = dict.fromkeys(name for row in all_rows for name in row["axes"])
    rows = frames.from_rows([row | row["axes"] for row in sorted(all_rows, key=_order)], (*COLUMNS, *axes))
    # Rates are compared at the end of runs of one length, within one combination of the further axes.
    for _, group in final_rows(rows).groupby(["steps", *axes], dropna=False, sort=False):
        marks = group.drop(columns="best_rate").merge(
            marked_rates(group, loss), how="left", on=[*GROUP, "learning_rate"]
        )
        rows.loc[group.index, "best_rate"] = marks["best_rate"].to_numpy()
    return rows


def final_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `results_table` at the end of each run."""
    return rows[(rows["step"] == rows["steps"]) | (rows["status"] == "diverged")]


def cell_file(cells: Path, key: object, name: str) -> Path:
    """Return the path of a file of a cell.

    Raises:
      InputError: If the key leads out of the folder.
    """
    return files.resolve_inside(cells, key, where=cells.parent / "results.csv") / name


def marked_rates(rows: pd.DataFrame, loss: str = "validation_loss") -> pd.DataFrame:
    """Find the learning rate of the lowest loss for each model, method, rank and alpha.

    Rates are compared at one seed, the first of those with the most rates, so that no rate has an advantage from its
    seeds. A cell that diverged has an infinite loss.

    Returns:
      A row for each `GROUP` with a finished cell that did not diverge: ``learning_rate``; ``best_rate``, which is
      ``only``, ``edge`` (the lowest or highest rate) or ``yes``; and ``grid_error``, a bound on how far a minimum
      between the rates may lie below the loss (`Curve.grid_error`), NaN if there is no bound.
    """
    tried = rows[rows["learning_rate"].notna() & rows["status"].isin(("complete", "diverged"))]
    tried = tried.assign(loss=tried[loss].where(tried["status"] == "complete", math.inf).astype(float))
    best_rows = []
    for _, group in tried.groupby(GROUP, dropna=False, sort=False):
        # The lowest seed among those with the largest number of rates.
        seed = int(group.groupby("seed")["learning_rate"].nunique().idxmax())
        rows_of_seed = group[group["seed"] == seed]
        # Of a setting with several runs, such as runs of several lengths, the last one counts.
        losses = zip(rows_of_seed["learning_rate"].tolist(), rows_of_seed["loss"].tolist(), strict=True)
        curve = curve_of_runs([TrainedRun("", 0, 1.0, float(rate), seed, loss) for rate, loss in losses])
        if math.isfinite(curve.losses[0, curve.lowest]):
            # At an end of the rates, the minimum may lie beyond them.
            count = len(curve.rates)
            mark = "only" if count == 1 else "edge" if curve.lowest in (0, count - 1) else "yes"
            gap = curve.grid_error if mark == "yes" else math.nan
            best = rows_of_seed.iloc[0][GROUP].to_dict() | {"learning_rate": float(curve.rates[curve.lowest])}
            best_rows.append(best | {"best_rate": mark, "grid_error": gap if math.isfinite(gap) else math.nan})
    columns = [*GROUP, "learning_rate", "best_rate", "grid_error"]
    return pd.DataFrame(best_rows, columns=columns).astype({name: rows[name].dtype for name in columns[:-2]})


def describe_results(rows: pd.DataFrame) -> str:
    """Return a sentence with the cell of the lowest validation loss of each model."""
    parts = []
    finished = rows[rows["status"] == "complete"]
    for model, group in finished.groupby("model", sort=False):
        best = group.sort_values(["validation_loss", "key"]).iloc[0]
        setting = "" if pd.isna(best["rank"]) else f" r={best['rank']:g}"
        setting += "" if pd.isna(best["learning_rate"]) else f" at {best['learning_rate']:g}"
        loss = f"{best['validation_loss']:.4f} ({best['validation_error']:.4f})"
        parts.append(f"{model}: {loss}, {best['method']}{setting}")
    diverged = int((rows["status"] == "diverged").sum())
    remarks = f" {diverged} diverged." if diverged else ""
    # A best rate at the end of its grid is only a bound on the optimum.
    if edges := int(rows.drop_duplicates([*GROUP, "learning_rate"])["best_rate"].eq("edge").sum()):
        groups = int(rows.loc[rows["learning_rate"].notna(), GROUP].drop_duplicates().shape[0])
        remarks += (
            f" {edges} of {groups} best learning rates lie at the edge of the rates that were tried: the best may lie "
            "beyond."
        )
    lowest = f"{'; '.join(parts)}. In brackets: standard error over records" if parts else "none"
    return f"Lowest validation loss of {len(rows)} cells: {lowest}.{remarks}"


def describe_result(value: Mapping[str, Any]) -> str:
    """Describe the result of `CellTrainer.run`."""
    tokens = value["tokens"]
    parts = [f"loss {math.fsum(reading['losses']) / tokens:.4f} at {reading['step']}" for reading in value["readings"]]
    if value["diverged_at"] is not None:
        parts.append(f"diverged at {value['diverged_at']}")
    for last in value.get("levels", ())[-1:]:
        error = f"standard error {100 * last['error']:.1f}"
        error += f", {100 * last['unparsed']:.1f} % unparsed" if last["unparsed"] else ""
        parts.append(f"{last['task']} {100 * last['accuracy']:.1f} % ({error})")
    return ", ".join(parts)


def write_answers(path: Path, samples: Sequence[Sample]) -> None:
    """Write the file `ANSWERS` of a cell, with the prediction for each item.

    Raises:
      InputError: If the file can't be written.
    """
    rows = [vars(sample) | {"correct": int(sample.correct)} for sample in samples]
    files.write_whole(path, frames.to_csv(frames.from_rows(rows, ANSWER_COLUMNS)))


def read_answers(path: Path) -> pd.DataFrame:
    """Read the file `ANSWERS` of a cell, with the columns `ANSWER_COLUMNS`.

    Raises:
      InputError: If the file is missing or damaged.
    """
    answers = frames.read_csv(path, ANSWER_COLUMNS, accepted=ACCEPTED)
    if answers["correct"].dtype != "int64":
        raise InputError(f"{path}: column correct has a value that is not an integer. Use {ACCEPTED}.")
    return answers


def _rows(run: SweepRun, tokens: Sequence[int], answer_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each read-out of a run, and one for its divergence."""
    labels: dict[str, Any] = {"key": run.key, "model": run.model, "method": run.method, "axes": dict(run.axes)}
    labels["rule"] = find_method(run.method).rule if run.rank is not None else None
    labels |= {name: getattr(run, name) for name in ("rank", "alpha", "gain", "gamma")}
    if run.method != BASE:
        labels |= {"seed": run.seed, "learning_rate": run.rate}
    labels |= {"trainable_parameters": run.result.get("trainable_parameters")}
    labels["steps"] = run.length
    rows = []
    for reading in run.read.readings:
        loss, answer = mean_per_token(reading.losses, tokens), mean_per_token(reading.answer_losses, answer_tokens)
        row = labels | {"step": reading.step, "status": "complete"}
        row |= {"validation_loss": loss.value, "validation_error": loss.error}
        row |= {"answer_loss": answer.value, "answer_error": answer.error}
        # The mean over the last steps averages out the noise between batches.
        if losses := run.read.train_losses[max(0, reading.step - 10) : reading.step]:
            row["train_loss"] = float(np.mean(losses))
        rows.append(row | (_scores(run) if reading.step == run.length else {}))
    # A divergence has no loss.
    if run.read.diverged_at is not None:
        step = {"step": run.read.diverged_at, "diverged_at": run.read.diverged_at}
        rows.append(labels | step | {"status": "diverged"} | _scores(run))
    return rows


def _scores(run: SweepRun) -> dict[str, Any]:
    """Return the accuracies of a run and its times."""
    row = {name: run.result.get(name) for name in ("seconds", "train_seconds", "accuracy_seconds")}
    row["protocol"] = (run.evaluation or {}).get("protocol")
    levels = run.result.get("levels", [])
    # A single task is its own average.
    for level in [*levels, *(level | {"task": "average"} for level in levels[:1] if len(levels) == 1)]:
        name = level["task"]
        row |= {name: level["accuracy"], f"{name}_error": level["error"], f"{name}_unparsed": level["unparsed"]}
        row[f"{name}_chance"] = level["chance"]
    return row


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = [BASE, *METHODS]
    return (
        row["model"],
        names.index(row["method"]),
        row["rank"] or 0,
        row["gain"] or 0,
        str(row["axes"]),
        row.get("learning_rate", 0.0),
        row.get("seed", 0),
        row["step"],
        row["key"],
    )
