r"""One method less another on the same records and items: `differences.csv` of a sweep.

Cells of one sweep are measured on the same held-out records and the same items. What makes a record hard for one
adapter does for the other, so that the error of a difference of losses is several times below theirs; that of
accuracies gains little, and against the base, which errs elsewhere, nothing is gained. Standard errors are over records
or items, of the mean over the seeds that both have: they speak of other records. Those over seeds, given where there
are two or more, speak of training again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from rora_theory.data.tasks import TASKS
from rora_theory.errors import InputError
from rora_theory.io import frames
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.paired import mean_of_groups, mean_per_token_over_seeds
from rora_theory.sweep import results
from rora_theory.sweep.design import BASE

AGAINST = "lora"
RECORD, ITEM = ["file", "index", "tokens", "answer_tokens"], ["task", "index"]
"""What two cells' losses, and two cells' answers, have to agree in."""

Rates = Literal["same", "own", "best"]
Row = Mapping[str, Any]
Group = dict[int | None, Row]
"""Cells of one model, method, rank, alpha and learning rate, by seed; the base has none."""


@dataclass(frozen=True)
class Difference:
    """``method`` less ``against``; negative losses and positive accuracies are in favour of ``method``.

    Attributes:
      model, method, against: as in `results.csv`.
      rates: ``same``: both at one learning rate (the base has none); ``own``: each at the only one it was run at;
        ``best``: each at the best of those tried, chosen at one seed (`results.marked_rates`) on the very records
        that the difference is of.
      rank, alpha: of ``method``, or of ``against`` where ``method`` has none.
      learning_rate, against_rate: of both.
      seeds: how many both have.
      loss, loss_error, loss_seed_error: nats a token over all tokens, its standard error over records, and that over
        seeds, None for one.
      answer_loss, answer_error, answer_seed_error: over the answers' tokens.
      grid_error: of ``best`` what the grids may hide besides: the larger bound of how far below its loss the minimum
        between either's rates may lie (`results.marked_rates`); None where nothing bounds it, and of the others.
      average, average_error: accuracy, the unweighted mean over tasks; None where either is not scored.
      average_seeds: how many seeds of both are scored.
      tasks: accuracy by task; empty where either is not scored.
    """

    model: str
    method: str
    against: str
    rates: Rates
    rank: int | None
    alpha: float | None
    learning_rate: float
    against_rate: float | None
    seeds: int
    loss: float
    loss_error: float
    loss_seed_error: float | None
    grid_error: float | None
    answer_loss: float
    answer_error: float
    answer_seed_error: float | None
    average: float | None
    average_error: float | None
    average_seeds: int
    tasks: Mapping[str, Estimate] = field(default_factory=dict)


def difference_table(found: Iterable[Difference]) -> pd.DataFrame:
    """`differences.csv`: a row a difference, the tasks' accuracies as ``TASK`` and ``TASK_error``."""
    rows = []
    for one in found:
        rows.append(dict(vars(one)))
        for task, gained in one.tasks.items():
            rows[-1] |= {task: gained.value, f"{task}_error": gained.error}
    names = [one.name for one in fields(Difference) if one.name != "tasks"]
    return frames.of(rows, [*names, *(f"{task}{part}" for task in TASKS for part in ("", "_error"))])


def method_differences(rows: pd.DataFrame, cells: Path) -> Iterator[Difference]:
    """Every method less the base, and less LoRA of its rank and alpha (one without a rank: of every LoRA).

    Args:
      rows: of `results.csv`.
      cells: the folder of the cells, for their losses a record and answers an item.

    Raises:
      InputError: two cells measured on different records, or a cell's file that is missing or damaged.
    """
    marked = frames.rows(results.marked_rates(rows))
    hidden = {tuple(row[name] for name in results.GROUP): row["grid_error"] for row in marked}
    groups: dict[tuple[Any, ...], dict[float | None, Group]] = {}
    for row in frames.rows(rows[rows["status"] == "complete"]):
        key = tuple(row[name] for name in results.GROUP)
        groups.setdefault(key, {}).setdefault(row["learning_rate"], {})[row["seed"]] = row
    for (model, method, rank, alpha), by_rate in groups.items():
        if method == BASE:
            continue
        bases = groups.get((model, BASE, None, None), {})
        for group in by_rate.values():
            if bases:
                yield from compare_cells(group, bases[None], cells, "same")
        for other_key, others in groups.items():
            other_model, other, other_rank, other_alpha = other_key
            if other_model != model or other != AGAINST or method == AGAINST:
                continue
            if rank and (other_rank, other_alpha) != (rank, alpha):
                continue
            for rate in [rate for rate in by_rate if rate in others]:
                yield from compare_cells(by_rate[rate], others[rate], cells, "same")
            best, other_best = best_of(by_rate), best_of(others)
            if best and other_best:
                only = {best[1], other_best[1]} == {"only"}
                if not only or best[0] != other_best[0]:
                    gaps = [hidden.get(one) for one in ((model, method, rank, alpha), other_key)]
                    grid = None if only or None in gaps else max(gap for gap in gaps if gap is not None)
                    kind: Rates = "own" if only else "best"
                    yield from compare_cells(by_rate[best[0]], others[other_best[0]], cells, kind, grid)


