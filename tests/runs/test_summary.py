"""summary.json and tables.md of a run folder."""

import json
import math

import numpy as np
import pandas as pd

from rora_theory.runs import RunFolder
from rora_theory.runs.summary import KeyFigure, SummaryTable, key_figures, write_summary
from sims.common import answers, tables
from sims.common.summaries import summarised

SLOPES = pd.DataFrame(
    {
        "rule": ["lora", "rora", None],
        "slope": [0.97, 0.46, math.nan],
        "standard_error": [0.02, math.nan, math.nan],
        "error_over": ["seeds", "seeds", "records"],
        "low": [0.9, 0.4, math.nan],
        "high": [1.1, 0.5, math.nan],
    }
)


def opened(path) -> RunFolder:
    return RunFolder.open("sweep", {"rank": 4}, out=path)


def read(path) -> dict:
    return json.loads((path / "summary.json").read_text())


def test_each_row_becomes_a_figure_with_its_error_and_scope():
    lora, rora, none = key_figures(SLOPES, "slope", "slope", scope=["rule"])
    assert lora == KeyFigure("slope", 0.97, 0.02, "seeds", scope={"rule": "lora"})
    assert rora == KeyFigure("slope", 0.46, scope={"rule": "rora"}), "without an error there are no samples behind it"
    assert none == KeyFigure("slope", None)


def test_ranges_over_samples_have_both_bounds():
    """A column with the number of samples does not replace their kind."""
    counted = SLOPES.drop(columns="error_over").assign(layers=30)
    (lora, *_) = key_figures(counted, "slope", "slope", None, over="layers", bounds=("low", "high"))
    assert lora == KeyFigure("slope", 0.97, None, "layers", 0.9, 1.1)


def test_files_hold_the_figures_and_the_tables(tmp_path):
    run = opened(tmp_path)
    write_summary(
        run,
        answer="The rate shrinks.",
        warnings=["one seed"],
        figures=[KeyFigure("slope", np.float64(0.5), 0.25, "seeds", scope={"rank": np.int64(8)})],
        tables=[SummaryTable("Slopes.", ["rule", "|dM|"], [["lora", "1 | 2\n3"]]), SummaryTable("None.", ["a"], [])],
    )
    run.finish()
    summary = read(tmp_path)
    assert (summary["experiment"], summary["answer"], summary["warnings"]) == (
        "sweep", "The rate shrinks.", ["one seed"],
    )  # fmt: skip
    (figure,) = summary["figures"]
    assert (figure["value"], figure["standard_error"], figure["over"], figure["scope"]) == (
        0.5, 0.25, "seeds", {"rank": 8},
    )  # fmt: skip
    assert (tmp_path / "tables.md").read_text() == (
        "Slopes.\n\n| rule | \\|dM\\| |\n| --- | --: |\n| lora | 1 \\| 2<br>3 |\n\nNone.\n\n| a |\n| --- |\n"
    )


def test_every_number_is_valid_json(tmp_path):
    """JSON has no NaN: non-finite numbers of any precision are text."""
    values = [np.float32("nan"), np.float32("inf"), np.float64("nan"), math.nan, np.float32(0.5), np.bool_(True)]
    run = opened(tmp_path)
    write_summary(run, figures=[KeyFigure("loss", None, scope={"rate": value}) for value in values])
    run.finish()

    def refuse(constant):
        raise AssertionError(constant)

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert [figure["scope"]["rate"] for figure in summary["figures"]] == ["nan", "inf", "nan", "nan", 0.5, True]


def test_a_summary_contains_the_printed_report(tmp_path, capsys):
    run = opened(tmp_path)
    with summarised(run, [KeyFigure("share", 0.5)]):
        answers.print_answer("Half is kept.", ["a short text"])
        tables.print_table("What was kept", ["", "before"], [["layers", 30]])
    tables.print_table("Not in the summary", ["rule"], [["lora"]])
    run.finish()
    assert "What was kept" in capsys.readouterr().out
    summary = read(tmp_path)
    assert (summary["answer"], summary["warnings"]) == ("Half is kept.", ["a short text"])
    assert (tmp_path / "tables.md").read_text() == "What was kept\n\n|  | before |\n| --- | --: |\n| layers | 30 |\n"
