"""What a sweep's cells came to: a line a cell, the best learning rate of those tried, and each cell's own tables."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rora_theory import files
from rora_theory.data.records import Record
from rora_theory.data.tasks import TASKS
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Sample
from rora_theory.finetune.held_out import RecordLoss
from rora_theory.sweep.design import BASE, METHODS

LOSSES, ANSWERS = "losses.csv", "answers.csv"
"""A cell's losses a held-out record, and its answers an item, in its folder."""

COLUMNS = (
    "key", "status", "model", "method", "rule", "rank", "alpha", "gamma", "learning_rate", "best_rate", "seed",
    "trainable_parameters", "steps", "diverged_at", "train_loss", "validation_loss", "validation_error",
    "answer_loss", "answer_error", "protocol", "average", "average_error", "average_chance", "average_unparsed",
    *(f"{key}{part}" for key in TASKS for part in ("", "_error", "_unparsed")),
    "seconds", "train_seconds", "loss_seconds", "accuracy_seconds", "attempts",
)  # fmt: skip
"""``best_rate``: ``only`` where one rate was tried; ``yes``, or ``edge`` where it is the lowest or highest of those
tried, at the cells of the rate of the lowest validation loss; empty at the others. See `best_rates`. ``average``: over
the tasks that were scored, be it one."""

Row = Mapping[str, str]
Group = tuple[str, str, str, str]
"""Model, method, rank and alpha."""


class Outcome(NamedTuple):
    """How far a cell has come.

    Attributes:
      key: the cell's.
      config: the cell as JSON has it, see `rora_theory.sweep.cells.Cell`.
      status: a word, where there is no result yet.
      attempts: how often it was begun.
      result: see `rora_theory.sweep.workbench.Measured`; None where there is none yet.
    """

    key: str
    config: Mapping[str, Any]
    status: str
    attempts: int
    result: Mapping[str, Any] | None


def table(outcomes: Iterable[Outcome]) -> list[dict[str, str]]:
    """The lines of `results.csv`: the base first, then by method in the order of `METHODS`, rank, alpha, rate and seed.

    Training that was both scored and not has one line, the scored cell's.
    """
    found = [_row(outcome) for outcome in outcomes]
    scored = {_training(row) for row in found if row["evaluation"] and row["status"] == "complete"}
    kept = [row for row in found if row["evaluation"] or _training(row) not in scored]
    kept.sort(key=_order)
    rows = [{column: text(row.get(column)) for column in COLUMNS} for row in kept]
    best = best_rates(rows)
    for row in rows:
        rate, word = best.get(group_of(row), ("", ""))
        row["best_rate"] = word if row["learning_rate"] == rate else ""
    return rows


def table_csv(outcomes: Iterable[Outcome]) -> str:
    """`results.csv`."""
    return as_csv(COLUMNS, [list(row.values()) for row in table(outcomes)])


def best_rates(rows: Sequence[Row]) -> dict[Group, tuple[str, str]]:
    """Of each model, method, rank and alpha the learning rate of the lowest validation loss, and a word for it.

    Rates are compared at one seed, the first of those with the most rates, so that a rate is not preferred for the
    seeds it was run at. A cell that diverged loses to all others.

    Returns:
      rate and ``only``, ``yes`` or ``edge`` (of the rates that were compared, it is the lowest or highest). No entry
      where every cell diverged or none is done.
    """
    losses: dict[Group, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["learning_rate"] and row["status"] in ("complete", "diverged"):
            loss = float(row["validation_loss"]) if row["status"] == "complete" else math.inf
            losses.setdefault(group_of(row), {}).setdefault(row["seed"], {})[row["learning_rate"]] = loss
    found = {}
    for group, by_seed in losses.items():
        tried = by_seed[min(by_seed, key=lambda seed: (-len(by_seed[seed]), int(seed)))]
        rate = min(tried, key=lambda rate: (tried[rate], float(rate)))
        if math.isfinite(tried[rate]):
            ends = min(tried, key=float), max(tried, key=float)
            found[group] = (rate, "only" if len(tried) == 1 else "edge" if rate in ends else "yes")
    return found


def group_of(row: Row) -> Group:
    """What a learning rate is chosen for."""
    return row["model"], row["method"], row["rank"], row["alpha"]


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A head and lines, ending in newlines."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()


def write_losses(path: Path, held_out: Sequence[tuple[str, int, Record]], losses: Sequence[RecordLoss]) -> None:
    """Write a cell's `LOSSES`: the records with the file and the index each comes from.

    Raises:
      InputError: as `files.write_whole`.
    """
    rows = [[name, i, *map(repr, astuple(loss))] for (name, i, _), loss in zip(held_out, losses, strict=True)]
    files.write_whole(path, as_csv(("file", "index", *(field.name for field in fields(RecordLoss))), rows))


def write_answers(path: Path, samples: Sequence[Sample]) -> None:
    """Write a cell's `ANSWERS`: the items with what was predicted. Raises `InputError` as `write_losses`."""
    rows = [[one.task, one.index, one.prediction or "", int(one.correct)] for one in samples]
    files.write_whole(path, as_csv(("task", "index", "prediction", "correct"), rows))


def read_losses(path: Path, kind: Literal["", "answer_"]) -> tuple[list[tuple[str, str]], np.ndarray, list[int]]:
    """Of a cell's `losses.csv`: which records, their summed losses, and their tokens.

    Raises:
      InputError: the file is missing or damaged.
    """
    rows = read_lines(path)
    try:
        loss = np.array([float(row[f"{kind}loss"]) for row in rows])
        return [(row["file"], row["index"]) for row in rows], loss, [int(row[f"{kind}tokens"]) for row in rows]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); accepted is the file as sims.rank_sweep wrote it") from error


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of a cell's CSV file. Raises `InputError` for one that can't be read."""
    accepted = "the file as sims.rank_sweep wrote it"
    return list(csv.DictReader(io.StringIO(files.read_text(path, accepted=accepted))))


def text(value: Any) -> str:
    """A figure to its last digit; nothing for None."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _row(outcome: Outcome) -> dict[str, Any]:
    """A cell's configuration and its result, as far as there is one."""
    config = outcome.config
    row = {name: config[name] for name in ("model", "method", "rank", "alpha", "gamma", "learning_rate", "seed")}
    row |= {"key": outcome.key, "attempts": outcome.attempts, "status": outcome.status}
    row |= {"training": config["training"], "evaluation": config["evaluation"]}
    row["rule"] = config["training"]["rule"] if config["rank"] is not None else None
    row["protocol"] = (config["evaluation"] or {}).get("protocol")
    if outcome.result is not None:
        row |= {name: value for name, value in outcome.result.items() if name != "levels"}
        levels = outcome.result.get("levels", [])
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
