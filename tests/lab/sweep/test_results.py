"""Results of a sweep: rows and their order, the best of the rates that were run, and files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rora_theory.errors import InputError
from rora_theory.lab.data.records import Record
from rora_theory.lab.evaluate.scoring import Sample
from rora_theory.lab.finetune.held_out import RecordLoss
from rora_theory.lab.sweep import horizon_runs, results
from rora_theory.lab.sweep.cells import SweepCell
from rora_theory.runs import frames
from rora_theory.runs.cells import run_cells
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import FinishedCell, key_of

PUBLISHED = Path(__file__).parents[3] / "results" / "published"


def rate_row(rate: float | None, loss: float, seed: int = 0, status: str = "complete", **more: Any) -> dict[str, Any]:
    row = {"model": "m", "method": "lora", "rank": 8, "alpha": 64.0, "learning_rate": rate, "seed": seed}
    return row | {"status": status, "validation_loss": loss if status == "complete" else None} | more


def best_of(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    best = results.marked_rates(frames.from_rows(rows, results.COLUMNS))
    assert list(best) == ["model", "method", "rank", "alpha", "learning_rate", "best_rate", "grid_error"]
    return list(best.drop(columns="grid_error").itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([rate_row(0.001, 1.0)], (0.001, "only")),
        ([rate_row(0.001, 1.0), rate_row(0.003, 0.9), rate_row(1e-05, 0.8)], (1e-05, "edge")),
        ([rate_row(0.001, 1.0), rate_row(0.003, 0.9), rate_row(0.01, 1.8)], (0.003, "yes")),
        # Only the first seed ran at both rates. There 0.001 is best, although its mean over its seeds is above 1.1.
        ([rate_row(0.001, 1.0), rate_row(0.003, 1.1), rate_row(0.001, 1.4, 1)], (0.001, "edge")),
        # 0.4 ran at another seed only, so 0.3 is the highest rate of the comparison.
        ([*(rate_row(r, 1 - r) for r in (0.1, 0.2, 0.3)), rate_row(0.4, 1.0, 1)], (0.3, "edge")),
        # Seeds 10 and 9 have the most rates. The lower one is used, whose lowest loss is at an end.
        (
            [
                rate_row(0.7, 0.1),
                *(rate_row(rate, loss, 10) for rate, loss in ((0.1, 1.0), (0.2, 0.5), (0.3, 1.0))),
                *(rate_row(rate, loss, 9) for rate, loss in ((0.1, 0.9), (0.2, 2.0), (0.3, 1.0))),
            ],
            (0.1, "edge"),
        ),
        # Of two rows with one rate and seed the last counts.
        ([rate_row(rate, loss) for rate, loss in ((0.1, 1.0), (0.2, 0.5), (0.2, 2.0), (0.3, 1.1))], (0.1, "edge")),
        ([rate_row(0.1, 1.0), rate_row(0.2, 0.5), rate_row(0.2, 0, status="diverged")], (0.1, "edge")),
        ([rate_row(0.001, 1.0), rate_row(0.003, 0, status="dead")], (0.001, "only")),
        ([rate_row(0.003, 0, status="diverged")], None),
    ],
)
def test_the_best_rate_is_compared_at_one_seed(rows, expected) -> None:
    assert [best[4:] for best in best_of(rows)] == ([] if expected is None else [expected])


def test_a_tie_selects_the_lower_rate_within_each_group() -> None:
    rows = [rate_row(rate, 1.0) for rate in (0.01, 0.001, 0.1)]
    rows += [rate_row(0.5, 0.1, rank=16), rate_row(0.6, 0.1, method="rora"), rate_row(0.7, 0.1, model="n")]
    rows += [rate_row(0.8, 0.1, alpha=32.0), rate_row(None, 0.01, method="base")]
    assert best_of(rows) == [
        ("m", "lora", 8, 64.0, 0.001, "edge"),
        ("m", "lora", 16, 64.0, 0.5, "only"),
        ("m", "rora", 8, 64.0, 0.6, "only"),
        ("n", "lora", 8, 64.0, 0.7, "only"),
        ("m", "lora", 8, 32.0, 0.8, "only"),
    ]


@pytest.mark.parametrize("run", ["rank_sweep", "rank_sweep_pruned"])
def test_the_best_rates_of_the_published_runs_are_those_in_their_tables(run) -> None:
    """This includes methods without a rank."""
    rows = frames.read_csv(PUBLISHED / run / "results.csv")
    plain = rows.drop(columns="best_rate")
    again = plain.merge(results.marked_rates(plain), how="left", on=[*results.GROUP, "learning_rate"])
    pd.testing.assert_series_equal(again["best_rate"], rows["best_rate"])
    assert rows["best_rate"].notna().sum() > 10


def cell(
    method: str, rank: int | None = None, rate: float | None = None, seed: int | None = None, **more: object
) -> dict:
    setting = {"model": "m", "method": method, "rank": rank, "alpha": None if rank is None else 64.0}
    setting |= {"gamma": None if rank is None else 8.0, "learning_rate": rate, "seed": seed, "evaluation": None}
    training = None if rate is None else {"rule": "rora", "rank": rank, "rate": rate, "seed": seed, "kind": method}
    return setting | {"training": training} | more


def finished(config: dict, **result: Any) -> FinishedCell:
    return FinishedCell("key", config, {"status": "complete", "validation_loss": 1.5} | result, {})


LEVEL = {"task": "piqa", "accuracy": 0.75, "error": 0.1, "unparsed": 0.25, "chance": 0.5}


def test_one_row_for_each_training_in_order() -> None:
    """Cells with scores replace those without. The order is base, methods, ranks, alphas, rates and seeds."""
    scored = {"evaluation": {"protocol": "label"}}
    unscored = [
        cell("rora", 8, 0.1, 10), cell("rora", 8, 0.1, 9), cell("rora", 8, 0.01, 9), cell("rora", 8, 0.3, 9, alpha=8.0),
        cell("rora", 4, 0.1, 9), cell("lora", 16, 0.1, 9), cell("zeta", 2, 0.1, 9), cell("prefix", None, 0.1, 9),
        cell("base", **scored),
    ]  # fmt: skip
    cells = [finished(config) for config in unscored]
    levels = [LEVEL, LEVEL | {"task": "boolq"}, LEVEL | {"task": "average", "accuracy": 0.6}]
    cells.insert(0, finished(cell("rora", 8, 0.1, 10, **scored), levels=[LEVEL]))
    cells.append(finished(cell("lora", 16, 0.1, 9, **scored), levels=levels))
    cells.append(finished(cell("rora", 4, 0.1, 9, **scored), status="diverged", diverged_at=2))
    table = results.results_table(cells)
    rows = frames.rows(table)
    assert [(row["method"], row["rank"], row["alpha"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("base", None, None, None, None),
        ("prefix", None, None, 0.1, 9),
        ("lora", 16, 64.0, 0.1, 9),
        ("rora", 4, 64.0, 0.1, 9),
        ("rora", 4, 64.0, 0.1, 9),  # a scored cell that diverged replaces none
        ("rora", 8, 8.0, 0.3, 9),
        ("rora", 8, 64.0, 0.01, 9),
        ("rora", 8, 64.0, 0.1, 9),
        ("rora", 8, 64.0, 0.1, 10),
        ("zeta", 2, 64.0, 0.1, 9),
    ]
    assert sorted(row["status"] for row in rows if row["rank"] == 4) == ["complete", "diverged"]
    (twin,) = [row for row in rows if row["seed"] == 10]
    assert (twin["protocol"], twin["piqa"], twin["piqa_error"], twin["piqa_unparsed"]) == ("label", 0.75, 0.1, 0.25)
    assert (twin["average"], twin["average_chance"], twin["boolq"]) == (0.75, 0.5, None)
    assert (rows[2]["average"], rows[2]["boolq"]) == (0.6, 0.75), "the average over tasks that was measured"
    assert [row["rule"] for row in rows] == [None, None, *["rora"] * 8], "only methods with a rank have a rule"
    marks = {(row["alpha"], row["learning_rate"]): row["best_rate"] for row in rows if row["rank"] == 8}
    assert (marks[64.0, 0.01], marks[64.0, 0.1]) == ("edge", None), "a tie"
    assert tuple(table) == results.COLUMNS
    assert frames.to_csv(table).splitlines()[8].startswith("key,complete,m,rora,rora,8,64.0,8.0,0.1,,9,,,,,1.5,")


def test_the_files_of_a_cell_are_read_back(tmp_path) -> None:
    """All digits are kept, and the place of each record; an answer that could not be parsed is wrong."""
    third = 1 / 3
    losses = [RecordLoss(10, third, 2, 0.5), RecordLoss(20, 2.5, 3, third)]
    held_out = [("one/a.json", 3, Record("a", "b")), ("two/b.json", 4, Record("c", "d"))]
    results.write_losses(tmp_path / "l.csv", held_out, losses)
    assert results.read_losses(tmp_path / "l.csv").to_dict("list") == {
        "file": ["one/a.json", "two/b.json"],
        "index": [3, 4],
        "tokens": [10, 20],
        "loss": [third, 2.5],
        "answer_tokens": [2, 3],
        "answer_loss": [0.5, third],
    }
    results.write_answers(
        tmp_path / "a.csv", [Sample("piqa", 0, "x,y", "x,y", True), Sample("piqa", 1, "x", None, False)]
    )
    assert (tmp_path / "a.csv").read_text() == 'task,index,prediction,correct\npiqa,0,"x,y",1\npiqa,1,,0\n'
    assert results.read_answers(tmp_path / "a.csv")["correct"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"file,index,tokens,loss\na,3,10\n", "line 1 is not the header"),
        (b"file,index,tokens,loss,answer_tokens,answer_loss\na,3,10,x,2,0.5\n", "column loss"),
        (b"file,index,tokens,loss,answer_tokens,answer_loss\na,3,,1.5,2,0.5\n", "column tokens"),
    ],
)
def test_a_damaged_file_of_losses_is_named(tmp_path, text, message) -> None:
    path = tmp_path / "losses.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=rf"losses\.csv: .*{message}"):
        results.read_losses(path)


def test_results_are_described() -> None:
    """A rate at an edge is named as such; a method without a rank has no rank; a diverged cell has no lowest loss."""
    best = [{"model": "m", "method": "lora", "rank": 8, "learning_rate": 0.001, "best_rate": "edge"}]
    best += [best[0] | {"method": "series", "rank": None, "best_rate": mark} for mark in ("yes", "only")]
    lines = results.describe_rates(frames.from_rows(best, list(best[0])))
    edge = "; it is at the edge of the rates tried: the best may lie beyond"
    assert lines == [f"m: lora r=8: learning rate 0.001{edge}", *["m: series: learning rate 0.001"] * 2]
    rows = frames.from_rows([rate_row(0.1, 0, status="diverged")], results.COLUMNS)
    assert results.describe_results(rows) == ("Lowest validation loss of 1 cells: none (± over records). 1 diverged.")
    result = {"status": "complete", "validation_loss": 1.5, "validation_error": 0.01, "answer_loss": 0.5}
    result |= {"answer_error": 0.02, "levels": [LEVEL, LEVEL | {"task": "average"}]}
    assert results.describe_result(result) == (
        "loss 1.5000 ± 0.0100, answers 0.5000 ± 0.0200, average 75.0 ± 10.0 % (25.0 % unparsed)"
    )
    assert results.describe_result({"status": "diverged", "diverged_at": 7}) == "diverged at step 7"


def test_only_the_requested_cells_of_a_folder_are_read(tmp_path) -> None:
    """Cells of an earlier grid and unfinished cells are left out; without a selection all are read."""
    base = SweepCell("base", None, None, None, None, None, "m", None, "float32", None, {}, None)
    cells = [replace(base, model=name) for name in ("one", "two", "three")]
    folder = RunFolder.open("sweep", {}, out=tmp_path / "run")
    run_cells(cells[:2], lambda cell, _: {"status": "complete", "validation_loss": len(cell.model)}, folder)
    folder.finish()
    assert results.read_results(folder.path)["model"].tolist() == ["one", "two"]
    assert results.read_results(folder.path, cells[1:])["model"].tolist() == ["two"]
    assert results.read_results(folder.path, []).empty


READINGS = [{"step": 1, "losses": [1.0], "answer_losses": [1.0]}]
HORIZON = {"train_losses": [1.0], "readings": READINGS, "diverged_at": None}


@pytest.mark.parametrize("read", [results.read_results, horizon_runs.read_finished])
@pytest.mark.parametrize(
    "value",
    [
        None, "3", {}, {"levels": [3]}, HORIZON | {"train_losses": 3}, HORIZON | {"train_losses": ["x"]},
        HORIZON | {"readings": [3]}, HORIZON | {"readings": [READINGS[0] | {"losses": None}]},
    ],
)  # fmt: skip
def test_results_of_the_wrong_type_are_refused_by_key(tmp_path: Path, read: Any, value: Any) -> None:
    """The file has a valid digest, as its author could have written."""
    cell = {"rank": 1, "strength": 1.0, "rate": 1.0, "seed": 0}
    run_cells([cell], lambda *_: value, RunFolder.open("sweep", {}, out=tmp_path))
    with pytest.raises(InputError, match=rf"cells\.jsonl: key {key_of(cell)}: is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("key", ["../victim", "/etc", ""])
def test_a_key_that_leads_outside_the_cells_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"results.csv: names {key!r}"):
        results.cell_file(tmp_path / "cells", key, results.LOSSES)
