"""What commands print fits 80 columns: help and tables, here of the published results; figures are never cut."""

import csv
import dataclasses
import importlib
import inspect
import io
import itertools
import json
import math
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tyro
from rich.console import Console

import figures
import sims
from rora_theory.evaluate.accuracies import TaskAccuracy
from rora_theory.evaluate.scoring import Scoring
from rora_theory.horizon.judgement import HorizonJudgement
from rora_theory.io import frames
from rora_theory.measure.rank_check.check import CheckConfig
from rora_theory.measure.regimes.module_regime import LayerRegime, Regime, RegimeConfig
from rora_theory.paper.verdicts import Verdict
from rora_theory.runs.reading import as_json
from rora_theory.scaling import KAPPAS
from rora_theory.toy.training_grid import TrainingGrid
from sims import (
    capacity,
    coordinate_check,
    evaluate,
    horizon,
    layer_sweep,
    lr_transfer,
    regime,
    training_dynamics,
    transfer,
)
from sims import variance_sweep as sweep
from sims.common import answers, cli, progress, tables

COMMANDS = [
    module
    for package in (sims, figures)
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if hasattr(module := importlib.import_module(found.name), "Config") and "__main__" in inspect.getsource(module)
]

OF_NO_COMMAND = ("A title of many words " * 8, "t", "OF_WORDS")
"""Titles of tables that are printed here alone."""

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


@pytest.fixture
def printed(capsys, monkeypatch):
    """The lines printed since the last call, at 80 columns; none is wider. Of a command's report the answer comes
    first, and the tables are such that JSON has them."""
    monkeypatch.setenv("COLUMNS", "80")
    said: list[Any] = []
    print_answer = answers.print_answer

    def noted(sentence: str, warnings: Any = (), /, **more: Any) -> None:
        assert re.fullmatch(r"[A-Za-z0-9].*[.)]", sentence), "a sentence"
        said.append(sentence)
        print_answer(sentence, warnings, **more)

    def collect(table: Any) -> None:
        assert said or table["title"] in OF_NO_COMMAND, "the answer comes before the tables"
        json.dumps(as_json(table), allow_nan=False, default=lambda value: value.item())

    monkeypatch.setattr(answers, "print_answer", noted)
    monkeypatch.setattr(tables, "collect", collect)

    def read() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert [line for line in lines if len(line) > 80] == []
        return lines

    return read


def typed(path: Path) -> list[dict]:
    """A published table with its figures as numbers; empty cells are None."""

    def value(name: str, text: str):
        if text == "" or (name in ("rule", "range", "layer", "ranks") and not text.isdecimal()):
            return text or None
        try:
            return text if name == "rule" else int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def known(row: dict) -> dict:
    """A row without its empty cells."""
    return {name: value for name, value in row.items() if value is not None}


def config_of(kind: type, name: str):
    """The published run's configuration, as far as it determines the table."""
    used = json.loads((PUBLISHED / name / "manifest.json").read_text())["config"]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in used.items() if key in fields}
    if "rules" in chosen and "rora" in str(fields["rules"].type):  # exponents are numbers there
        chosen["rules"] = tuple(rule if rule in KAPPAS else float(rule) for rule in chosen["rules"])
    needed = {name: () for name, field in fields.items() if field.default is field.default_factory}
    return kind(**(needed | chosen))


def test_columns_that_find_no_room_follow_in_a_further_table(printed) -> None:
    figures = [f"{n}.{'1' * 9}" for n in range(9)]
    tables.print_table("A title of many words " * 8, ["rule", *map(str, range(9))], [["lora", *figures]])
    lines = printed()
    text = "\n".join(lines)
    assert all(figure in text for figure in figures), "no figure is cut"
    assert sum(line.strip().startswith("lora") for line in lines) > 1, "each table has the row's words"
    assert "…" not in text


LONG = "full is better by 1.77% ± 1.57%: more than a shift of the rate; a best rate at the grid's edge, so not settled"


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("last", ["verdict", "0.5"])
def test_long_words_among_the_figures_fold(printed, left, last) -> None:
    """Whole words, each row's in one piece, wherever the column stands; a short figure beside them is not folded."""
    columns = ["steps", "rank", "ratio", "verdict", "more"]
    texts = [LONG, LONG.replace("full", "lora").replace("shift", "move")]
    rows = [[step, 8, "9.993 ± 0.1", text, last] for step, text in zip((16, 64), texts, strict=True)]
    tables.print_table("OF_WORDS", columns, rows, left=left)
    lines = printed()
    words = [word for line in lines for word in line.split()]
    assert all(words.count(word) >= text.split().count(word) for text in texts for word in text.split())
    assert sum("9.993 ± 0.1" in line for line in lines) == 2
    assert "…" not in "".join(words)


