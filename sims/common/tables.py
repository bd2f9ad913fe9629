"""Tables and sentences on standard output, for the width of the terminal (80 columns without a terminal)."""

import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rora_theory.runs import frames

if TYPE_CHECKING:
    import pandas as pd

WORDS_WIDTH = 24
"""Width from which on the cells of a column fold."""

HEAD_WIDTH = 10
"""Minimum width to which the head of a column of numbers folds."""

listeners: list[Callable[[str, Sequence[str], Sequence[Sequence[str]], int], None]] = []
"""Functions called with the title, the columns, the cells and the number of text columns of every printed table."""

collect: Callable[[Mapping[str, Any]], None] | None = None
"""Function that receives every printed table, if set (see `answers`)."""


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: int = 1,
    records: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print a table whose first columns are words, which fold, and whose other columns are numbers, which do not.

    A table that is wider than the terminal has longer lines.

    Args:
      title: Sentence above the table.
      columns: Heads of the columns.
      rows: Cells, row by row.
      left: Number of leading columns of words.
      records: Rows of the JSON object of ``--json``; by default, the cells.
    """
    values = [list(row) for row in rows]
    cells = [[str(cell) for cell in row] for row in values]
    # With --json, and for files of the run, the values are passed on unformatted.
    if collect is not None:
        json_rows = [dict(zip(columns, row, strict=True)) for row in values] if records is None else records
        collect({"title": title, "rows": json_rows})
    for listener in listeners:
        listener(title, columns, cells, left)
    print_text(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        widest = max((len(row[i]) for row in cells), default=0)
        if i < left or widest > WORDS_WIDTH:
            table.add_column(column, overflow="fold", min_width=min(max(widest, len(column)), WORDS_WIDTH))
        else:
            head = textwrap.wrap(column, max(widest, HEAD_WIDTH), break_long_words=False)
            table.add_column("\n".join(head), justify="right", no_wrap=True, min_width=max(widest, *map(len, head)))
    for row in cells:
        table.add_row(*map(Text, row))  # Text: brackets are not markup
    terminal = Console()
    needed = Measurement.get(terminal, terminal.options.update(width=10**4), table).minimum
    Console(width=max(terminal.width, needed)).print(table)


def print_records(
    title: str,
    records: "pd.DataFrame | Sequence[Mapping[str, Any]]",
    columns: Mapping[str, str],
    *,
    left: int = 1,
    missing: str = "",
) -> None:
    """Print a table of records.

    Args:
      title: Sentence above the table.
      records: Records, with their entries by name.
      columns: Format string of the cells, as for ``str.format``, for the head of each column.
      left: Number of leading columns of words, see `print_table`.
      missing: Text of a cell with an entry that is None or NaN.
    """
    rows = records if isinstance(records, Sequence) else frames.rows(records)
    cells = [[_cell(form, row) or missing for form in columns.values()] for row in rows]
    json_rows = [_json_row(columns, row) for row in rows]
    print_table(title, list(columns), cells, left=left, records=json_rows)


def _json_row(columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that the cells of a row show; an entry that JSON cannot represent is replaced by its cell."""
    shown_entries: dict[str, Any] = {}
    for head, form in columns.items():
        entries = {name: row[name] for name in _names(form)}
        is_simple = all(value is None or isinstance(value, (str, int, float)) for value in entries.values())
        shown_entries |= entries if is_simple else {head: _cell(form, row)}
    return shown_entries


def _names(form: str) -> list[str]:
    return [name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(form) if name is not None]


def _cell(form: str, row: Mapping[str, Any]) -> str:
    """Format the entries of a row; return an empty string if one of them is missing."""
    is_empty = any(row[name] is None or row[name] != row[name] for name in _names(form))
    return "" if is_empty else form.format_map(row)


def format_slope(row: Mapping[Any, Any]) -> str:
    """Format a fitted exponent with its standard error and the exponent of the exact law; empty without a fit."""
    if row["slope"] != row["slope"]:
        return ""
    return f"{row['slope']:+.3f} ± {row['standard_error']:.3f} ({row['exact']:+.3f})"


def print_text(text: str) -> None:
    """Print sentences, folded between words.

    A line that begins with spaces is a command; it is folded with backslashes, as a shell reads it. The further lines
    of a list item, which begins with a hyphen, are indented.
    """
    width = Console().width
    for line in text.split("\n"):
        if len(line) <= width:
            print(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        # Leave room for the backslash in a command, and never break a path or an option.
        rows = textwrap.wrap(
            line,
            width - 2 if indent else width,
            subsequent_indent=f"{indent}  " if indent or line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        print((" \\\n" if indent else "\n").join(rows))


def printable(text: str, *, keep: str = "") -> str:
    """Escape the characters that a terminal cannot or must not show.

    Args:
      text: Text to escape.
      keep: Control characters that are not escaped.

    Returns:
      The text without other control characters and without characters outside the terminal's encoding.
    """
    plain = "".join(letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)
