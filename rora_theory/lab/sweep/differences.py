r"""Paired differences between methods on the same records and items: `differences.csv` of a sweep.

All cells of a sweep are measured on the same held-out records and items. A record that is hard for one adapter is hard
for another, so that the error of a difference of losses is several times smaller than the errors of the losses.
Differences of accuracies gain little from the pairing, and those against the base gain nothing. Standard errors over
records or items apply to the mean over the seeds that both methods have: they describe how another sample of records
would differ. Standard errors over seeds, available with two or more seeds, describe how another training run would
differ.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from rora_theory.errors import InputError
from rora_theory.lab.data.tasks import TASKS
from rora_theory.lab.sweep import results
from rora_theory.lab.sweep.methods import BASE
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.runs import frames
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.paired import mean_of_groups, mean_per_token_over_seeds

AGAINST = "lora"
"""Method with which the others are compared, in addition to the base."""

RECORD, ITEM = ["source", "index", "tokens", "answer_tokens"], ["task", "index"]
"""Columns that must be equal in the losses, and in the answers, of two cells."""

Rates = Literal["same", "own", "best"]
"""Choice of the two learning rates, see `COLUMNS`."""

Row = Mapping[str, Any]
"""Row of `results.csv`."""

Group = dict[int | None, Row]
"""Cells of one model, method, rank, alpha and learning rate, by seed; the base has the seed None."""


COLUMNS = (
    "model", "method", "against", "rates", "rank", "alpha", "learning_rate", "against_rate", "seeds", "loss",
    "loss_error", "loss_seed_error", "grid_error", "answer_loss", "answer_error", "answer_seed_error", "average",
    "average_error", "average_seeds", *(f"{task}{suffix}" for task in TASKS for suffix in ("", "_error")),
)  # fmt: skip
"""Columns of `differences.csv`: ``method`` minus ``against``. ``method`` is better if losses are negative.

- ``rates`` is ``same`` if both have the same learning rate (the base has none); ``own`` if each has the only rate that
  it was run at; ``best`` if each has its best rate, chosen at one seed (`results.marked_rates`) on the same records.
- ``rank`` and ``alpha`` are those of ``method``, or of ``against`` if ``method`` has none.
- ``seeds`` is the number of seeds that both have.
- ``loss`` is over all tokens and ``answer_loss`` over those of the answers, in nats per token. Their ``_error`` is over
  records, ``_seed_error`` over seeds and missing for one seed.
- ``grid_error`` bounds how far a minimum between the tried rates may lie below the loss at the best rate, the larger of
  the two. It is missing without a bound, and unless ``rates`` is ``best``.
- ``average`` is the difference of the accuracies, an unweighted mean over tasks, with its error over items, over the
  ``average_seeds`` for which both are scored; the tasks follow. All are missing if one method is not scored.
"""


def collect_record_losses(runs: Iterable[SweepRun], records: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the losses of the held-out records at the end of each run, by key, with the columns `RECORD`."""
    losses = {}
    for run in runs:
        for reading in run.read.readings[-1:]:
            of_model = records[records["model"] == run.model].reset_index(drop=True)
            losses[run.key] = of_model.assign(loss=reading.losses, answer_loss=reading.answer_losses)
    return losses


def method_differences(rows: pd.DataFrame, losses: Mapping[str, pd.DataFrame], cells: Path) -> Iterator[dict[str, Any]]:
    """Compare every method with the base and with LoRA.

    A method with a rank is compared with LoRA of the same rank and alpha, a method without a rank with every LoRA.

    Args:
      rows: Rows of `results.csv` at the end of each run, without further axes.
      losses: Losses of the held-out records by key, see `collect_record_losses`.
      cells: Folder of the cells, with their answers by item.

    Yields:
      The rows of `differences.csv`, with those of the columns `COLUMNS` that are known.

    Raises:
      InputError: If two cells were measured on different records, or if a cell's file is missing or damaged.
    """
    # Cells by model, method, rank and alpha, then by learning rate, then by seed.
    marked = frames.rows(results.marked_rates(rows))
    grid_errors = {tuple(row[name] for name in results.GROUP): row["grid_error"] for row in marked}
    groups: dict[tuple[Any, ...], dict[float | None, Group]] = {}
    # Finished cells by setting, then by rate, then by seed.
    for row in frames.rows(rows[rows["status"] == "complete"]):
        key = tuple(row[name] for name in results.GROUP)
        groups.setdefault(key, {}).setdefault(row["learning_rate"], {})[row["seed"]] = row
    for (model, method, rank, alpha), by_rate in groups.items():
        if method == BASE:
            continue
        # Against the base, at every rate.
        base = groups.get((model, BASE, None, None), {})
        for group in by_rate.values():
            if base:
                yield from compare_cells(group, base[None], losses, cells, "same")
        # LoRA of the same model, and of the same rank and alpha for methods that have them.
        for lora_key, lora_by_rate in groups.items():
            lora_model, lora_method, lora_rank, lora_alpha = lora_key
            if lora_model != model or lora_method != AGAINST or method == AGAINST:
                continue
            if rank and (lora_rank, lora_alpha) != (rank, alpha):
                continue
            # Against LoRA at the same rate.
            for rate in [rate for rate in by_rate if rate in lora_by_rate]:
                yield from compare_cells(by_rate[rate], lora_by_rate[rate], losses, cells, "same")
            # Against LoRA with each method at its best or only rate, if this is not the same comparison again.
            best, lora_best = marked_best(by_rate), marked_best(lora_by_rate)
            if best and lora_best:
                is_only = {best[1], lora_best[1]} == {"only"}
                if not is_only or best[0] != lora_best[0]:
                    gaps = [grid_errors.get(key) for key in ((model, method, rank, alpha), lora_key)]
                    grid_error = None if is_only or None in gaps else max(gap for gap in gaps if gap is not None)
                    kind: Rates = "own" if is_only else "best"
                    ends = by_rate[best[0]], lora_by_rate[lora_best[0]]
                    yield from compare_cells(*ends, losses, cells, kind, grid_error)


