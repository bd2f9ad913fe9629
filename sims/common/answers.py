"""How a command ends: its answer in a sentence, what makes it thin, the tables, where the files are.

With ``--json`` a command prints one JSON object of these to standard output and nothing else. Progress, notes and
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

_asked: "tuple[TextIO, dict[str, Any]] | None" = None
"""Where ``--json`` was given: the command's own standard output, and what it has said."""

listeners: list[Callable[[str, list[str]], None]] = []
"""Functions called with every answer that is printed, and the warnings about it."""


def ask() -> None:
    """Collect the answer, tables and files for the JSON object, and discard other text on standard output."""
    global _asked
    _asked = sys.stdout, {"answer": None, "warnings": [], "tables": [], "files": []}
    tables.collect = _asked[1]["tables"].append
    sys.stdout = io.StringIO()


def say(sentence: str, warnings: Iterable[str] = (), /, **more: Any) -> None:
    """Print the answer, and what is thin about it; ``more`` is in the JSON object besides."""
    known = list(warnings)
    for one in (sentence, *known):
        tables.print_text(one)
    for listener in listeners:
        listener(sentence, known)
    if _asked is not None:
        _asked[1].update(as_json(more) | {"answer": sentence, "warnings": known})


def tell_files(folder: Path, names: Sequence[str] | None = None) -> None:
    """Print where the files are: those named, or all of a folder but what begins with a dot."""
    if names is None:
        names = sorted(one.name + "/" * one.is_dir() for one in folder.iterdir() if not one.name.startswith("."))
    tables.print_text(f"files in {folder}: {', '.join(names)}")
    if _asked is not None:
        _asked[1]["files"] += [f"{folder}/{name}" for name in names]


def list_files(paths: Sequence[Path]) -> None:
    """Print the files that are all of an answer, a line each."""
    for path in paths:
        print(path)
    if _asked is not None:
        _asked[1].update(answer=f"{len(paths)} files are written.", files=list(map(str, paths)))


@contextmanager
def reported() -> Iterator[None]:
    """Print the JSON object, if one was asked for, when the block ends; where it exits, only with an answer."""
    global _asked
    try:
        try:
            yield
        except SystemExit:
            if _asked is not None and _asked[1]["answer"] is not None:
                _print()
            raise
        _print()
    finally:
        if _asked is not None:
            sys.stdout, tables.collect, _asked = _asked[0], None, None


def _print() -> None:
    if _asked is not None:
        text = json.dumps(as_json(_asked[1]), indent=2, ensure_ascii=False, default=_plain)
        print(text, file=_asked[0], flush=True)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, other values as they are printed."""
    return value.item() if hasattr(value, "item") else str(value)
