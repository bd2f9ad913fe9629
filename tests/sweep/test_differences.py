"""`differences.csv`: one method less another, record by record and item by item, against arithmetic by hand."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.io import frames
from rora_theory.stats.rate_optimum import grid_gap
from rora_theory.sweep import differences, results
from rora_theory.sweep.differences import Difference, difference_table

TOKENS, ANSWER_TOKENS = [10, 20, 30], [1, 2, 1]


def row(
    key: str, method: str, seed: int | None = 0, rank: int | None = 8, rate: float | None = 0.001, **more: Any
) -> dict[str, Any]:
    alpha = 64.0 if rank else None
    found = {"key": key, "status": "complete", "model": "m", "method": method, "rank": rank, "alpha": alpha}
    found |= {"learning_rate": rate, "seed": seed, "best_rate": "only", "average": None}
    return found | more


def method_differences(rows: Iterable[dict[str, Any]], cells: Path) -> list[Difference]:
    return list(differences.method_differences(frames.from_rows(rows, results.COLUMNS), cells))


def cell(folder: Path, key: str, losses: list[float], right: dict[str, list[int]] | None = None) -> None:
    (folder / key).mkdir(parents=True)
    lines = zip("abc", losses, TOKENS, ANSWER_TOKENS, strict=True)
    text = ["file,index,tokens,loss,answer_tokens,answer_loss"]
    text += [f"{name},{i},{size},{loss!r},{few},{loss / 2!r}" for i, (name, loss, size, few) in enumerate(lines)]
    (folder / key / "losses.csv").write_text("\n".join(text) + "\n")
    if right is not None:
        answers = [f"{task},{i},x,{one}" for task, items in right.items() for i, one in enumerate(items)]
        (folder / key / "answers.csv").write_text("\n".join(["task,index,prediction,correct", *answers]) + "\n")


def find(found: list[Difference], method: str, against: str, rates: str = "same"):
    (one,) = [d for d in found if (d.method, d.against, d.rates) == (method, against, rates)]
    return one


def test_losses_and_accuracies_are_paired(tmp_path):
    cell(tmp_path, "base", [30.0, 50.0, 90.0], {"s": [0, 0, 0, 1], "t": [1, 0]})
    cell(tmp_path, "lora", [10.0, 25.0, 31.0], {"s": [1, 0, 0, 1], "t": [1, 1]})
    cell(tmp_path, "rora", [9.0, 24.0, 28.0], {"s": [1, 1, 0, 0], "t": [0, 1]})
    rows = [
        row("base", "base", None, None, None, average=0.0),
        row("lora", "lora", average=0.7),
        row("rora", "rora", average=0.5),
    ]
    found = method_differences(rows, tmp_path)
    assert [(d.method, d.against) for d in found] == [("lora", "base"), ("rora", "base"), ("rora", "lora")]
    one = find(found, "rora", "lora")
    assert one.loss == pytest.approx(-5 / 60, rel=1e-14)  # -1 - 1 - 3 nats over 60 tokens
    residuals = np.array([-1 + 10 / 12, -1 + 20 / 12, -3 + 30 / 12])
    assert one.loss_error == pytest.approx(math.sqrt((residuals**2).sum() * 3 / 2) / 60, rel=1e-12)
    assert one.answer_loss == pytest.approx(-2.5 / 4, rel=1e-14)
    residuals = np.array([-0.5, -0.5, -1.5]) + 2.5 / 4 * np.array(ANSWER_TOKENS)
    assert one.answer_error == pytest.approx(math.sqrt((residuals**2).sum() * 3 / 2) / 4, rel=1e-12)
    assert one.loss_seed_error is None
    assert one.average == pytest.approx((0 - 0.5) / 2)  # task s: +1 and -1 of 4; task t: -1 of 2
    assert one.average_error == pytest.approx(math.sqrt((2 / 3) / 4 + 0.5 / 2) / 2, rel=1e-12)
    assert (one.seeds, one.average_seeds, one.rank, one.alpha) == (1, 1, 8, 64.0)
    assert {task: gained.value for task, gained in one.tasks.items()} == {"s": 0.0, "t": -0.5}
    assert one.tasks["s"].error == pytest.approx(math.sqrt((2 / 3) / 4), rel=1e-12)  # +1, -1, 0 and 0: of the pairs
    assert one.tasks["t"].error == pytest.approx(math.sqrt(0.5 / 2), rel=1e-12)
    gained = find(found, "lora", "base")
    assert gained.loss == pytest.approx(-104 / 60, rel=1e-14)
    assert gained.average == pytest.approx((0.25 + 0.5) / 2)
    assert gained.against_rate is None


def test_seeds_are_averaged_before_the_error_and_only_common_ones_count(tmp_path):
    for key, losses in (("l0", [10.0, 20.0, 30.0]), ("l1", [12.0, 20.0, 30.0]), ("r0", [9.0, 20.0, 30.0])):
        cell(tmp_path, key, losses)
    cell(tmp_path, "r1", [13.0, 20.0, 30.0])
    cell(tmp_path, "r2", [0.0, 0.0, 0.0])
    rows = [row(key, {"l": "lora", "r": "rora"}[key[0]], int(key[1])) for key in ("l0", "l1", "r0", "r1", "r2")]
    one = find(method_differences(rows, tmp_path), "rora", "lora")
    assert (one.seeds, one.loss, one.loss_error, one.average) == (2, 0.0, 0.0, None)  # -1 and +1 on one record
    assert one.loss_seed_error == pytest.approx(math.sqrt(2) / 60 / math.sqrt(2))  # deviation of -1/60 and 1/60
    assert one.answer_seed_error == pytest.approx(0.5 / 4)


def test_accuracies_are_averaged_over_seeds(tmp_path):
    for key, right in (("l0", [0, 0]), ("l1", [0, 0]), ("r0", [1, 0]), ("r1", [1, 1])):
        cell(tmp_path, key, [1.0] * 3, {"s": right})
    rows = [row(key, {"l": "lora", "r": "rora"}[key[0]], int(key[1]), average=0.5) for key in ("l0", "l1", "r0", "r1")]
    one = find(method_differences(rows, tmp_path), "rora", "lora")
    assert (one.average, one.average_seeds) == (0.75, 2)


def test_each_at_its_best_rate(tmp_path):
    for key, losses in (("l1", [1.0, 1.0, 1.0]), ("l3", [3.0, 3.0, 3.0]), ("r1", [4.0, 4.0, 4.0])):
        cell(tmp_path, key, losses)
    cell(tmp_path, "r3", [2.0, 2.0, 2.0])
    rows = [
        row("l1", "lora", rate=0.001, best_rate="edge"),
        row("l3", "lora", rate=0.003, best_rate=None),
        row("r1", "rora", rate=0.001, best_rate=None),
        row("r3", "rora", rate=0.003, best_rate="edge"),
    ]
    found = method_differences(rows, tmp_path)
    best = find(found, "rora", "lora", "best")
    assert (best.learning_rate, best.against_rate) == (0.003, 0.001)
    assert best.loss == pytest.approx(3 / 60)
    rows[2]["best_rate"], rows[3]["best_rate"] = "yes", None
    assert find(method_differences(rows, tmp_path), "rora", "lora", "best").loss == pytest.approx(9 / 60)
    same = {d.learning_rate: d.loss for d in found if d.rates == "same"}
    assert same == {0.001: pytest.approx(9 / 60), 0.003: pytest.approx(-3 / 60)}


def test_what_the_grids_may_hide_is_said_with_the_best_losses(tmp_path):
    """Rates a decade apart around a loss of 1: the larger bound of the two, none at an edge or beside two runs that
    diverged.
    """
    curves = {"lora": [1.2, 1.0, 1.3], "rora": [1.1, 1.0, 1.1], "dora": [1.2, 1.1, 1.0], "quarter": [None, 1.0, None]}
    rates, rows = (1e-4, 1e-3, 1e-2), []
    for method, losses in curves.items():
        for rate, loss in zip(rates, losses, strict=True):
            key, least = f"{method}{rate:g}", min(one for one in losses if one)
            cell(tmp_path, key, [1.0, 1.0, 1.0])
            status = {} if loss else {"status": "diverged"}
            mark = None if loss != least else "edge" if method == "dora" else "yes"
            rows.append(row(key, method, rate=rate, validation_loss=loss, best_rate=mark, **status))
    found = method_differences(rows, tmp_path)
    best = {method: find(found, method, "lora", "best") for method in ("rora", "dora", "quarter")}
    bounds = [grid_gap(np.array(rates), np.array(curves[method])) for method in ("lora", "rora")]
    assert bounds[0] > bounds[1] > 0
    assert best["rora"].grid_error == pytest.approx(bounds[0], rel=1e-12)
    assert best["dora"].grid_error is best["quarter"].grid_error is None
    assert {one.grid_error for one in found if one.rates == "same"} == {None}


@pytest.mark.parametrize("wide", ["lora", "rora"])
def test_the_larger_bound_counts_whichever_has_it(tmp_path, wide):
    rates, rows = (1e-4, 1e-3, 1e-2), []
    for method in ("lora", "rora"):
        for rate, loss in zip(rates, [1.2, 1.0, 1.3] if method == wide else [1.1, 1.0, 1.1], strict=True):
            cell(tmp_path, f"{method}{rate:g}", [1.0, 1.0, 1.0])
            mark = "yes" if loss == 1 else None
            rows.append(row(f"{method}{rate:g}", method, rate=rate, validation_loss=loss, best_rate=mark))
    one = find(method_differences(rows, tmp_path), "rora", "lora", "best")
    assert one.grid_error == pytest.approx(grid_gap(np.array(rates), np.array([1.2, 1.0, 1.3])), rel=1e-12)


def test_each_at_its_only_rate(tmp_path):
    """As published: DoRA's rate is another than LoRA's."""
    cell(tmp_path, "l", [1.0, 1.0, 1.0])
    cell(tmp_path, "d", [3.0, 1.0, 1.0])
    (one,) = method_differences([row("l", "lora"), row("d", "dora", rate=0.0002)], tmp_path)
    assert (one.method, one.against, one.rates) == ("dora", "lora", "own")
    assert (one.learning_rate, one.against_rate, one.loss) == (0.0002, 0.001, pytest.approx(2 / 60))


def test_the_only_rate_of_one_against_the_best_of_several_is_the_best_of_both(tmp_path):
    """Only where neither was tried at another rate is the difference of each one's own."""
    for key, losses in (("l", [1.0, 1.0, 1.0]), ("r1", [4.0, 4.0, 4.0]), ("r3", [2.0, 2.0, 2.0])):
        cell(tmp_path, key, losses)
    rows = [row("l", "lora"), row("r1", "rora", best_rate=None), row("r3", "rora", rate=0.003, best_rate="edge")]
    found = method_differences(rows, tmp_path)
    assert [one.rates for one in found] == ["same", "best"]
    assert find(found, "rora", "lora", "best").loss == pytest.approx(3 / 60)


