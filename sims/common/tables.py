"""Tables and sentences on standard output, for the width of the terminal (80 columns without a terminal)."""

import string
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rora_theory.runs import frames
from rora_theory.runs.summary import SummaryTable

if TYPE_CHECKING:
    import pandas as pd

WORDS_WIDTH = 24
"""Width from which on the cells of a column fold."""

HEAD_WIDTH = 10
"""Minimum width to which the head of a column of numbers folds."""

printed: list[tuple[SummaryTable, Sequence[Mapping[str, Any]]]] = []
"""Tables that the running command has printed, with their rows as JSON objects."""


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
    json_rows = [dict(zip(columns, row, strict=True)) for row in values] if records is None else records
    printed.append((SummaryTable(title, columns, cells, left), json_rows))
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
    return f"{row['slope']:+.3f} ({row['standard_error']:.3f}), {row['exact']:+.3f}"


def print_text(text: str) -> None:
    """Print sentences, folded between words. A line that begins with spaces is a command, which is not folded."""
    width = Console().width
    for line in text.split("\n"):
        is_command = line.startswith(" ")
        print(line if is_command else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))
