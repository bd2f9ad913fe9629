"""Results of a sweep: a table of all cells, the best learning rates, and the files of each cell."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.errors import InputError
from rora_theory.lab.data.formats import AnyRecord
from rora_theory.lab.data.tasks import TASKS
from rora_theory.lab.evaluate.scoring import Sample
from rora_theory.lab.finetune.held_out import RecordLoss
from rora_theory.lab.sweep.cells import SweepCell
from rora_theory.lab.sweep.design import BASE, METHODS
from rora_theory.runs import files, frames
from rora_theory.runs.reading import CELLS, FinishedCell, key_of, read_finished_cells
from rora_theory.stats.rate_optimum import grid_gap

LOSSES, ANSWERS = "losses.csv", "answers.csv"
"""Files in a cell's folder: its losses by held-out record, and its answers by item."""

LOSS_COLUMNS = ("file", "index", "tokens", "loss", "answer_tokens", "answer_loss")
ANSWER_COLUMNS = ("task", "index", "prediction", "correct")
ACCEPTED = "the file as sims.rank_sweep wrote it"
"""Description of the expected file in messages."""

COLUMNS = (
    "key", "status", "model", "method", "rule", "rank", "alpha", "gamma", "learning_rate", "best_rate", "seed",
    "trainable_parameters", "steps", "diverged_at", "train_loss", "validation_loss", "validation_error",
    "answer_loss", "answer_error", "protocol", "average", "average_error", "average_chance", "average_unparsed",
    *(f"{key}{part}" for key in TASKS for part in ("", "_error", "_unparsed")),
    "seconds", "train_seconds", "loss_seconds", "accuracy_seconds",
)  # fmt: skip
"""Columns of `results.csv`.

``best_rate`` is set at the cells of the learning rate of the lowest validation loss, see `marked_rates`: ``only`` if
one rate was tried, ``edge`` if it is the lowest or highest tried, otherwise ``yes``. ``average`` is over the tasks that
were scored.
"""

GROUP = ["model", "method", "rank", "alpha"]
"""Columns that identify the cells among which a learning rate is chosen."""


def results_table(cells: Iterable[FinishedCell]) -> pd.DataFrame:
    """Return `results.csv`, sorted by base, method in the order of `METHODS`, rank, alpha, learning rate and seed.

    If the same training has a cell with scores and one without, only the cell with scores has a row.
    """
    all_rows = [_row(cell) for cell in cells]
    scored = {_training(row) for row in all_rows if row["evaluation"] and row["status"] == "complete"}
    selected = [row for row in all_rows if row["evaluation"] or _training(row) not in scored]
    rows = frames.from_rows(sorted(selected, key=_order), COLUMNS)
    marked = rows.drop(columns="best_rate").merge(marked_rates(rows), how="left", on=[*GROUP, "learning_rate"])
    return marked[list(COLUMNS)]


def read_results(folder: Path, cells: Sequence[SweepCell] | None = None) -> pd.DataFrame:
    """Return the `results_table` of the finished cells of a run folder.

    Args:
      folder: Run folder.
      cells: Cells to include; None includes all.
    """
    keys = None if cells is None else {key_of(cell) for cell in cells}
    return results_table(cell for key, cell in read_finished_cells(folder).items() if keys is None or key in keys)


def cell_file(cells: Path, key: object, name: str) -> Path:
    """Return the path of a file of a cell.

    Args:
      cells: Folder of the cells.
      key: Key of the cell in the run's table.
      name: Name of the file.

    Raises:
      InputError: If the key leads out of the folder.
    """
    return files.resolve_inside(cells, key, where=cells.parent / "results.csv") / name