def test_models_and_alphas_do_not_meet(tmp_path):
    """Two models, each with a base, and LoRA at two alphas of one rank: a difference is of one model and one alpha."""
    rows = []
    for model, level in (("m", 0.0), ("n", 100.0)):
        for place, (method, alpha) in enumerate((("base", None), ("lora", 64.0), ("lora", 32.0), ("rora", 64.0))):
            key = f"{model}{place}"
            cell(tmp_path, key, [level - place**2, 1.0, 1.0])
            more = {"rank": None, "rate": None, "seed": None} if alpha is None else {"alpha": alpha}
            rows.append(row(key, method, model=model, **more))
    found = method_differences(rows, tmp_path)
    for model in ("m", "n"):
        own = [(one.method, one.against, one.alpha, one.loss * 60) for one in found if one.model == model]
        expected = [("lora", "base", 64.0, -1), ("lora", "base", 32.0, -4)]
        expected += [("rora", "base", 64.0, -9), ("rora", "lora", 64.0, -8)]
        assert own == [(*names, pytest.approx(loss)) for *names, loss in expected]


def test_a_difference_of_accuracies_needs_both_scored_and_may_be_none(tmp_path):
    """Against a base that is not scored there is none, and no answer is read; one of 0 has its error."""
    cell(tmp_path, "base", [1.0, 1.0, 1.0])
    cell(tmp_path, "l", [1.0, 1.0, 1.0], {"s": [1, 0]})
    cell(tmp_path, "r", [1.0, 1.0, 1.0], {"s": [0, 1]})
    rows = [row("base", "base", None, None, None), row("l", "lora", average=0.5), row("r", "rora", average=0.5)]
    found = method_differences(rows, tmp_path)
    against = find(found, "rora", "base")
    assert (against.average, against.average_error, against.average_seeds, against.tasks) == (None, None, 0, {})
    one = find(found, "rora", "lora")
    assert (one.average, one.average_error, one.average_seeds) == (0.0, pytest.approx(1.0), 1)


