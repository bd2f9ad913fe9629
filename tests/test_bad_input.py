"""Every command refuses bad input before it starts, in one line with what is wrong, where, and what is valid.

The table is generated from the dataclass of each command: every option with each invalid value of its type, and a path
that is no file in place of each file that a command reads. Loading a model, opening a run folder and drawing raise an
error here, so a command that starts its work fails the test.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import re
import runpy
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import matplotlib.pyplot as plt
import pytest
from support.commands import options_class

from rora_theory.lab import llama
from rora_theory.lab.llama import hub
from rora_theory.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for room in ("sims", "figures")
    for path in (ROOT / room).glob("*.py")
    if path.stem != "__main__" and "\nif __name__ ==" in path.read_text()
)
NO_CHOICE = "no-such-choice"
SEEDS = ("seed", "data_seed", "seeds")
"""Options that are seeds; ``seeds`` may also be a number of seeds."""
SET_BY_OTHERS = {("sims.sweep", "seed")}
"""Seeds in the configuration of a command that are not options."""
HELP = re.compile("accepted|must|supported|--help|(Add|Choose|Restore|Use|Set|Remove|Pass|Expected) ")
"""Words with which an error message says how to fix the input."""

GIVEN = {
    "sims.finetune": ["--data", "RECORDS"],
    "sims.sweep": ["--data", "RECORDS", "--held-out", "2"],
    "sims.regime": ["--data", "RECORDS"],
    "sims.coordinate_check": ["--data", "RECORDS"],
    "sims.prune": ["--text", "RECORDS"],
    "sims.pretrain": ["--data", "RECORDS"],
    "sims.evaluate": ["--data-dir", "FOLDER"],
    "sims.portable": ["--out", "served"],
}
"""Required named options of each command."""

NAMELESS = ("run", "runs", "adapter")
"""Fields that are positional arguments: run folders and the folder of an adapter."""


class BegunError(Exception):
    """Raised once a command has started its work."""


def begun(*_: Any, **__: Any) -> NoReturn:
    raise BegunError


@functools.cache
def fields_of(command: str) -> tuple[tuple[str, Any], ...]:
    """Return names and types of a command's options, including nested ones."""

    def walk(config: type) -> Iterator[tuple[str, Any]]:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(hints[field.name]):
                yield from walk(hints[field.name])
            else:
                yield field.name, hints[field.name]

    return tuple(walk(options_class(importlib.import_module(command))))


def plain_types(hint: Any) -> set[Any]:
    """Return the plain types in a hint."""
    inner = typing.get_args(hint)
    return set().union(*map(plain_types, inner)) if inner and typing.get_origin(hint) is not typing.Literal else {hint}


BAD = {int: (), float: ("1e400", "nan")}
"""Values that no option of a type accepts; the tests of `cli` cover values that the option parser refuses."""

ZERO = {*SEEDS, "dropout", "show", "rule", "rules", "to_rule", "warmup", "weight_decay", "rows", "overlap", "overlaps"}
ZERO |= {
    ("sims.finetune", "process_id"),
    "noise",
    "cell_gpus",
    "displacement_constant",
    ("sims.finetune", "held_out"),
    ("sims.regime", "layers"),
}
"""Options that accept 0, in every command or in the named one. Of these, -1 is tested; of all others, 0."""

TAKEN = {("clip", "1e400"): "no clipping", ("overlaps", "-1"): "opposite inputs", ("rule", "-1"): "kappa"}
TAKEN |= {("rules", "-1"): "kappa", ("to_rule", "-1"): "kappa"}
"""Values above that these options accept, with their meaning."""


def nameless(command: str) -> set[str]:
    """Return the positional arguments of a command; ``adapter`` is one only in sims.portable."""
    nameless_fields = NAMELESS if command not in ("sims.evaluate", "sims.regime") else ()
    return {name for name, _ in fields_of(command) if name in nameless_fields}