def marked_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Find the learning rate of the lowest validation loss for each model, method, rank and alpha.

    Rates are compared at one seed, the first of those with the most rates, so that no rate has an advantage from its
    seeds. A cell that diverged has an infinite loss.

    Args:
      rows: Rows of `results_table`.

    Returns:
      A row for each `GROUP` with a finished cell that did not diverge: ``learning_rate``; ``best_rate``, which is
      ``only``, ``edge`` (the lowest or highest rate) or ``yes``; and ``grid_error``, a bound on how far a minimum
      between the rates may lie below the loss (`rate_optimum.grid_gap`), NaN if there is no bound.
    """
    tried = rows[rows["learning_rate"].notna() & rows["status"].isin(("complete", "diverged"))]
    tried = tried.assign(loss=tried["validation_loss"].where(tried["status"] == "complete", math.inf).astype(float))
    # Duplicates are the same training with two kinds of scores, since cells of a folder differ in nothing else.
    tried = tried.drop_duplicates([*GROUP, "seed", "learning_rate"], keep="last")
    best_rows = []
    for _, group in tried.groupby(GROUP, dropna=False, sort=False):
        # The lowest seed among those with the largest number of rates.
        counts = group["seed"].value_counts()
        seed_rows = group[group["seed"] == counts[counts == counts.max()].index.min()]
        best = seed_rows.sort_values(["loss", "learning_rate"]).iloc[0]
        if math.isfinite(best["loss"]):
            # At an end of the rates, the minimum may lie beyond them.
            ends = seed_rows["learning_rate"].min(), seed_rows["learning_rate"].max()
            mark = "only" if len(seed_rows) == 1 else "edge" if best["learning_rate"] in ends else "yes"
            by_rate = seed_rows.sort_values("learning_rate")
            gap = grid_gap(by_rate["learning_rate"].to_numpy(float), by_rate["loss"].to_numpy(float))
            gap = gap if mark == "yes" and math.isfinite(gap) else math.nan
            best_rows.append(best[[*GROUP, "learning_rate"]].to_dict() | {"best_rate": mark, "grid_error": gap})
    columns = [*GROUP, "learning_rate", "best_rate", "grid_error"]
    return pd.DataFrame(best_rows, columns=columns).astype({name: rows[name].dtype for name in columns[:-2]})


def describe_rates(best: pd.DataFrame) -> list[str]:
    """Describe the best learning rates of `marked_rates`, one line for each."""
    return [
        f"{row['model']}: {row['method']}"
        + (f" r={row['rank']}" if row["rank"] else "")
        + f": learning rate {row['learning_rate']:g}"
        + ("; it is at the edge of the rates tried: the best may lie beyond" if row["best_rate"] == "edge" else "")
        for row in frames.rows(best)
    ]


def describe_results(rows: pd.DataFrame) -> str:
    """Return a sentence with the cell of the lowest validation loss of each model."""
    parts = []
    finished = rows[rows["status"] == "complete"]
    for model, group in finished.groupby("model", sort=False):
        best = group.sort_values(["validation_loss", "key"]).iloc[0]
        setting = "" if pd.isna(best["rank"]) else f" r={best['rank']:g}"
        setting += "" if pd.isna(best["learning_rate"]) else f" at {best['learning_rate']:g}"
        loss = f"{best['validation_loss']:.4f} ± {best['validation_error']:.4f}"
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
    return f"Lowest validation loss of {len(rows)} cells: {'; '.join(parts) or 'none'} (± over records).{remarks}"


def describe_result(result: Mapping[str, Any]) -> str:
    """Describe the result of a cell."""
    if result["status"] == "diverged":
        return f"diverged at step {result['diverged_at']}"
    text = f"loss {result['validation_loss']:.4f} ± {result['validation_error']:.4f}"
    text += f", answers {result['answer_loss']:.4f} ± {result['answer_error']:.4f}"
    for last in result.get("levels", ())[-1:]:
        text += f", {last['task']} {100 * last['accuracy']:.1f} ± {100 * last['error']:.1f} %"
        text += f" ({100 * last['unparsed']:.1f} % unparsed)" if last["unparsed"] else ""
    return text


def write_losses(path: Path, held_out: Sequence[tuple[str, int, AnyRecord]], losses: Sequence[RecordLoss]) -> None:
    """Write the file `LOSSES` of a cell.

    Args:
      path: Path of the file.
      held_out: Held-out records, each with its file and its index in the file.
      losses: Losses of the records.

    Raises:
      InputError: If the file can't be written.
    """
    rows = [{"file": name, "index": i} | vars(loss) for (name, i, _), loss in zip(held_out, losses, strict=True)]
    files.write_whole(path, frames.to_csv(frames.from_rows(rows, LOSS_COLUMNS)))


def write_answers(path: Path, samples: Sequence[Sample]) -> None:
    """Write the file `ANSWERS` of a cell, with the prediction for each item.

    Raises:
      InputError: If the file can't be written.
    """
    rows = [vars(sample) | {"correct": int(sample.correct)} for sample in samples]
    files.write_whole(path, frames.to_csv(frames.from_rows(rows, ANSWER_COLUMNS)))


def read_losses(path: Path) -> pd.DataFrame:
    """Read the file `LOSSES` of a cell, with the columns `LOSS_COLUMNS` and losses summed over tokens.

    Raises:
      InputError: If the file is missing or damaged.
    """
    losses = frames.read_csv(path, LOSS_COLUMNS, accepted=ACCEPTED)
    return _with_numbers(path, losses, ("tokens", "answer_tokens"), ("loss", "answer_loss"))


def read_answers(path: Path) -> pd.DataFrame:
    """Read the file `ANSWERS` of a cell, with the columns `ANSWER_COLUMNS`.

    Raises:
      InputError: If the file is missing or damaged.
    """
    return _with_numbers(path, frames.read_csv(path, ANSWER_COLUMNS, accepted=ACCEPTED), ("correct",))


def _with_numbers(path: Path, frame: pd.DataFrame, integers: Sequence[str], reals: Sequence[str] = ()) -> pd.DataFrame:
    """Return the frame, or raise `InputError` if a column holds a value that is no integer or no number."""
    wrong = [name for name in integers if frame[name].dtype != "int64"]
    wrong += [name for name in reals if frame[name].dtype.kind not in "if"]
    if wrong:
        raise InputError(f"{path}: column {wrong[0]} has a value that is not a number. Use {ACCEPTED}.")
    return frame


def _row(cell: FinishedCell) -> dict[str, Any]:
    """Return a cell's configuration and result as a row; raise `InputError` for values of a wrong type."""
    with files.naming_damage(f"{CELLS}: key {cell.key}"):
        return _columns_of(cell)


