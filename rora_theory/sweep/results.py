"""What a sweep's cells came to: a line a cell, the best learning rate of those tried, and each cell's own tables."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.data.formats import AnyRecord
from rora_theory.data.tasks import TASKS
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Sample
from rora_theory.finetune.held_out import RecordLoss
from rora_theory.io import files, frames
from rora_theory.runs.reading import CELLS, Finished, finished, key_of
from rora_theory.stats.rate_optimum import grid_gap
from rora_theory.sweep.cells import SweepCell
from rora_theory.sweep.design import BASE, METHODS

LOSSES, ANSWERS = "losses.csv", "answers.csv"
"""A cell's losses a held-out record, and its answers an item, in its folder."""
LOSS_COLUMNS = ("file", "index", "tokens", "loss", "answer_tokens", "answer_loss")
ANSWER_COLUMNS = ("task", "index", "prediction", "correct")
ACCEPTED = "the file as sims.rank_sweep wrote it"

COLUMNS = (
    "key", "status", "model", "method", "rule", "rank", "alpha", "gamma", "learning_rate", "best_rate", "seed",
    "trainable_parameters", "steps", "diverged_at", "train_loss", "validation_loss", "validation_error",
    "answer_loss", "answer_error", "protocol", "average", "average_error", "average_chance", "average_unparsed",
    *(f"{key}{part}" for key in TASKS for part in ("", "_error", "_unparsed")),
    "seconds", "train_seconds", "loss_seconds", "accuracy_seconds",
)  # fmt: skip
"""``best_rate``: ``only`` where one rate was tried; ``yes``, or ``edge`` where it is the lowest or highest of those
tried, at the cells of the rate of the lowest validation loss; empty at the others. See `best_rates`. ``average``: over
the tasks that were scored, be it one."""

GROUP = ["model", "method", "rank", "alpha"]
"""What a learning rate is chosen for."""


def results_table(cells: Iterable[Finished]) -> pd.DataFrame:
    """`results.csv`: the base first, then by method in the order of `METHODS`, rank, alpha, rate and seed.

    Training that was both scored and not has one line, the scored cell's.
    """
    found = [_row(cell) for cell in cells]
    scored = {_training(row) for row in found if row["evaluation"] and row["status"] == "complete"}
    kept = [row for row in found if row["evaluation"] or _training(row) not in scored]
    rows = frames.of(sorted(kept, key=_order), COLUMNS)
    marked = rows.drop(columns="best_rate").merge(marked_rates(rows), how="left", on=[*GROUP, "learning_rate"])
    return marked[list(COLUMNS)]


def read_results(folder: Path, cells: Sequence[SweepCell] | None = None) -> pd.DataFrame:
    """`results_table` of the finished cells of a run folder, all or those among ``cells``."""
    keys = None if cells is None else {key_of(cell) for cell in cells}
    return results_table(one for key, one in finished(folder).items() if keys is None or key in keys)


def cell_file(cells: Path, key: object, name: str) -> Path:
    """Return a file of a cell, by the key in the run's table. Raises `InputError` for a key that leads elsewhere."""
    return files.resolve_inside(cells, key, where=cells.parent / "results.csv") / name


