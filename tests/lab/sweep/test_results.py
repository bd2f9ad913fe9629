"""Results of a sweep: rows and their order, the best of the rates that were run, and files."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rora_theory.errors import InputError
from rora_theory.lab.evaluate.scoring import Sample
from rora_theory.lab.sweep import results
from rora_theory.lab.sweep.runs import Reading, ReadRun, SweepRun, read_runs
from rora_theory.runs import frames
from rora_theory.runs.cells import run_cells
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import key_of

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


LEVEL = {"task": "piqa", "accuracy": 0.75, "error": 0.1, "unparsed": 0.25, "chance": 0.5}
LABEL = {"protocol": "label"}


def made_run(
    method: str, rank: int | None = None, rate: float = 0.0, seed: int = 0, alpha: float = 64.0, **fields: Any
) -> SweepRun:
    """Return a run of three steps with a loss of 1.5 nats per token."""
    gain = None if rank is None else alpha if method == "lora" else alpha * rank**0.5
    step = 3 if rate else 0
    read = ReadRun([2.0] * step, [Reading(step, [15.0, 15.0], [1.0, 2.0])])
    options = {"read": read, "model": "m", "alpha": None if rank is None else alpha, "key": "key", "read_at": (3,)}
    return SweepRun(rank, gain, rate, seed, **{"method": method} | options | fields)


def test_one_row_for_each_training_in_order() -> None:
    """The order is base, methods, ranks, alphas, rates and seeds."""
    levels = [LEVEL, LEVEL | {"task": "boolq"}, LEVEL | {"task": "average", "accuracy": 0.6}]
    runs = [
        made_run("rora", 8, 0.1, 10, evaluation=LABEL, result={"levels": [LEVEL]}),
        made_run("rora", 8, 0.1, 9), made_run("rora", 8, 0.01, 9), made_run("rora", 8, 0.3, 9, alpha=8.0),
        made_run("rora", 4, 0.1, 9), made_run("lora", 16, 0.1, 9, evaluation=LABEL, result={"levels": levels}),
        made_run("prefix", None, 0.1, 9), made_run("base", evaluation=LABEL),
        made_run("lora", 32, 0.1, 9, read=ReadRun([2.0], [], diverged_at=2)),
    ]  # fmt: skip
    tokens = {"m": ([10, 10], [1, 2])}
    table = results.results_table(runs, tokens)
    rows = frames.rows(table)
    assert [(row["method"], row["rank"], row["alpha"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("base", None, None, None, None),
        ("prefix", None, None, 0.1, 9),
        ("lora", 16, 64.0, 0.1, 9),
        ("lora", 32, 64.0, 0.1, 9),
        ("rora", 4, 64.0, 0.1, 9),
        ("rora", 8, 8.0, 0.3, 9),
        ("rora", 8, 64.0, 0.01, 9),
        ("rora", 8, 64.0, 0.1, 9),
        ("rora", 8, 64.0, 0.1, 10),
    ]
    assert [row["status"] for row in rows if row["rank"] == 32] == ["diverged"]
    (twin,) = [row for row in rows if row["seed"] == 10]
    assert (twin["protocol"], twin["piqa"], twin["piqa_error"], twin["piqa_unparsed"]) == ("label", 0.75, 0.1, 0.25)
    assert (twin["average"], twin["average_chance"], twin["boolq"]) == (0.75, 0.5, None)
    assert (twin["validation_loss"], twin["answer_loss"], twin["train_loss"]) == (1.5, 1.0, 2.0)
    assert (rows[2]["average"], rows[2]["boolq"]) == (0.6, 0.75), "the average over tasks that was measured"
    assert [row["rule"] for row in rows] == [None, None, *["lora"] * 2, *["rora"] * 5], "only methods with a rank"
    marks = {(row["alpha"], row["learning_rate"]): row["best_rate"] for row in rows if row["rank"] == 8}
    assert (marks[64.0, 0.01], marks[64.0, 0.1]) == ("edge", None), "a tie"
    assert tuple(table) == results.COLUMNS


def test_rows_of_several_steps_and_axes() -> None:
    """Rates are compared at the end of the runs, and within one value of an axis; training losses are of ten steps."""

    def readings(loss: float) -> ReadRun:
        return ReadRun(
            [float(step) for step in range(1, 13)], [Reading(step, [loss * 10 / step], [1.0]) for step in (2, 12)]
        )

    runs = [
        made_run("lora", 8, rate, read=readings(loss), read_at=(2, 12), axes=axes, result={"levels": [LEVEL]})
        for axes, losses in (((("batch_size", 4),), (3.0, 1.0, 2.0)), ((("batch_size", 32),), (1.0, 2.0, 3.0)))
        for rate, loss in zip((0.1, 0.2, 0.3), losses, strict=True)
    ]
    rows = frames.rows(results.results_table(runs, {"m": ([10], [1])}))
    assert {(row["step"], row["average"]) for row in rows} == {(2, None), (12, 0.75)}, "scored at the end"
    assert {(row["step"], row["train_loss"]) for row in rows} == {(2, 1.5), (12, 7.5)}
    marked = [(row["batch_size"], row["learning_rate"], row["step"]) for row in rows if row["best_rate"]]
    assert sorted(marked) == [(4, 0.2, 12), (32, 0.1, 12)]
    assert len(results.final_rows(frames.from_rows(rows, list(rows[0])))) == 6


def test_the_answers_of_a_cell_are_read_back(tmp_path) -> None:
    """An answer that could not be parsed is wrong."""
    samples = [Sample("piqa", 0, "x,y", "x,y", True), Sample("piqa", 1, "x", None, False)]
    results.write_answers(tmp_path / "a.csv", samples)
    assert (tmp_path / "a.csv").read_text() == 'task,index,prediction,correct\npiqa,0,"x,y",1\npiqa,1,,0\n'
    assert results.read_answers(tmp_path / "a.csv")["correct"].tolist() == [1, 0]
    (tmp_path / "a.csv").write_text("task,index,prediction,correct\npiqa,0,x,yes\n")
    with pytest.raises(InputError, match=r"a\.csv: .*column correct"):
        results.read_answers(tmp_path / "a.csv")


def test_results_are_described() -> None:
    """A diverged cell has no lowest loss."""
    rows = frames.from_rows([rate_row(0.1, 0, status="diverged")], results.COLUMNS)
    assert results.describe_results(rows) == ("Lowest validation loss of 1 cells: none. 1 diverged.")
    reading = {"step": 2, "losses": [10.0, 20.0], "answer_losses": [1.0, 1.0]}
    result = {"readings": [reading, reading | {"step": 4}], "diverged_at": None, "tokens": 20}
    assert results.describe_result(result | {"levels": [LEVEL, LEVEL | {"task": "average"}]}) == (
        "loss 1.5000 at 2, loss 1.5000 at 4, average 75.0 % (standard error 10.0, 25.0 % unparsed)"
    )
    assert results.describe_result(result | {"readings": [], "diverged_at": 7}) == "diverged at 7"


READINGS = [{"step": 1, "losses": [1.0], "answer_losses": [1.0]}]
HORIZON = {"train_losses": [1.0], "readings": READINGS, "diverged_at": None}


@pytest.mark.parametrize(
    "value",
    [
        None, "3", {}, HORIZON | {"levels": [3]}, HORIZON | {"train_losses": 3}, HORIZON | {"train_losses": ["x"]},
        HORIZON | {"readings": [3]}, HORIZON | {"readings": [READINGS[0] | {"losses": None}]},
    ],
)  # fmt: skip
def test_results_of_the_wrong_type_are_refused_by_key(tmp_path: Path, value: Any) -> None:
    """The file has a valid digest, as its author could have written."""
    cell = {"rank": 1, "gain": 1.0, "rate": 1.0, "seed": 0, "read_at": [1]}
    run_cells([cell], lambda *_: value, RunFolder.open("sweep", {}, out=tmp_path))
    with pytest.raises(InputError, match=rf"cells\.jsonl: key {key_of(cell)}: is damaged"):
        read_runs(tmp_path)


@pytest.mark.parametrize("key", ["../victim", "/etc", ""])
def test_a_key_that_leads_outside_the_cells_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"results.csv: names {key!r}"):
        results.cell_file(tmp_path / "cells", key, results.ANSWERS)
