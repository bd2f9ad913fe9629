"""`results.csv` of a folder of sims.rank_sweep: a line a cell, and which learning rate was the best of those tried."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory import files
from rora_theory.data.tasks import TASKS
from rora_theory.errors import InputError
from sims.common import matrix

BASE = "base"
"""The model without an adapter: one cell, neither trained nor repeated."""

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


def write(folder: matrix.Matrix, methods: Sequence[str]) -> None:
    """`results.csv` from every cell in the folder, in the order of ``methods``."""
    folder.write_table(lambda: as_csv(COLUMNS, [list(row.values()) for row in table(folder, methods)]))


def table(folder: matrix.Matrix, methods: Sequence[str]) -> list[dict[str, str]]:
    """The lines of `results.csv`. Training that was both scored and not has one line, the scored cell's."""
    found = list(_rows(folder))
    scored = {_training(row) for row in found if row["evaluation"] and row["status"] == "complete"}
    kept = [row for row in found if row["evaluation"] or _training(row) not in scored]
    kept.sort(key=lambda row: _order(row, methods))
    rows = [{column: text(row.get(column)) for column in COLUMNS} for row in kept]
    best = best_rates(rows)
    for row in rows:
        rate, word = best.get(group_of(row), ("", ""))
        row["best_rate"] = word if row["learning_rate"] == rate else ""
    return rows


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


def _rows(folder: matrix.Matrix) -> Iterator[dict[str, Any]]:
    """One row a cell that was begun: its configuration and its result, as far as there is one."""
    for place in folder.begun():
        config = place.config
        result, status = place.result(), place.status()
        row = {name: config[name] for name in ("model", "method", "rank", "alpha", "gamma", "learning_rate", "seed")}
        row |= {"key": place.key, "attempts": status.attempts, "status": status.state}
        row |= {"training": config["training"], "evaluation": config["evaluation"]}
        row["rule"] = config["training"]["rule"] if config["rank"] is not None else None
        row["protocol"] = (config["evaluation"] or {}).get("protocol")
        if result is not None:
            row |= {name: value for name, value in result.items() if name != "levels"}
            levels = result.get("levels", [])
            for level in [*levels, *(level | {"task": "average"} for level in levels[:1] if len(levels) == 1)]:
                name = level["task"]
                row |= {name: level["accuracy"], f"{name}_error": level["error"], f"{name}_unparsed": level["unparsed"]}
                row[f"{name}_chance"] = level["chance"]
        yield row


def _training(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["model"], json.dumps(row["training"], sort_keys=True)


def _order(row: Mapping[str, Any], methods: Sequence[str]) -> tuple[Any, ...]:
    names = [BASE, *methods]
    return (
        row["model"],
        names.index(row["method"]) if row["method"] in names else len(names),
        row["rank"] or 0,
        row["alpha"] or 0,
        row["learning_rate"] or 0,
        -1 if row["seed"] is None else row["seed"],
        row["key"],
    )
