"""`differences.csv`: one method minus another, by record and by item, against manual arithmetic."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rora_theory.errors import InputError
from rora_theory.lab.sweep import differences, results
from rora_theory.lab.sweep.differences import COLUMNS
from rora_theory.runs import frames
from rora_theory.stats.rate_optimum import grid_gaps

TOKENS, ANSWER_TOKENS = [10, 20, 30], [1, 2, 1]
METHODS = {"b": "base", "l": "lora", "r": "rora", "d": "dora", "s": "series"}
"""Method of a cell by the first letter of its key."""


def row(key: str, rank: int | None = 8, rate: float | None = 0.001, **values: Any) -> dict[str, Any]:
    """Return a row of results.csv; a digit at the end of the key is the seed."""
    method = METHODS[key[0]]
    if method == "base":
        rank = rate = None
    seed = None if method == "base" else int(key[1:]) if key[1:].isdigit() else 0
    identity = {"key": key, "status": "complete", "model": "m", "method": method, "rank": rank, "seed": seed}
    setting = {"alpha": 64.0 if rank else None, "learning_rate": rate, "best_rate": "only", "average": None}
    return identity | setting | values


def difference_rows(rows: Iterable[dict[str, Any]], cells: Path) -> list[dict[str, Any]]:
    losses = {
        path.parent.name: pd.read_csv(path).rename(columns={"file": "source"}) for path in cells.glob("*/losses.csv")
    }
    return list(differences.method_differences(frames.from_rows(rows, results.COLUMNS), losses, cells))


def compare(rows: Iterable[dict[str, Any]], cells: Path) -> list[SimpleNamespace]:
    """Return the differences with their columns as attributes, None where a column is missing."""
    return [SimpleNamespace(**dict.fromkeys(COLUMNS) | row) for row in difference_rows(rows, cells)]


def write_cell(
    folder: Path, key: str, losses: Sequence[float] = (1.0, 1.0, 1.0), correct: Mapping[str, list[int]] | None = None
) -> None:
    """Write the losses of three records, and the answers of each task if it was scored."""
    (folder / key).mkdir(parents=True)
    records = zip("abc", losses, TOKENS, ANSWER_TOKENS, strict=True)
    lines = ["file,index,tokens,loss,answer_tokens,answer_loss"]
    lines += [f"{name},{i},{size},{loss!r},{few},{loss / 2!r}" for i, (name, loss, size, few) in enumerate(records)]
    (folder / key / "losses.csv").write_text("\n".join(lines) + "\n")
    if correct is not None:
        answers = [f"{task},{i},x,{value}" for task, items in correct.items() for i, value in enumerate(items)]
        (folder / key / "answers.csv").write_text("\n".join(["task,index,prediction,correct", *answers]) + "\n")


def select(rows: Iterable[SimpleNamespace], method: str, against: str, rates: str = "same") -> SimpleNamespace:
    (difference,) = [row for row in rows if (row.method, row.against, row.rates) == (method, against, rates)]
    return difference


def test_losses_and_accuracies_are_paired(tmp_path):
    write_cell(tmp_path, "base", [30.0, 50.0, 90.0], {"s": [0, 0, 0, 1], "t": [1, 0]})
    write_cell(tmp_path, "lora", [10.0, 25.0, 31.0], {"s": [1, 0, 0, 1], "t": [1, 1]})
    write_cell(tmp_path, "rora", [9.0, 24.0, 28.0], {"s": [1, 1, 0, 0], "t": [0, 1]})
    rows = [row(key, average=average) for key, average in (("base", 0.0), ("lora", 0.7), ("rora", 0.5))]
    compared = compare(rows, tmp_path)
    assert [(row.method, row.against) for row in compared] == [("lora", "base"), ("rora", "base"), ("rora", "lora")]
    difference = select(compared, "rora", "lora")
    assert difference.loss == pytest.approx(-5 / 60, rel=1e-14)  # -1 - 1 - 3 nats over 60 tokens
    residuals = np.array([-1 + 10 / 12, -1 + 20 / 12, -3 + 30 / 12])
    assert difference.loss_error == pytest.approx(math.sqrt((residuals**2).sum() * 3 / 2) / 60, rel=1e-12)
    assert difference.answer_loss == pytest.approx(-2.5 / 4, rel=1e-14)
    residuals = np.array([-0.5, -0.5, -1.5]) + 2.5 / 4 * np.array(ANSWER_TOKENS)
    assert difference.answer_error == pytest.approx(math.sqrt((residuals**2).sum() * 3 / 2) / 4, rel=1e-12)
    assert difference.loss_seed_error is None
    assert difference.average == pytest.approx((0 - 0.5) / 2)  # task s: +1 and -1 of 4; task t: -1 of 2
    assert difference.average_error == pytest.approx(math.sqrt((2 / 3) / 4 + 0.5 / 2) / 2, rel=1e-12)
    assert (difference.seeds, difference.average_seeds, difference.rank, difference.alpha) == (1, 1, 8, 64.0)
    assert (difference.s, difference.t) == (0.0, -0.5)
    assert difference.s_error == pytest.approx(math.sqrt((2 / 3) / 4), rel=1e-12)  # the pairs: +1, -1, 0, 0
    assert difference.t_error == pytest.approx(math.sqrt(0.5 / 2), rel=1e-12)
    gain = select(compared, "lora", "base")
    assert gain.loss == pytest.approx(-104 / 60, rel=1e-14)
    assert gain.average == pytest.approx((0.25 + 0.5) / 2)
    assert gain.against_rate is None


def test_seeds_are_averaged_before_the_error_and_only_common_ones_count(tmp_path):
    """The third seed of one method has no partner; accuracies are averaged over the two seeds that both have."""
    first_losses = {"l0": 10.0, "l1": 12.0, "r0": 9.0, "r1": 13.0, "r2": 0.0}
    correct = {"l0": [0, 0], "l1": [0, 0], "r0": [1, 0], "r1": [1, 1], "r2": [0, 0]}
    for key, loss in first_losses.items():
        write_cell(tmp_path, key, [loss, 20.0, 30.0], {"s": correct[key]})
    difference = select(compare([row(key, average=0.5) for key in first_losses], tmp_path), "rora", "lora")
    assert (difference.seeds, difference.loss, difference.loss_error) == (2, 0.0, 0.0)  # -1 and +1 on one record
    assert difference.loss_seed_error == pytest.approx(math.sqrt(2) / 60 / math.sqrt(2))  # deviation of -1/60 and 1/60
    assert difference.answer_seed_error == pytest.approx(0.5 / 4)
    assert (difference.average, difference.average_seeds) == (0.75, 2)


def test_each_at_its_best_rate(tmp_path):
    for key, loss in (("l-low", 1.0), ("l-high", 3.0), ("r-low", 4.0), ("r-high", 2.0)):
        write_cell(tmp_path, key, [loss] * 3)
    rows = [
        row("l-low", best_rate="edge"),
        row("l-high", rate=0.003, best_rate=None),
        row("r-low", best_rate=None),
        row("r-high", rate=0.003, best_rate="edge"),
    ]
    compared = compare(rows, tmp_path)
    best = select(compared, "rora", "lora", "best")
    assert (best.learning_rate, best.against_rate) == (0.003, 0.001)
    assert best.loss == pytest.approx(3 / 60)
    same = {row.learning_rate: row.loss for row in compared if row.rates == "same"}
    assert same == {0.001: pytest.approx(9 / 60), 0.003: pytest.approx(-3 / 60)}
    rows[2]["best_rate"], rows[3]["best_rate"] = "yes", None
    assert select(compare(rows, tmp_path), "rora", "lora", "best").loss == pytest.approx(9 / 60)


def test_the_grid_error_is_the_larger_bound_of_the_two_methods(tmp_path):
    """Rates are a decade apart around a loss of 1; an edge or two diverged neighbours have no bound."""
    curves = {
        "lora": [1.2, 1.0, 1.3], "rora": [1.1, 1.0, 1.1], "wide": [1.4, 1.0, 1.5], "dora": [1.2, 1.1, 1.0],
        "quarter": [None, 1.0, None],
    }  # fmt: skip
    rates, rows = (1e-4, 1e-3, 1e-2), []
    for method, losses in curves.items():
        for rate, loss in zip(rates, losses, strict=True):
            key = f"l-{method}{rate:g}"
            write_cell(tmp_path, key)
            mark = None if loss != 1.0 else "edge" if method == "dora" else "yes"
            status = "complete" if loss else "diverged"
            values = {"method": method, "validation_loss": loss, "best_rate": mark, "status": status}
            rows.append(row(key, rate=rate, **values))
    compared = compare(rows, tmp_path)
    methods = ("lora", "rora", "wide")
    gaps = grid_gaps(np.array(rates), np.array([curves[method] for method in methods]))
    bounds = dict(zip(methods, gaps.tolist(), strict=True))
    assert bounds["wide"] > bounds["lora"] > bounds["rora"] > 0
    expected = {"rora": bounds["lora"], "wide": bounds["wide"], "dora": None, "quarter": None}
    errors = {method: select(compared, method, "lora", "best").grid_error for method in expected}
    assert errors == {method: bound and pytest.approx(bound, rel=1e-12) for method, bound in expected.items()}
    assert {row.grid_error for row in compared if row.rates == "same"} == {None}


def test_methods_with_one_rate_are_compared_at_their_own_rates(tmp_path):
    """DoRA's published rate differs from LoRA's. If one method has several rates, the difference is of the best."""
    for key, losses in (("l", [1.0] * 3), ("d", [3.0, 1.0, 1.0]), ("r-low", [4.0] * 3), ("r-high", [2.0] * 3)):
        write_cell(tmp_path, key, losses)
    (own_rates,) = compare([row("l"), row("d", rate=0.0002)], tmp_path)
    assert (own_rates.method, own_rates.against, own_rates.rates) == ("dora", "lora", "own")
    rates_and_loss = (own_rates.learning_rate, own_rates.against_rate, own_rates.loss)
    assert rates_and_loss == (0.0002, 0.001, pytest.approx(2 / 60))
    several = [row("l"), row("r-low", best_rate=None), row("r-high", rate=0.003, best_rate="edge")]
    compared = compare(several, tmp_path)
    assert [row.rates for row in compared] == ["same", "best"]
    assert select(compared, "rora", "lora", "best").loss == pytest.approx(3 / 60)


def test_different_models_and_alphas_are_not_compared(tmp_path):
    """With two models and LoRA at two alphas of one rank, each difference is within one model and one alpha."""
    rows = []
    for model, level in (("m", 0.0), ("n", 100.0)):
        for place, (method, alpha) in enumerate((("base", None), ("lora", 64.0), ("lora", 32.0), ("rora", 64.0))):
            key = f"{method}-{model}{place}"
            write_cell(tmp_path, key, [level - place**2, 1.0, 1.0])
            rows.append(row(key, model=model, alpha=alpha))
    compared = compare(rows, tmp_path)
    expected = [("lora", "base", 64.0, -1), ("lora", "base", 32.0, -4), ("rora", "base", 64.0, -9)]
    expected.append(("rora", "lora", 64.0, -8))
    for model in ("m", "n"):
        of_model = [(row.method, row.against, row.alpha, row.loss * 60) for row in compared if row.model == model]
        assert of_model == [(*names, pytest.approx(loss)) for *names, loss in expected]


def test_a_difference_of_accuracies_needs_both_scored_and_may_be_zero(tmp_path):
    """An unscored base gives no difference, and no answers are read; a difference of 0 has an error."""
    for key, correct in (("base", None), ("l", {"s": [1, 0]}), ("r", {"s": [0, 1]})):
        write_cell(tmp_path, key, correct=correct)
    compared = compare([row("base"), row("l", average=0.5), row("r", average=0.5)], tmp_path)
    unscored = select(compared, "rora", "base")
    assert (unscored.average, unscored.average_error, unscored.average_seeds) == (None, None, 0)
    assert not hasattr(unscored, "s")
    scored = select(compared, "rora", "lora")
    assert (scored.average, scored.average_error, scored.average_seeds) == (0.0, pytest.approx(1.0), 1)


def test_a_method_without_a_rank_is_compared_with_lora_at_every_rank(tmp_path):
    keys = {"l-8": 8, "l-16": 16, "s": None, "r-16": 16}
    for key in keys:
        write_cell(tmp_path, key)
    rows = [row(key, rank=rank) for key, rank in keys.items()]
    assert [(d.method, d.rank) for d in compare(rows, tmp_path)] == [("series", 8), ("series", 16), ("rora", 16)]
    rows[-1] |= {"status": "diverged"}
    assert [d.method for d in compare(rows, tmp_path)] == ["series", "series"]


@pytest.mark.parametrize(
    ("name", "changed_cells", "old", "new", "message"),
    [
        ("losses.csv", ["r0"], "a,0", "d,0", "different records"),
        ("losses.csv", ["r0"], "a,0", "a,7", "different records"),
        ("losses.csv", ["r0"], "a,0,10,", "a,0,11,", "different records"),
        ("losses.csv", ["r0"], "1.0,2,", "1.0,3,", "different records"),
        ("answers.csv", ["r0"], "s,1,", "t,1,", "different items"),
        ("answers.csv", ["r0"], "s,1,", "s,6,", "different items"),
        # Both cells of one seed, which agree with each other.
        ("answers.csv", ["l1", "r1"], "s,0,", "s,5,", "different items"),
        ("losses.csv", ["l1", "r1"], ",10,1.0", ",11,1.0", "cells r1 and r0 were measured on different records"),
    ],
)
def test_other_records_or_items_are_refused(tmp_path, name, changed_cells, old, new, message):
    keys = ("l0", "r0", "l1", "r1")
    for key in keys:
        write_cell(tmp_path, key, correct={"s": [1, 0], "t": [1]})
    rows = [row(key, average=0.5) for key in keys]
    assert compare(rows, tmp_path)
    for key in changed_cells:
        file = tmp_path / key / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        compare(rows, tmp_path)


def test_the_table_has_a_line_for_each_difference(tmp_path):
    for key, loss, correct in (("l", 1.0, None), ("r", 2.0, None), ("b", 2.0, [1, 0]), ("l-scored", 1.0, [1, 1])):
        write_cell(tmp_path, key, [loss, 1.0, 1.0], correct and {"piqa": correct})
    table = frames.from_rows(difference_rows([row("l"), row("r")], tmp_path), COLUMNS)
    (line,) = table.itertuples()
    assert frames.to_csv(table).splitlines()[1] == (
        f"m,rora,lora,same,8,64.0,0.001,0.001,1,{1 / 60},{line.loss_error},,,0.125,{line.answer_error},,,,0" + 16 * ","
    )
    rows = [row("b", average=0.5), row("l-scored", average=1.0)]
    (line,) = frames.rows(frames.from_rows(difference_rows(rows, tmp_path), COLUMNS))
    assert (line["piqa"], line["piqa_error"], line["average"], line["boolq"]) == (0.5, 0.5, 0.5, None)