def marked_best(by_rate: Mapping[float | None, Group]) -> tuple[float | None, str] | None:
    """Return the learning rate that is marked as the best, and its mark; None if there is none."""
    marks = {rate: row["best_rate"] for rate, group in by_rate.items() for row in group.values() if row["best_rate"]}
    return next(iter(marks.items()), None)


def compare_cells(
    group: Group,
    against: Group,
    record_losses: Mapping[str, pd.DataFrame],
    cells: Path,
    rates: Rates,
    grid_error: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the row of two groups, if they have a seed in common; the base stands for every seed."""
    # Pairs of the same seed. The base model is not trained, so it pairs with every seed.
    base = against.get(None)
    pairs = [(row, base or against[seed]) for seed, row in group.items() if base or seed in against]
    if not pairs:
        return
    # Losses of the same records, and answers to the same items: their paired differences have small errors.
    (loss, loss_by_seed), (answer, answer_by_seed) = _losses(pairs, record_losses)
    # Accuracies are compared over the seeds at which both were scored.
    scored = [(row, other) for row, other in pairs if None not in (row["average"], other["average"])]
    accuracies = _accuracies(scored, cells) if scored else {}
    # All pairs have the same settings except for the seed, so the first one describes them.
    row, other = pairs[0]
    ranked = row if row["rank"] else other
    labels = {"model": row["model"], "method": row["method"], "against": other["method"], "rates": rates}
    labels |= {"rank": ranked["rank"], "alpha": ranked["alpha"]}
    labels |= {"learning_rate": row["learning_rate"], "against_rate": other["learning_rate"], "seeds": len(pairs)}
    columns = {"loss": loss.value, "loss_error": loss.error, "loss_seed_error": loss_by_seed.known_error}
    columns |= {"grid_error": grid_error, "answer_loss": answer.value, "answer_error": answer.error}
    columns |= {"answer_seed_error": answer_by_seed.known_error, "average_seeds": len(scored)}
    for name, accuracy in accuracies.items():
        columns |= {name: accuracy.value, f"{name}_error": accuracy.error}
    yield labels | columns


def _losses(pairs: Sequence[tuple[Row, Row]], by_key: Mapping[str, pd.DataFrame]) -> list[tuple[Estimate, Estimate]]:
    """Compute the differences of the losses per token over all tokens and over the answers' tokens.

    Returns:
      The mean over seeds twice: with its error over records, and with its error over seeds.
    """
    losses = [[by_key[row["key"]] for row in pair] for pair in pairs]
    _check_same(pairs, losses, RECORD, "measured on different records")
    return [
        mean_per_token_over_seeds(
            np.stack([first[f"{kind}loss"] - second[f"{kind}loss"] for first, second in losses]),
            losses[0][0][f"{kind}tokens"].tolist(),
        )
        for kind in ("", "answer_")
    ]


def _accuracies(pairs: Sequence[tuple[Row, Row]], cells: Path) -> dict[str, Estimate]:
    """Compute the differences of the ``average`` accuracy and of each task's, with standard errors over items."""
    by_task: dict[str, list[np.ndarray]] = {}
    paths = [[results.cell_file(cells, row["key"], results.ANSWERS) for row in pair] for pair in pairs]
    answers = [[results.read_answers(path) for path in pair] for pair in paths]
    _check_same(pairs, answers, ITEM, "scored on different items")
    # Item by item: 1 if only the first answers correctly, -1 if only the second does, otherwise 0.
    for first, second in answers:
        for task, difference in (first["correct"] - second["correct"]).groupby(first["task"], sort=False):
            by_task.setdefault(task, []).append(difference.to_numpy())
    tasks = {task: np.stack(by_seed) for task, by_seed in by_task.items()}
    return {"average": mean_of_groups(list(tasks.values()))} | {
        task: mean_of_groups([items]) for task, items in tasks.items()
    }


def _check_same(
    pairs: Sequence[tuple[Row, Row]], tables: Sequence[Sequence[pd.DataFrame]], columns: list[str], problem: str
) -> None:
    """Raise `InputError` unless the tables of all cells are equal in some columns."""
    first = tables[0][0][columns]
    for pair, pair_tables in zip(pairs, tables, strict=True):
        for row, table in zip(pair, pair_tables, strict=True):
            if not first.equals(table[columns]):
                raise InputError(
                    f"cells {row['key']} and {pairs[0][0]['key']} were {problem}, so they can't be compared. "
                    "Use cells of one sweep."
                )
