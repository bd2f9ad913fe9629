"""Printed help and tables fit 80 columns, here for the published results; figures are never cut."""

import dataclasses
import importlib
import io
import json
import math
import pkgutil
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tyro
from rich.console import Console
from support.commands import options_class

import figures
import sims
from rora_theory.lab.evaluate.accuracies import TaskAccuracy
from rora_theory.lab.evaluate.scoring import Scoring
from rora_theory.lab.sweep.analysis import TABLES
from rora_theory.lab.sweep.controlled_grid import ControlledGrid
from rora_theory.measure.rank_check.rules import CheckConfig
from rora_theory.measure.regimes.module_regime import Regime, RegimeConfig, RegimeRows
from rora_theory.paper.verdicts import Verdict
from rora_theory.runs import frames
from rora_theory.runs.reading import as_json
from rora_theory.scaling import KAPPAS
from sims import (
    coordinate_check,
    evaluate,
    lr_transfer,
    regime,
    training_dynamics,
    transfer,
)
from sims import variance_sweep as sweep
from sims.common import answers, progress, tables
from sims.sweep import print_analysis

COMMANDS = [
    module
    for package in (sims, figures)
    for module_info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if f"{module_info.name.rpartition('.')[2].title().replace('_', '')}Options"
    in vars(module := importlib.import_module(module_info.name))
]

OF_NO_COMMAND = ("A title of many words " * 8, "t", "OF_WORDS")
"""Titles of tables that are printed here alone."""

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


@pytest.fixture
def printed(capsys, monkeypatch):
    """Return the lines printed since the last call, on a terminal of 80 columns.

    In a command's report the answer comes first, and the tables are those of the JSON.
    """
    monkeypatch.setenv("COLUMNS", "80")
    sentences: list[Any] = []
    print_answer = answers.print_answer

    def noted(sentence: str, warnings: Any = (), /, **more: Any) -> None:
        assert re.fullmatch(r"[A-Za-z0-9].*[.)]", sentence), "a sentence"
        sentences.append(sentence)
        print_answer(sentence, warnings, **more)

    class Printed(list[Any]):
        def append(self, table_and_rows: Any) -> None:
            table, rows = table_and_rows
            assert sentences or table.title in OF_NO_COMMAND, "the answer comes before the tables"
            json.dumps(as_json(rows), allow_nan=False, default=lambda value: value.item())

    monkeypatch.setattr(answers, "print_answer", noted)
    monkeypatch.setattr(tables, "printed", Printed())

    def read() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        assert lines
        long_lines = [line for line in lines if len(line.rstrip()) > 80]
        assert [line for line in long_lines if not re.search(r"\S {2,}\S|──", line)] == [], "but for tables"
        return lines

    return read


def published(run: str, *names: str) -> list[pd.DataFrame]:
    """Read tables of a published run."""
    return [frames.read_csv(PUBLISHED / run / f"{name}.csv") for name in names]


def saved(run: str, name: str) -> Any:
    """Read a JSON file of a published run."""
    return json.loads((PUBLISHED / run / f"{name}.json").read_text())


def config_of(kind: type, name: str):
    """Return the published run's configuration, as far as it determines the table."""
    used = saved(name, "manifest")["config"]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in used.items() if key in fields}
    if "rules" in chosen and "rora" in str(fields["rules"].type):  # exponents are numbers there
        chosen["rules"] = tuple(rule if rule in KAPPAS else float(rule) for rule in chosen["rules"])
    needed = {name: () for name, field in fields.items() if field.default is field.default_factory}
    return kind(**(needed | chosen))


def test_figures_are_never_cut(capsys, monkeypatch) -> None:
    """The lines of a table that does not fit are longer than the terminal's."""
    monkeypatch.setenv("COLUMNS", "80")
    figures = [f"{n}.{'1' * 9}" for n in range(9)]
    tables.print_table("OF_WORDS", ["rule", *map(str, range(9))], [["lora", *figures]])
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("lora")]
    assert row == ["lora", *figures]


