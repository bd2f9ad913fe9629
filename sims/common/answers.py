"""The end of a command: the answer as a sentence, its warnings, the tables, and the paths of the files.

With ``--json``, a command prints these as one JSON object on standard output, and nothing else. Progress, notes and
errors still go to standard error.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rora_theory.runs.reading import as_json
from sims.common import tables


class PrintedAnswer(NamedTuple):
    """Answer of a command.

    Attributes:
      sentence: Answer as a sentence.
      warnings: Sentences about the limits of the answer.
      more: Further entries of the JSON object.
    """

    sentence: str
    warnings: list[str]
    more: dict[str, Any]


printed: list[PrintedAnswer] = []
"""Answers that the running command has printed."""

printed_files: list[str] = []
"""Paths of the files that the running command has printed."""

_json_output: TextIO | None = None
"""Standard output of a command with ``--json``; other text is discarded."""


def collect_json() -> None:
    """Discard the text on standard output, and print a JSON object at the end."""
    global _json_output
    _json_output, sys.stdout = sys.stdout, io.StringIO()


def print_answer(sentence: str, warnings: Iterable[str] = (), /, **more: Any) -> None:
    """Print the answer of a command and its warnings."""
    printed.append(PrintedAnswer(sentence, list(warnings), more))
    for text in (sentence, *printed[-1].warnings):
        tables.print_text(text)


def print_files(folder: Path, names: Sequence[str] | None = None) -> None:
    """Print which files a folder contains.

    Args:
      folder: Folder to list.
      names: Names of the files; by default, all names that do not begin with a dot.
    """
    if names is None:
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    tables.print_text(f"files in {folder}: {', '.join(names)}")
    printed_files.extend(f"{folder}/{name}" for name in names)


def print_paths(paths: Sequence[Path]) -> None:
    """Print the paths of the files that are the whole answer of a command, one per line."""
    for path in paths:
        print(path)
    printed.append(PrintedAnswer(f"{len(paths)} files were written.", [], {}))
    printed_files.extend(map(str, paths))


@contextmanager
def reporting() -> Iterator[None]:
    """Print the JSON object when the block ends, if `collect_json` was called in it.

    If the block raises `SystemExit`, the object is printed only if it has an answer.
    """
    global _json_output
    for collected in (tables.printed, printed, printed_files):
        collected.clear()
    try:
        try:
            yield
        except SystemExit:
            # A command that ends early may have no answer.
            if printed:
                _print_json()
            raise
        _print_json()
    finally:
        if _json_output is not None:
            sys.stdout, _json_output = _json_output, None


def _print_json() -> None:
    if _json_output is None:
        return
    answer = printed[-1] if printed else PrintedAnswer("", [], {})
    entries = {
        "answer": answer.sentence or None,
        "warnings": answer.warnings,
        **answer.more,
        "tables": [{"title": table.title, "rows": records} for table, records in tables.printed],
        "files": printed_files,
    }
    print(json.dumps(as_json(entries), indent=2, ensure_ascii=False, default=str), file=_json_output, flush=True)
