"""The end of a command: answer, tables and files, and the JSON object of these that --json prints."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import commands

from rora_theory.errors import InputError
from sims.common import answers, cli, tables


@dataclass(frozen=True)
class AnswerOptions:
    """Options of a command."""

    rank: int = 8
    """the rank"""
    out: Path | None = None
    """folder"""


def command(config: AnswerOptions) -> None:
    """Run work that ends as every command does."""
    tables.print_text("beginning")
    if config.rank == 0:
        raise InputError("rank must be at least 1, got 0")
    answers.print_answer("Rank 8 is enough.", ["thin: one seed"], rates=(0.5, math.inf))
    tables.print_table("Losses", ["rule", "loss"], [["lora", np.float32(0.5)], ["rora", math.nan]])
    if config.out is not None:
        answers.print_files(config.out)
    if config.rank == 1:
        sys.exit(1)


def run_answer_command(*words: object) -> commands.Ended:
    return commands.run_command(cli.command(AnswerOptions, command, ""), *words)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "results.csv").write_text("")
    (tmp_path / ".lock").write_text("")
    (tmp_path / "cells").mkdir()
    return tmp_path


def test_a_sentence_then_the_table_then_the_files(folder) -> None:
    lines = [line for line in commands.output(run_answer_command("--out", folder)).splitlines() if line.strip()]
    assert lines[:4] == ["beginning", "Rank 8 is enough.", "thin: one seed", "Losses"]
    assert lines[-1] == f"files in {folder}: cells/, results.csv"


def test_only_json_is_on_standard_output(folder) -> None:
    """Figures are numbers, or text where JSON has no number. Standard error has none of the printed text."""
    before = sys.stdout
    out = commands.output(run_answer_command("--json --out", folder))
    assert json.loads(out, parse_constant=lambda name: pytest.fail(name)) == {
        "answer": "Rank 8 is enough.", "warnings": ["thin: one seed"], "rates": [0.5, "inf"],
        "tables": [{"title": "Losses", "rows": [{"rule": "lora", "loss": 0.5}, {"rule": "rora", "loss": "nan"}]}],
        "files": [f"{folder}/cells/", f"{folder}/results.csv"],
    }  # fmt: skip
    assert sys.stdout is before
    assert "Rank 8 is enough." in commands.output(run_answer_command()), "the next command is unaffected"


def test_files_and_tables_without_an_answer(capsys) -> None:
    """A command of figures prints files alone, and a list of runs is a table."""
    paths = [Path("a.png"), Path("a.svg")]
    answers.print_paths(paths)
    assert capsys.readouterr().out == "a.png\na.svg\n"

    def work() -> None:
        answers.collect_json()
        answers.print_paths(paths)
        tables.print_table("Cells", ["rank"], [[8]])

    cli.run_command(work)
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert (printed["tables"], printed["files"]) == ([{"title": "Cells", "rows": [{"rank": 8}]}], ["a.png", "a.svg"])
    assert err == ""


def test_a_negative_answer_has_status_1_and_bad_input_status_2() -> None:
    """Status 1 comes with an answer. Bad input gives one line of error and no JSON."""
    status, out, _ = run_answer_command("--json --rank 1")
    assert (status, json.loads(out)["answer"]) == (1, "Rank 8 is enough.")
    assert run_answer_command("--json --rank 0") == (2, "", "error: --rank must be at least 1, got 0\n")