LONG = "full is better by 1.77% ± 1.57%: more than a shift of the rate; a best rate at the grid's edge, so not settled"


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("last", ["verdict", "0.5"])
def test_long_words_between_numbers_fold(printed, left, last) -> None:
    """A long word folds within its cell in any column; a short figure beside it does not."""
    columns = ["steps", "rank", "ratio", "verdict", "more"]
    texts = [LONG, LONG.replace("full", "lora").replace("shift", "move")]
    rows = [[step, 8, "9.993 ± 0.1", text, last] for step, text in zip((16, 64), texts, strict=True)]
    tables.print_table("OF_WORDS", columns, rows, left=left)
    lines = printed()
    words = [word for line in lines for word in line.split()]
    assert all(words.count(word) >= text.split().count(word) for text in texts for word in text.split())
    assert sum("9.993 ± 0.1" in line for line in lines) == 2
    assert "…" not in "".join(words)


def test_verdicts_on_comparisons_are_printed_completely(printed) -> None:
    best, comparisons, exponents = published("horizon", "best", "comparisons", "exponents")
    empty = dict.fromkeys(TABLES, pd.DataFrame())
    answers.print_answer("The answer.")
    print_analysis(empty | {"best": best, "comparisons": comparisons, "exponents": exponents})
    lines = printed()
    title = lines.index("Comparisons, each at its own best rate")
    lines = lines[title : next(i for i, line in enumerate(lines) if line.startswith("Exponents of the best rate"))]
    starts = [i for i, line in enumerate(lines) if re.match(r" *\d+ ", line)]
    rows = [" ".join(lines[a:b]).split() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert len(rows) == len(comparisons)
    assert all(set(verdict.split()) <= set(words) for verdict, words in zip(comparisons["verdict"], rows, strict=True))


def test_a_wider_terminal_is_used(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tables.print_table("t", ["rule", *map(str, range(9))], [["lora", *["1.234567890"] * 9]])
    assert capsys.readouterr().out.count("lora") == 1


def test_sentences_fold_between_words_and_paths_stay_whole(printed, capsys) -> None:
    tables.print_text("word " * 40 + "end")
    assert all(set(line.split()) <= {"word", "end"} for line in printed())
    path = "/" + "x" * 100
    tables.print_text(f"written to {path}")
    assert path in capsys.readouterr().out.splitlines()


def test_variance_sweep(printed) -> None:
    judged = [Verdict(**verdict) for verdict in saved("variance_sweep", "verdicts")]
    sweep.report(*published("variance_sweep", "results", "direct_check"), judged)
    lines = printed()
    assert len(lines) < 250, "the second moments are in the folder's file"
    text = " ".join(" ".join(lines).split())
    assert "4093" in text
    assert all(word in text for verdict in judged for word in verdict.claim.split())


def regime_of(name: str) -> Regime:
    """Read a published run's tables; earlier runs have fewer."""
    empty = Regime.from_rows([RegimeRows([], [], [], [])], math.nan, math.nan)
    names = {
        "crossings": "crossing_ranks",
        "results": "results",
        "crossing_distances": "crossing_distances",
        "tokens": "tokens",
    }
    written = {field: file for field, file in names.items() if (PUBLISHED / name / f"{file}.csv").exists()}
    return dataclasses.replace(empty, **dict(zip(written, published(name, *written.values()), strict=True)))


def test_regime(printed) -> None:
    (ratios,) = published("regime", "judge")
    regime.report(config_of(RegimeConfig, "regime"), regime_of("regime"), saved("regime", "verdict"), ratios)
    text = "\n".join(printed())
    assert "verdict: holds." in text
    row = ratios.query("optimizer == 'adam' and init == 'gaussian' and split == 'heldout' and rank == 64").iloc[0]
    assert row["modules"] == 150
    assert f"{row['mean_ratio']:.4f} ({row['standard_error']:.4f})" in text, "of all modules, not only published rows"


@pytest.mark.slow
def test_regime_at_new_tokens(printed) -> None:
    """The report has the number of skipped held-out tokens, and when A dominates, as in the run's summary."""
    measured = regime_of("regime_held_out")
    regime.report(config_of(RegimeConfig, "regime_held_out"), measured, None, pd.DataFrame())
    text = "\n".join(printed())
    (row,) = measured.tokens.query("module == 'model.layers.29.mlp.down_proj' and split == 'heldout'").to_dict(
        "records"
    )
    words = " ".join(text.split())
    assert f"Left out of {row['all']} held-out tokens: {row['seen']} that repeat" in words
    assert "t_A until A dominates, at the constant rate 0.0003" in words
    (summary,) = published("regime_held_out", "crossing_distance_summary")
    first = summary.iloc[0]
    figures = [first[f"crossing_distance{end}"] / 3e-4 for end in ("", "_low", "_high")]
    assert "{:.1f} ({:.1f}-{:.1f})".format(*figures) in text


@pytest.mark.slow
def test_coordinate_check(printed) -> None:
    (slopes,) = published("coordinate_check", "slopes")
    sizes = slopes.query("quantity == 'hidden' and step == 1").assign(quantity="loss", value=3.5)
    coordinate_check.report(config_of(CheckConfig, "coordinate_check"), slopes, sizes, batches="fixed")
    assert "+0.00 ± 0.01" in "\n".join(printed())


def test_training_dynamics(printed) -> None:
    tables = published("training_dynamics", "results", "exponents")
    training_dynamics.report(config_of(ControlledGrid, "training_dynamics"), *tables)
    text = "\n".join(printed())
    assert "-0.56 (0.00)" in text
    assert "after 100 steps" in " ".join(text.split()).lower()


@pytest.mark.parametrize("name", ["lr_transfer", "lr_transfer_smollm2"])
def test_lr_transfer(printed, name) -> None:
    compared = [lr_transfer.Comparison(**comparison) for comparison in saved(name, "comparison")]
    best, slopes = published(name, "best", "slopes")
    best = best.assign(log2_half_width=np.nan)  # written before there was this column
    lr_transfer.report(best, slopes.fillna({"nearest": ""}), compared)
    text = " ".join(printed())
    assert all(word in text for comparison in compared for word in comparison.verdict.split())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"regime": str(PUBLISHED / "regime")},
        {"to_rule": "rslora", "to_alpha": 64.0, "to_rank": 1024, "steps": 64, "to_steps": 256, "schedule": "linear"},
        {"to_alpha": 2048.0, "to_rank": 1024, "schedule": "constant", "to_schedule": "cosine"},
        {"rule": 0.25, "optimizer": "sgd"},
        {"init": "gaussian", "to_rule": "rslora"},
        {"regime": "cross-talk", "rule": "rora"},
    ],
)
def test_transfer(printed, settings) -> None:
    config = transfer.TransferOptions(**settings)
    transfer.report(config, transfer.advise(config))
    assert any(line.startswith("From rank 8 to ") for line in printed())