def test_a_method_without_a_rank_meets_every_lora_and_other_ranks_do_not_meet(tmp_path):
    for key in ("l8", "l16", "p", "r16"):
        cell(tmp_path, key, [1.0, 1.0, 1.0])
    rows = [
        row("l8", "lora"),
        row("l16", "lora", rank=16),
        row("p", "series", rank=None),
        row("r16", "rora", rank=16),
    ]
    found = method_differences(rows, tmp_path)
    assert [(d.method, d.rank) for d in found] == [("series", 8), ("series", 16), ("rora", 16)]
    unfinished = [one | {"status": "diverged"} if one["method"] == "rora" else one for one in rows]
    assert [d.method for d in method_differences(unfinished, tmp_path)] == ["series", "series"]


def test_other_records_or_damaged_files_are_refused(tmp_path):
    cell(tmp_path, "l", [1.0, 1.0, 1.0])
    cell(tmp_path, "r", [1.0, 1.0, 1.0])
    rows = [row("l", "lora"), row("r", "rora")]
    file = tmp_path / "r" / "losses.csv"
    whole = file.read_text()
    others = [("a,0", "d,0"), ("a,0", "a,7"), ("a,0,10,", "a,0,11,"), ("1.0,2,", "1.0,3,")]  # file, index, tokens
    for own, other in others:
        file.write_text(whole.replace(own, other))
        with pytest.raises(InputError, match="different records"):
            method_differences(rows, tmp_path)
    file.write_text("file,index\na,0\n")
    with pytest.raises(InputError, match=r"losses\.csv: line 1 is not the header file,index,tokens,loss"):
        method_differences(rows, tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        method_differences(rows, tmp_path)


def test_other_items_are_refused(tmp_path):
    cell(tmp_path, "l", [1.0, 1.0, 1.0], {"s": [1, 0], "t": [1]})
    cell(tmp_path, "r", [1.0, 1.0, 1.0], {"s": [1], "t": [1, 0]})
    rows = [row("l", "lora", average=0.5), row("r", "rora", average=0.5)]
    with pytest.raises(InputError, match="cells l and r were scored on different items"):
        method_differences(rows, tmp_path)
    answers = tmp_path / "r" / "answers.csv"
    answers.write_text((tmp_path / "l" / "answers.csv").read_text().replace("s,1,", "s,6,"))
    with pytest.raises(InputError, match="different items"):
        method_differences(rows, tmp_path)


def test_seeds_of_other_records_or_items_are_refused(tmp_path):
    """Though the two cells of a seed agree."""
    for key in ("l0", "r0", "l1", "r1"):
        cell(tmp_path, key, [1.0] * 3, {"s": [1, 0]})
    rows = [row(key, {"l": "lora", "r": "rora"}[key[0]], int(key[1]), average=0.5) for key in ("l0", "l1", "r0", "r1")]
    for name, (own, other), said in (
        ("answers.csv", ("s,0,", "s,5,"), "different items"),
        ("losses.csv", (",10,1.0", ",11,1.0"), "cells r1 and r0 were measured on different records"),
    ):
        for key in ("l1", "r1"):
            file = tmp_path / key / name
            file.write_text(file.read_text().replace(own, other))
        with pytest.raises(InputError, match=said):
            method_differences(rows, tmp_path)


def test_the_table_has_a_line_a_difference(tmp_path):
    cell(tmp_path, "l", [1.0, 1.0, 1.0])
    cell(tmp_path, "r", [2.0, 1.0, 1.0])
    found = difference_table(method_differences([row("l", "lora"), row("r", "rora")], tmp_path))
    (one,) = found.itertuples()
    assert frames.to_csv(found).splitlines()[1] == (
        f"m,rora,lora,same,8,64.0,0.001,0.001,1,{1 / 60},{one.loss_error},,,0.125,{one.answer_error},,,,0" + 16 * ","
    )
    cell(tmp_path, "b", [2.0, 1.0, 1.0], {"piqa": [1, 0]})
    cell(tmp_path, "p", [1.0, 1.0, 1.0], {"piqa": [1, 1]})
    rows = [row("b", "base", None, None, None, average=0.5), row("p", "lora", average=1.0)]
    (one,) = frames.rows(difference_table(method_differences(rows, tmp_path)))
    assert (one["piqa"], one["piqa_error"], one["average"]) == (0.5, 0.5, 0.5)
    assert one["boolq"] is None