def _columns_of(cell: FinishedCell) -> dict[str, Any]:
    config = cell.cell
    row = {name: config[name] for name in ("model", "method", "rank", "alpha", "gamma", "learning_rate", "seed")}
    row |= {"key": cell.key, "training": config["training"], "evaluation": config["evaluation"]}
    row["rule"] = config["training"]["rule"] if config["rank"] is not None else None
    row["protocol"] = (config["evaluation"] or {}).get("protocol")
    row |= {name: value for name, value in cell.value.items() if name != "levels"}
    levels = cell.value.get("levels", [])
    # A single task is its own average.
    for level in [*levels, *(level | {"task": "average"} for level in levels[:1] if len(levels) == 1)]:
        name = level["task"]
        row |= {name: level["accuracy"], f"{name}_error": level["error"], f"{name}_unparsed": level["unparsed"]}
        row[f"{name}_chance"] = level["chance"]
    return row


def _training(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["model"], json.dumps(row["training"], sort_keys=True)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = [BASE, *METHODS]
    return (
        row["model"],
        names.index(row["method"]) if row["method"] in names else len(names),
        row["rank"] or 0,
        row["alpha"] or 0,
        row["learning_rate"] or 0,
        -1 if row["seed"] is None else row["seed"],
        row["key"],
    )