def test_evaluate(printed) -> None:
    level = TaskAccuracy("hellaswag", 10042, 0.0, 0.05, 0.5, 0.01, 0.0, 0.25, 0.2510)
    evaluate.report([level, dataclasses.replace(level, task="average")], Scoring(protocol="harness"))
    printed()


def options(config: type) -> dict[str, bool]:
    """Return the names of a configuration's options, including nested ones, and whether each is required."""
    names: dict[str, bool] = {}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            names |= options(field.type)
        elif not {tyro.conf.Positional, tyro.conf.Fixed} & {*getattr(field.type, "__metadata__", ())}:
            names[field.name.strip("_").replace("_", "-")] = field.default is field.default_factory  # both missing
    return names


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help(module, capsys, monkeypatch) -> None:
    """It has every option, and does not mention exceptions or folders of this machine."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(module.__name__, run_name="__main__", alter_sys=True)
    assert not caught.value.code
    text = capsys.readouterr().out
    for name, is_required in options(options_class(module)).items():
        default = re.search(rf"(?ms)^\W*--{name}\b.*?\((required|default: |fixed|repeatable|optional)", text)
        assert re.search(rf"--{name}\b", text)
        assert not is_required or default[1] == "required"
    assert "InputError" not in text
    assert str(Path.cwd()) not in text


def test_commands_are_not_folded(capsys) -> None:
    command = "    python -m sims.finetune" + " --data A/train.json" * 6
    tables.print_text(command)
    assert capsys.readouterr().out == command + "\n"


def test_the_bar_keeps_its_times_next_to_long_words(monkeypatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=drawn, force_terminal=True, width=80))
    with progress.progress_bar("coordinate check", 96, fields="{cell}") as bar:
        bar.advance(1, cell="AdamW, alpha/sqrt(r), A kaiming_uniform (control), r = 128, seed 3")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue())
    lines = [line for line in re.split(r"[\r\n]", text) if "coordinate check" in line and "AdamW" in line]
    assert lines
    assert all(len(line) <= 80 and re.search(r" 1/96 +\d:\d\d:\d\d +[-\d]+:[-\d]+:[-\d]+ ", line) for line in lines)