def best_of(by_rate: Mapping[float | None, Group]) -> tuple[float | None, str] | None:
    """The learning rate that is marked the best, and its mark; None where there is none."""
    marks = {rate: row["best_rate"] for rate, group in by_rate.items() for row in group.values() if row["best_rate"]}
    return next(iter(marks.items()), None)


def compare_cells(
    group: Group, others: Group, cells: Path, rates: Rates, grid_error: float | None = None
) -> Iterator[Difference]:
    """One difference, if both have a seed in common; the base has every seed."""
    base = others.get(None)
    pairs = [(row, base or others[seed]) for seed, row in group.items() if base or seed in others]
    if not pairs:
        return
    loss, answer = _losses(pairs, cells)
    scored = [(row, other) for row, other in pairs if None not in (row["average"], other["average"])]
    average, tasks = _accuracies(scored, cells) if scored else (None, {})
    row, other = pairs[0]
    ranked = row if row["rank"] else other
    yield Difference(
        model=row["model"],
        method=row["method"],
        against=other["method"],
        rates=rates,
        rank=ranked["rank"],
        alpha=ranked["alpha"],
        learning_rate=row["learning_rate"],
        against_rate=other["learning_rate"],
        seeds=len(pairs),
        loss=loss[0].value,
        loss_error=loss[0].error,
        loss_seed_error=loss[1].error if loss[1].has_error else None,
        grid_error=grid_error,
        answer_loss=answer[0].value,
        answer_error=answer[0].error,
        answer_seed_error=answer[1].error if answer[1].has_error else None,
        average=average.value if average else None,
        average_error=average.error if average else None,
        average_seeds=len(scored),
        tasks=tasks,
    )


def _losses(pairs: Sequence[tuple[Row, Row]], cells: Path) -> list[tuple[Estimate, Estimate]]:
    """Differences of the losses a token, over all tokens and over the answers', averaged over seeds: each with the
    error over records, and with that over seeds.
    """
    paths = [[results.cell_file(cells, one["key"], results.LOSSES) for one in pair] for pair in pairs]
    found = [[results.read_losses(path) for path in pair] for pair in paths]
    _check_same(pairs, found, RECORD, "measured on different records")
    return [
        mean_per_token_over_seeds(
            np.stack([own[f"{kind}loss"] - other[f"{kind}loss"] for own, other in found]),
            found[0][0][f"{kind}tokens"].tolist(),
        )
        for kind in ("", "answer_")
    ]


def _accuracies(pairs: Sequence[tuple[Row, Row]], cells: Path) -> tuple[Estimate, dict[str, Estimate]]:
    """Differences of the average accuracy and of each task's, with their standard errors over items."""
    by_task: dict[str, list[np.ndarray]] = {}
    paths = [[results.cell_file(cells, one["key"], results.ANSWERS) for one in pair] for pair in pairs]
    found = [[results.read_answers(path) for path in pair] for pair in paths]
    _check_same(pairs, found, ITEM, "scored on different items")
    for own, other in found:
        for task, gained in (own["correct"] - other["correct"]).groupby(own["task"], sort=False):
            by_task.setdefault(task, []).append(gained.to_numpy())
    groups = {task: np.stack(columns) for task, columns in by_task.items()}
    return mean_of_groups(list(groups.values())), {task: mean_of_groups([own]) for task, own in groups.items()}


def _check_same(
    pairs: Sequence[tuple[Row, Row]], found: Sequence[Sequence[pd.DataFrame]], columns: list[str], what: str
) -> None:
    """Raise `InputError` unless all cells of all pairs agree in these columns of what was read of them."""
    first = found[0][0][columns]
    for pair, read in zip(pairs, found, strict=True):
        for row, frame in zip(pair, read, strict=True):
            if not first.equals(frame[columns]):
                raise InputError(f"{row['key']} and {pairs[0][0]['key']}: were {what}; accepted are the same ones")