def options(command: str) -> Iterator[tuple[list[str], str]]:
    """Return bad options of a command, with a word that the refusal must contain."""
    yield ["--no-such-option"], "--no-such-option"
    is_choice_tested = False  # one place checks the choices of all options
    for name, hint in fields_of(command):
        option = "--" + name.replace("_", "-")
        kind = next((kind for kind in (str, Path, float, int) if kind in plain_types(hint)), None)
        if name in nameless(command):  # positional arguments
            yield [NO_CHOICE], NO_CHOICE
        elif kind in (int, float):
            key = ["q_proj"] if typing.get_origin(hint) is dict else []
            least = "-1" if ZERO & {name, (command, name)} else "0"
            values = [value for value in (*BAD[kind], least) if (name, value) not in TAKEN]
            yield from (([option, *key, value], name) for value in values)
            if name in SEEDS and (name, hint) != ("seeds", int) and (command, name) not in SET_BY_OTHERS:
                several = [str(seed) for seed in range(20)] if name == "seeds" else []
                check = ["--check", "model", "RECORDS"] if command == "sims.transfer" else []  # without, none is read
                yield [option, *several, str(2**32), *check], f"got {2**32}"
        elif kind is None and not is_choice_tested:
            is_choice_tested = True
            yield [option, NO_CHOICE], NO_CHOICE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with records, in which nothing may be written and no work started."""
    records = [{"instruction": f"Say {n}.", "input": "", "output": "It."} for n in range(40)]
    (tmp_path / "RECORDS").write_text(json.dumps(records))
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    for work in ((llama, "load"), (hub, "locate"), (RunFolder, "open"), (plt, "subplots")):
        monkeypatch.setattr(*work, begun)
    monkeypatch.setattr(jax, "devices", begun)
    return tmp_path


def entries(command: str) -> Iterator[Callable[[], object]]:
    """Yield a command's entry point of ``python -m`` and, if there is one, its main afterwards.

    Of a module that is run anew the options' docstrings are read anew, half of the time that a refusal takes.
    """
    first = functools.partial(runpy.run_module, command, run_name="__main__", alter_sys=True)
    yield first
    yield from itertools.repeat(getattr(importlib.import_module(command), "main", first))


def refusal(enter: Callable[[], object], command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line in which a command refuses its arguments, or a description of a wrong refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *words])
        with pytest.raises((SystemExit, BegunError)) as stop:
            enter()
    out, err = capsys.readouterr()
    if isinstance(stop.value, BegunError):
        return "begins to work"
    if stop.value.code == 2 and not out:
        # A box of tyro, or one line.
        if "For full helptext" in err:
            return "error: " + " ".join(line.strip("│ ") for line in err.splitlines())
        if err.startswith("error: ") and err.count("\n") == 1 and HELP.search(err):
            return err
    return f"status {stop.value.code}: {out}{err}"


def called(command: str, words: list[str]) -> list[str]:
    """Return the bad arguments behind the command's required ones, except for the option that they replace."""
    required = GIVEN.get(command, [])
    if words[0] in required:
        at = required.index(words[0])
        required = required[:at] + required[at + 2 :]
    first = ["FOLDER"] if nameless(command) and words != [NO_CHOICE] else []
    return [*first, *required, *words]


def listing(place: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in place.rglob("*"))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_option_is_refused(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, faults, tried = listing(place), [], 0
    for enter, (words, named) in zip(entries(command), options(command), strict=False):  # entries have no end
        line, tried = refusal(enter, command, called(command, words), capsys), tried + 1
        if not line.startswith("error: ") or named.replace("_", "-").lower() not in line.replace("_", "-").lower():
            faults.append(f"{words}: {line}")
    assert not faults, "\n".join(faults)
    assert listing(place) == before
    assert tried


FILE_OPTIONS = {
    command: ["{}" if word in ("RECORDS", "FOLDER", "FILE") else word for word in words]
    for command, words in GIVEN.items()
}
FILE_OPTIONS |= {"sims.transfer": ["--regime", "{}"]}
FILE_OPTIONS |= {"sims.evidence": ["--add", "{}"]}
FILE_OPTIONS |= {"sims.portable": ["{}", "--out", "served"]}
FILE_OPTIONS |= {command: ["{}"] for command in COMMANDS if command.startswith("figures.")}
"""Where a command takes a file's or folder's name."""


def names(place: Path) -> Iterator[str]:
    """Yield names of no file, and of files that no command can read."""
    yield "none.json"
    for name, content in (("latin.json", b'["caf\xe9"]'), ("latin.txt", b"caf\xe9"), ("empty.npz", b"")):
        (place / name).write_bytes(content)
        yield name


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted(FILE_OPTIONS))
def test_paths_that_are_no_files_are_refused(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = list(names(place))
    before, faults = listing(place), []
    if command.startswith("figures.") and "FOLDER" not in called(command, ["--out"]):
        pytest.skip("reads no file")
    for enter, name in zip(entries(command), bad, strict=False):
        words = [word.format(name) for word in FILE_OPTIONS[command]]
        line = refusal(enter, command, words, capsys)
        if not line.startswith("error: ") or name.lstrip(".")[:20] not in line:
            faults.append(f"{words}: {line}")
    assert not faults, "\n".join(faults)
    assert listing(place) == before


def test_every_command_is_tested() -> None:
    assert len(COMMANDS) >= 23
    experiments = {path.stem for path in (ROOT / "sims").glob("*.py")} - {"__init__", "__main__"}
    assert {f"sims.{name}" for name in experiments} <= set(COMMANDS), "a file of sims that no one can run"
    with_paths = {
        command
        for command in COMMANDS
        if any(Path in plain_types(hint) for name, hint in fields_of(command) if name != "out")
    }
    assert with_paths <= set(FILE_OPTIONS) <= set(COMMANDS)