@pytest.mark.parametrize("keys", [2, 4])
def test_a_further_table_has_the_keys_again(printed, keys) -> None:
    """Of words and of figures: no row of a part has to be counted to be known."""
    columns = ["rule", "method", "rank", "alpha", *(f"figure {i}" for i in range(9))]
    rows = [["lora", "dora", rank, 16, *(f"{rank}.{i} ± 0.001" for i in range(9))] for rank in (8, 128)]
    tables.print_table("OF_WORDS", columns, rows, left=2, keys=keys)
    lines = [line.split() for line in printed() if line.strip().startswith("lora")]
    parts = len(lines) // 2
    assert parts > 1
    for row in (8, 128):
        own = [line for line in lines if any(word.startswith(f"{row}.") for word in line)]
        assert len(own) == parts
        whole = [line[:4] == ["lora", "dora", str(row), "16"] for line in own]
        assert all(whole) if keys == 4 else whole == [True] + [False] * (parts - 1)


def test_a_verdict_beside_another_run_is_whole(printed) -> None:
    beside = frames.read_csv(PUBLISHED / "horizon" / "beside.csv")
    best, found = (frames.read_csv(PUBLISHED / "horizon" / name) for name in ("best.csv", "exponents.csv"))
    none = pd.DataFrame()
    horizon.report(9, HorizonJudgement(best, beside, none, found, *[pd.DataFrame()] * 7))
    lines = printed()
    title = lines.index("Comparisons, each at its own best rate")
    lines = lines[title : lines.index("Exponents of the best rate")]
    starts = [i for i, line in enumerate(lines) if re.match(r" *\d+ ", line)]
    said = [" ".join(" ".join(lines[a:b]).split()) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert len(said) == len(beside)
    assert all(row.split()[-1] in text for row, text in zip(beside["verdict"], said, strict=True))
    assert all(word in text for row, text in zip(beside["verdict"], said, strict=True) for word in row.split())


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
    folder = PUBLISHED / "variance_sweep"
    judged = [Verdict(**verdict) for verdict in json.loads((folder / "verdicts.json").read_text())]
    results, check = (frames.read_csv(folder / name) for name in ("results.csv", "direct_check.csv"))
    sweep.report(results, check, judged)
    lines = printed()
    assert len(lines) < 250, "the second moments are in the folder's file"
    text = " ".join(" ".join(lines).split())
    assert "4093" in text
    assert all(word in text for verdict in judged for word in verdict.claim.split())


def test_real_layers(printed) -> None:
    folder = PUBLISHED / "real_layers"
    layer_sweep.report(*(frames.read_csv(folder / name) for name in ("results.csv", "crossing_ranks.csv")))
    text = "\n".join(printed())
    assert "-1.208 ± 0.003" in text
    assert "21.8 (12.4-95.9)" in text


def regime_of(name: str) -> Regime:
    """A published run's tables; earlier runs have fewer."""
    found = Regime.from_layers([LayerRegime([], [], [], [])], math.nan, math.nan)
    names = {"crossings": "crossing_ranks", "results": "results", "takeover": "takeover", "tokens": "tokens"}
    paths = {field: PUBLISHED / name / f"{file}.csv" for field, file in names.items()}
    return dataclasses.replace(
        found, **{field: frames.read_csv(path) for field, path in paths.items() if path.exists()}
    )


def test_regime(printed) -> None:
    verdict = json.loads((PUBLISHED / "regime" / "verdict.json").read_text())
    regime.report(config_of(RegimeConfig, "regime"), regime_of("regime"), verdict)
    assert "verdict: holds." in "\n".join(printed())


@pytest.mark.slow
def test_regime_at_new_tokens(printed) -> None:
    """How many held-out tokens were left out, medians beside pooled figures, and when A leads."""
    found = regime_of("regime_held_out")
    regime.report(config_of(RegimeConfig, "regime_held_out"), found, None)
    tokens = found.tokens
    text = "\n".join(printed())
    where = {"module": "model.layers.29.mlp.down_proj", "split": "heldout"}
    own = tokens.loc[(tokens[list(where)] == where).all(axis=1)].iloc[0]
    assert f"{own['seen']}+" in text
    assert f" of {own['all']}" in text
    assert "t_A until A leads, at the constant rate 0.0003" in " ".join(text.split())


@pytest.mark.slow
def test_coordinate_check(printed) -> None:
    config = config_of(CheckConfig, "coordinate_check")
    slopes = frames.read_csv(PUBLISHED / "coordinate_check" / "slopes.csv")
    sizes = slopes.query("quantity == 'hidden' and step == 1").assign(quantity="loss", value=3.5)
    coordinate_check.report(config, slopes, sizes, batches="fixed")
    assert "+0.00 ± 0.01" in "\n".join(printed())


def test_training_dynamics(printed) -> None:
    folder = PUBLISHED / "training_dynamics"
    answers = [tuple(answer.values()) for answer in json.loads((folder / "answers.json").read_text())]
    found = (frames.read_csv(folder / name) for name in ("results.csv", "exponents.csv"))
    training_dynamics.report(config_of(TrainingGrid, "training_dynamics"), *found, answers)
    assert "-0.56 ± 0.00" in "\n".join(printed())


@pytest.mark.parametrize("name", ["lr_transfer", "lr_transfer_smollm2"])
def test_lr_transfer(printed, name) -> None:
    folder = PUBLISHED / name
    compared = [lr_transfer.Comparison(**one) for one in json.loads((folder / "comparison.json").read_text())]
    slopes = frames.read_csv(folder / "slopes.csv").fillna({"nearest": ""})
    best = frames.read_csv(folder / "best.csv").assign(log2_half_width=np.nan)  # written before there was this column
    lr_transfer.report(best, slopes, compared)
    text = " ".join(printed())
    assert all(word in text for one in compared for word in one.verdict.split())


@pytest.mark.parametrize("run", [(), ("--regime", str(PUBLISHED / "regime"))])
def test_transfer(printed, run) -> None:
    config = transfer.Config(regime=run[1]) if run else transfer.Config()
    transfer.report(config, transfer.advise(config))
    printed()


@pytest.mark.slow
def test_capacity_says_one_figure_for_one_thing(printed, monkeypatch) -> None:
    """The largest of the paper's models without rematerialisation: in the table (here with that of the longest name
    alone, for others are traced elsewhere) and on its own."""
    monkeypatch.setattr(capacity, "PAPER_MODELS", ("llama-13b", "sheared-llama-1.3b"))
    capacity.main([])
    assert re.search(r"llama-13b +no .* 51\.9", "\n".join(printed()))
    capacity.main(["--model", "llama-13b"])
    assert "does not fit (51.9 GB of 50.0 GB)" in " ".join(" ".join(printed()).split())


def test_evaluate(printed) -> None:
    level = TaskAccuracy("hellaswag", 10042, 0.0, 0.05, 0.5, 0.01, 0.0, 0.25, 0.2510)
    evaluate.report([level, dataclasses.replace(level, task="average")], Scoring(protocol="harness"))
    printed()


def options(config: type) -> list[str]:
    """Names of a configuration's options, those of its parts included."""
    found = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            found += options(field.type)
        elif not {tyro.conf.Positional, tyro.conf.Fixed} & {*getattr(field.type, "__metadata__", ())}:
            found.append(field.name)
    return found


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help(module, printed) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(module.Config, ["--help"], description=module.__doc__)
    assert not caught.value.code
    lines = printed()
    text = " ".join(lines)
    assert all(word in text for word in module.__doc__.split()), "no word is broken"
    assert all(re.search(rf"--{name.replace('_', '-')}\b", text) for name in options(module.Config))
    assert str(Path.cwd()) not in text


def test_help_fills_its_lines(printed) -> None:
    """A docstring's line breaks do not break the lines of the help."""
    with pytest.raises(SystemExit):
        cli.parse(evaluate.Config, ["--help"], description="")
    rows = [line[2:-2] for line in printed() if line.startswith("│")]
    for row, following in itertools.pairwise(rows):
        if following.startswith(" ") and not row.startswith("-"):
            assert len(f"{row.rstrip()} {following.split()[0]}") > 76, row


def test_help_names_what_regime_refuses(printed) -> None:
    with pytest.raises(SystemExit):
        cli.parse(regime.Config, ["--help"], description="")
    text = " ".join(" ".join(printed()).replace("│", " ").split())
    assert "Not with --targets all-linear" in text


def test_commands_fold_as_a_shell_reads_them(printed) -> None:
    tables.print_text("    python -m sims.finetune " + "--data A/train.json " * 6)
    lines = printed()
    assert len(lines) > 1
    assert [line.endswith(" \\") for line in lines] == [True] * (len(lines) - 1) + [False]


def test_the_bar_foresees_the_end_of_slow_work(monkeypatch) -> None:
    """Results that come eight at once every 40 seconds, in a run that an earlier one had begun."""
    now, shown = [0.0], io.StringIO()
    options = {"file": shown, "force_terminal": True, "width": 80, "get_time": lambda: now[0]}
    monkeypatch.setattr(progress, "Console", lambda **_: Console(**options))

    def left(bursts: int) -> str:
        now[0] = 0.0
        shown.truncate(0)
        with progress.progress_bar("scoring", 1000) as bar:
            bar.advance(600)
            for _ in range(bursts):
                now[0] += 40
                for _ in range(8):
                    bar.advance(1)
                    now[0] += 0.001
        return re.findall(r"\S+/1000\S* +\S+ +(\S+)", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()))[-1]

    assert left(0) == "-:--:--"
    assert left(1) == "0:32:40", "392 are left, 8 each 40 seconds"
    assert left(10) in ("0:26:40", "0:26:41")


def test_the_bar_keeps_its_times_beside_long_words(monkeypatch) -> None:
    """On a terminal of 80 columns; what is drawn is read back without its colours."""
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=shown, force_terminal=True, width=80))
    with progress.progress_bar("coordinate check", 96, fields="{cell}") as bar:
        bar.advance(1, cell="AdamW, alpha/sqrt(r), A kaiming_uniform (control), r = 128, seed 3")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", shown.getvalue())]
    drawn = [line for line in lines if "coordinate check" in line and "AdamW" in line]
    assert drawn
    assert all(len(line) <= 80 and re.search(r" 1/96 +\d:\d\d:\d\d +[-\d]+:[-\d]+:[-\d]+ ", line) for line in drawn)
