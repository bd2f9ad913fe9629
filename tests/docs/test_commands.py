"""Every command on a page is parsed by its program of today, without being run."""

import importlib
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.commands import options_class

from rora_theory.errors import InputError
from sims.common import cli

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.parent.name != "predictions"  # they keep the commands of their day
]
PLACEHOLDERS = {"$(cat rates_$G.txt)": "1e-3", "$G": "64"}
"""What a shell puts into a command, and a value of its kind."""
OTHERS = ("rora figures NAME", "rora my-experiment", "rora figures my_experiment", "rora layer_sweep")
"""Commands in sentences that stand for others, or that a page says the package no longer has."""


def blocks_of(page: Path) -> list[str]:
    """Return the lines in a page's blocks of shell commands that call the package or a script of `benchmarks`."""
    blocks = "\n".join(re.findall(r"^```(?:bash|)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    lines = [line.strip() for line in blocks.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"rora [a-z]|python benchmarks/", line)]


def mentions_of(page: Path) -> list[str]:
    """Return the commands within a page's sentences, which may leave out required options."""
    sentences = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(command.split()) for command in re.findall(r"`(rora [a-z][^`]*)`", sentences)]


def options_and_words(command: str) -> tuple[Any, list[str]]:
    """Return the options of the program that a command names, and the words behind the name."""
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    name, *words = shlex.split(command, comments=True)[1:]
    package = "sims"
    if name == "figures" and words:
        package = "figures"
        name, *words = words
    return options_class(importlib.import_module(f"{package}.{name}")), words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_blocks_of_commands_are_parsed(page, monkeypatch, capsys) -> None:
    """A folder of the reader's own, such as RUN, may be missing."""
    monkeypatch.chdir(ROOT)
    for command in blocks_of(page):
        if command.startswith("python"):
            path, *words = shlex.split(command, comments=True)[1:]
            source = (ROOT / path).read_text()
            for option in (word[2:] for word in words if word.startswith("--")):
                assert re.search(rf"\b{option.replace('-', '[-_]')}\b", source), command
            continue
        options, words = options_and_words(command)
        try:
            cli.parse(options, words, description="")
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")
        except InputError as error:
            if not re.search(r"got (RUN|ADAPTER)\b", str(error)):
                raise


@pytest.mark.parametrize("page", [page for page in PAGES if mentions_of(page)], ids=lambda page: page.stem)
def test_commands_in_sentences_exist_with_their_options(page, capsys) -> None:
    for command in mentions_of(page):
        if command == "rora figures" or command.startswith(OTHERS):
            continue
        options, words = options_and_words(command)
        with pytest.raises(SystemExit):
            cli.parse(options, ["--help"], description="")
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert {word for word in words if word.startswith("--")} <= known, command


def test_the_skeleton_of_an_experiment_runs_and_refuses_bad_options(tmp_path: Path, monkeypatch) -> None:
    page = (ROOT / "docs" / "extend" / "add-an-experiment.md").read_text()
    (code,) = re.findall(r"^    ```python\n(.*?)^    ```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_experiment.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    experiment = importlib.import_module("my_experiment")
    for words in (["--ranks", "0"], ["--seed", "-1"], ["--seed", "4294967296"]):
        with pytest.raises(SystemExit) as stopped:
            experiment.main([*words, "--out", str(tmp_path / "run")])
        assert stopped.value.code == 2
    assert not (tmp_path / "run").exists()
    experiment.main(["--ranks", "4", "16", "--out", str(tmp_path / "run")])
    assert list(pd.read_csv(tmp_path / "run" / "results.csv")["rank"]) == [4, 16]
