"""Run commands in the tests' own process; return how they end, the line of a refusal, and their run folders."""

import csv
import inspect
import io
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from rora_theory.lab.finetune import sharding
from rora_theory.runs.reading import CELLS


class Ended(NamedTuple):
    """Exit status, output and errors of a command."""

    status: int
    out: str
    err: str


def options_class(module: ModuleType) -> Any:
    """Return the dataclass of the options of a command or a figure, which is named after its module."""
    name = module.__name__.rpartition(".")[2]
    return getattr(module, f"{name.title().replace('_', '')}Options")


def work_of(module: ModuleType) -> Callable[[Any], object]:
    """Return the function of a command that does its work: the one whose only argument is the options."""
    functions = [value for value in vars(module).values() if inspect.isfunction(value)]
    # Annotations of other functions may name what only type checkers import.
    hints = [
        (function, typing.get_type_hints(function))
        for function in functions
        if function.__module__ == module.__name__ and set(function.__annotations__) == {"config", "return"}
    ]
    (work,) = [function for function, hint in hints if hint == {"config": options_class(module), "return": type(None)}]
    return work


def run_command(main: Callable[[Sequence[str]], object], *words: object) -> Ended:
    """Run a command with the words of its command line; a text may be several words."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Ended(status, out.getvalue(), err.getvalue())


def run_on_one_device(main: Callable[[Sequence[str]], object], *words: object) -> Ended:
    """Run a command of fine-tuning on one of the eight host devices, to the same bits as a process that has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "layout_over_all_devices", lambda *_, **__: (None, None))
        return run_command(main, *words)


def output(ended: Ended) -> str:
    """Return what a command printed that succeeded without a note."""
    assert (ended.status, ended.err) == (0, ""), ended.err
    return ended.out


def refusal(ended: Ended) -> str:
    """Return the message in which a command refused its input, with exit status 2: one line, or a box of tyro."""
    assert ended.status == 2, ended.err
    if "For full helptext" not in ended.err:
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
    return ended.err


def rows(path: Path) -> list[dict[str, str]]:
    """Read a table as it is written: a dictionary of texts for each row."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def selected(table: Iterable[dict[str, str]], **values: Any) -> dict[str, str]:
    """Return the one row that has these values."""
    (row,) = [row for row in table if all(row[name] == str(value) for name, value in values.items())]
    return row


def check_resumption(
    main: Callable[[Sequence[str]], object], words: Sequence[object], finished: Path, out: Path
) -> None:
    """Check that a run whose last cell is half written resumes to the bytes of the finished run's tables."""
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    *lines, last = (finished / CELLS).read_text().splitlines(keepends=True)
    (out / CELLS).write_text("".join(lines) + last[:100])
    output(run_command(main, *words, "--out", out))
    tables = {path.name for path in finished.iterdir() if path.suffix in (".csv", ".json")} - {"manifest.json"}
    assert tables
    for name in tables:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
