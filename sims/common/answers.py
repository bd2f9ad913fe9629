"""The end of a command: the answer as a sentence, its warnings, the tables, and the paths of the files.

With ``--json``, a command prints these as one JSON object on standard output, and nothing else. Progress, notes and
errors still go to standard error.
"""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rora_theory.runs.reading import as_json
from sims.common import tables

_report: "tuple[TextIO, dict[str, Any]] | None" = None
"""With ``--json``, the command's own standard output and the object collected so far."""

listeners: list[Callable[[str, list[str]], None]] = []
"""Functions called with every answer that is printed, and the warnings about it."""


def collect_json() -> None:
    """Collect the answer, tables and files for the JSON object, and discard other text on standard output."""
    global _report
    _report = sys.stdout, {"answer": None, "warnings": [], "tables": [], "files": []}
    tables.collect = _report[1]["tables"].append
    sys.stdout = io.StringIO()


def print_answer(sentence: str, warnings: Iterable[str] = (), /, **more: Any) -> None:
    """Print the answer of a command and its warnings.

    Args:
      sentence: Answer of the command.
      warnings: Sentences about the limits of the answer.
      **more: Further entries of the JSON object.
    """
    warnings = list(warnings)
    for text in (sentence, *warnings):
        tables.print_text(text)
    for listener in listeners:
        listener(sentence, warnings)
    if _report is not None:
        _report[1].update(as_json(more) | {"answer": sentence, "warnings": warnings})


def print_files(folder: Path, names: Sequence[str] | None = None) -> None:
    """Print which files a folder contains.

    Args:
      folder: Folder to list.
      names: Names of the files; by default, all names that do not begin with a dot.
    """
    if names is None:
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    tables.print_text(f"files in {folder}: {', '.join(names)}")
    if _report is not None:
        _report[1]["files"] += [f"{folder}/{name}" for name in names]


def print_paths(paths: Sequence[Path]) -> None:
    """Print the paths of the files that are the whole answer of a command, one per line."""
    for path in paths:
        print(path)
    if _report is not None:
        _report[1].update(answer=f"{len(paths)} files were written.", files=list(map(str, paths)))


@contextmanager
def reporting() -> Iterator[None]:
    """Print the JSON object, if ``--json`` was given, when the block ends.

    If the block raises `SystemExit`, the object is printed only if it has an answer.
    """
    global _report
    try:
        try:
            yield
        except SystemExit:
            # A command that ends early, as after --help, may have no answer.
            if _report is not None and _report[1]["answer"] is not None:
                _print_json()
            raise
        _print_json()
    finally:
        if _report is not None:
            sys.stdout, tables.collect, _report = _report[0], None, None


def _print_json() -> None:
    if _report is not None:
        text = json.dumps(as_json(_report[1]), indent=2, ensure_ascii=False, default=str)
        print(text, file=_report[0], flush=True)