def marked_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each model, method, rank and alpha the learning rate of the lowest validation loss, and a word for it.

    Rates are compared at one seed, the first of those with the most rates, so that a rate is not preferred for the
    seeds it was run at. A cell that diverged loses to all others.

    Args:
      rows: of `results_table`.

    Returns:
      `GROUP`, ``learning_rate`` and ``best_rate``: ``only``, ``yes`` or ``edge`` (of the rates that were compared, it
      is the lowest or highest); ``grid_error``: how far below that loss the minimum between the rates may lie, see
      `rate_optimum.grid_gap`, NaN where nothing bounds it. No row where every cell diverged or none is done.
    """
    tried = rows[rows["learning_rate"].notna() & rows["status"].isin(("complete", "diverged"))]
    tried = tried.assign(loss=tried["validation_loss"].where(tried["status"] == "complete", math.inf).astype(float))
    # Two such lines are one training, scored in two ways: a folder's cells differ in nothing else (`sweep_identity`).
    tried = tried.drop_duplicates([*GROUP, "seed", "learning_rate"], keep="last")
    found = []
    for _, group in tried.groupby(GROUP, dropna=False, sort=False):
        counts = group["seed"].value_counts()
        own = group[group["seed"] == counts[counts == counts.max()].index.min()]
        best = own.sort_values(["loss", "learning_rate"]).iloc[0]
        if math.isfinite(best["loss"]):
            ends = own["learning_rate"].min(), own["learning_rate"].max()
            word = "only" if len(own) == 1 else "edge" if best["learning_rate"] in ends else "yes"
            by_rate = own.sort_values("learning_rate")
            hidden = grid_gap(by_rate["learning_rate"].to_numpy(float), by_rate["loss"].to_numpy(float))
            hidden = hidden if word == "yes" and math.isfinite(hidden) else math.nan
            found.append(best[[*GROUP, "learning_rate"]].to_dict() | {"best_rate": word, "grid_error": hidden})
    columns = [*GROUP, "learning_rate", "best_rate", "grid_error"]
    return pd.DataFrame(found, columns=columns).astype({name: rows[name].dtype for name in columns[:-2]})


def rates_in_words(best: pd.DataFrame) -> list[str]:
    """The best learning rates of `best_rates` in words, a line each."""
    return [
        f"{row['model']}: {row['method']}"
        + (f" r={row['rank']}" if row["rank"] else "")
        + f": learning rate {row['learning_rate']:g}"
        + ("; it is at the edge of the rates tried: the best may lie beyond" if row["best_rate"] == "edge" else "")
        for row in frames.rows(best)
    ]


def results_in_words(rows: pd.DataFrame) -> str:
    """The cell of the lowest validation loss, of each model, in words."""
    parts = []
    done = rows[rows["status"] == "complete"]
    for model, group in done.groupby("model", sort=False):
        best = group.sort_values(["validation_loss", "key"]).iloc[0]
        how = "" if pd.isna(best["rank"]) else f" r={best['rank']:g}"
        how += "" if pd.isna(best["learning_rate"]) else f" at {best['learning_rate']:g}"
        parts.append(f"{model}: {best['validation_loss']:.4f} ± {best['validation_error']:.4f}, {best['method']}{how}")
    diverged = int((rows["status"] == "diverged").sum())
    more = f" {diverged} diverged." if diverged else ""
    if edges := int(rows.drop_duplicates([*GROUP, "learning_rate"])["best_rate"].eq("edge").sum()):
        groups = int(rows.loc[rows["learning_rate"].notna(), GROUP].drop_duplicates().shape[0])
        more += (
            f" {edges} of {groups} best learning rates lie at the edge of the rates that were tried: the best may lie "
            "beyond."
        )
    return f"Lowest validation loss of {len(rows)} cells: {'; '.join(parts) or 'none'} (± over records).{more}"


def result_in_words(result: Mapping[str, Any]) -> str:
    """A result in words."""
    if result["status"] == "diverged":
        return f"diverged at step {result['diverged_at']}"
    text = f"loss {result['validation_loss']:.4f} ± {result['validation_error']:.4f}"
    text += f", answers {result['answer_loss']:.4f} ± {result['answer_error']:.4f}"
    for last in result.get("levels", ())[-1:]:
        text += f", {last['task']} {100 * last['accuracy']:.1f} ± {100 * last['error']:.1f} %"
        text += f" ({100 * last['unparsed']:.1f} % unparsed)" if last["unparsed"] else ""
    return text


def write_losses(path: Path, held_out: Sequence[tuple[str, int, AnyRecord]], losses: Sequence[RecordLoss]) -> None:
    """Write a cell's `LOSSES`: the records with the file and the index each comes from.

    Raises:
      InputError: as `files.write_whole`.
    """
    rows = [{"file": name, "index": i} | vars(loss) for (name, i, _), loss in zip(held_out, losses, strict=True)]
    files.write_whole(path, frames.to_csv(frames.of(rows, LOSS_COLUMNS)))


def write_answers(path: Path, samples: Sequence[Sample]) -> None:
    """Write a cell's `ANSWERS`: the items with what was predicted. Raises `InputError` as `write_losses`."""
    rows = [vars(one) | {"correct": int(one.correct)} for one in samples]
    files.write_whole(path, frames.to_csv(frames.of(rows, ANSWER_COLUMNS)))


def read_losses(path: Path) -> pd.DataFrame:
    """Of a cell's `LOSSES`, `LOSS_COLUMNS`: losses are sums over tokens.

    Raises:
      InputError: the file is missing or damaged.
    """
    found = frames.read_csv(path, LOSS_COLUMNS, accepted=ACCEPTED)
    return _numbers(path, found, ("tokens", "answer_tokens"), ("loss", "answer_loss"))


def read_answers(path: Path) -> pd.DataFrame:
    """Of a cell's `ANSWERS`, `ANSWER_COLUMNS`. Raises `InputError` as `read_losses`."""
    return _numbers(path, frames.read_csv(path, ANSWER_COLUMNS, accepted=ACCEPTED), ("correct",))


def _numbers(path: Path, frame: pd.DataFrame, whole: Sequence[str], real: Sequence[str] = ()) -> pd.DataFrame:
    """A frame whose columns ``whole`` hold an integer in every row, and ``real`` numbers."""
    wrong = [name for name in whole if frame[name].dtype != "int64"]
    wrong += [name for name in real if frame[name].dtype.kind not in "if"]
    if wrong:
        raise InputError(f"{path}: is damaged (column {wrong[0]} has what is no number); accepted is {ACCEPTED}")
    return frame


def _row(cell: Finished) -> dict[str, Any]:
    """A cell's configuration and its result. Raises `InputError` for values of the wrong type."""
    with files.naming_damage(f"{CELLS}: key {cell.key}"):
        return _columns_of(cell)


def _columns_of(cell: Finished) -> dict[str, Any]:
    config = cell.cell
    row = {name: config[name] for name in ("model", "method", "rank", "alpha", "gamma", "learning_rate", "seed")}
    row |= {"key": cell.key, "training": config["training"], "evaluation": config["evaluation"]}
    row["rule"] = config["training"]["rule"] if config["rank"] is not None else None
    row["protocol"] = (config["evaluation"] or {}).get("protocol")
    row |= {name: value for name, value in cell.value.items() if name != "levels"}
    levels = cell.value.get("levels", [])
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
