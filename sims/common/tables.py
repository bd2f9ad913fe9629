"""Tables and sentences on standard output, folded to the width of the terminal (80 columns without a terminal)."""

import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rora_theory.runs import frames

if TYPE_CHECKING:
    import pandas as pd

WORDS_WIDTH = 24
"""Width to which a column of words may shrink to make room for more columns of numbers."""

MIN_WORDS_WIDTH = 8
"""Width to which a column of words may shrink to make room for the widest column of numbers."""

HEAD_WIDTH = 10
"""Minimum width to which the head of a column of numbers folds."""

GAP = 2
"""Spaces between columns; the box has one more at either end."""

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
    keys: int | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print a table whose first columns are words, which fold, and whose other columns are numbers, which never do.

    Columns of numbers that do not fit follow in a further table with the same keys. A column that does not fit there
    either contains words, and folds too.

    Args:
      title: Sentence above the table.
      columns: Heads of the columns.
      rows: Cells, row by row.
      left: Number of leading columns of words.
      keys: Number of leading columns that identify a row, at least ``left``; they are repeated in each further table.
        The default is ``left``.
      records: Rows of the JSON object of ``--json``; by default, the cells.
    """
    keys = left if keys is None else keys
    console = Console()
    values = [list(row) for row in rows]
    cells = [[str(cell) for cell in row] for row in values]
    # With --json, and for files of the run, the values are passed on unformatted.
    if collect is not None:
        json_rows = [dict(zip(columns, row, strict=True)) for row in values] if records is None else records
        collect({"title": title, "rows": json_rows})
    for listener in listeners:
        listener(title, columns, cells, left)
    widths, folding = _fit_columns(columns, cells, left, keys, console.width)
    # Fill the tables: words fold, sentences take the spare width, and numbers stay whole.
    print_text(title)
    for group in _group_columns(widths, keys, console.width):
        spare = console.width - sum(widths[i] + GAP for i in group)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for i in group:
            if i < left:
                table.add_column(columns[i], overflow="fold", min_width=widths[i])
            elif i in folding:
                table.add_column(columns[i], overflow="fold", width=widths[i] + max(spare, 0))
                spare = 0
            else:
                head = "\n".join(textwrap.wrap(columns[i], widths[i]))
                table.add_column(head, justify="right", no_wrap=True, min_width=widths[i])
        for row in cells:
            table.add_row(*[Text(row[i]) for i in group])  # Text: brackets are not markup
        console.print(table)


def _fit_columns(
    columns: Sequence[str], cells: Sequence[Sequence[str]], left: int, keys: int, line_width: int
) -> tuple[list[int], set[int]]:
    """Return the width of every column, and the columns after the keys that contain sentences and therefore fold.

    Args:
      columns: Heads of the columns.
      cells: Cells, row by row.
      left: Number of leading columns of words.
      keys: Number of leading columns that identify a row.
      line_width: Width of a line in characters.
    """
    # Columns that do not fit next to the narrowest words and the numbers among the keys contain sentences.
    widths = [_width(column, [row[i] for row in cells], words=i < left) for i, column in enumerate(columns)]
    without_key_numbers = line_width - sum(widths[i] + GAP for i in range(left, keys))
    widest = without_key_numbers - left * (MIN_WORDS_WIDTH + GAP) - GAP
    folding = {i for i in range(keys, len(columns)) if widths[i] > widest}
    widths = [WORDS_WIDTH if i in folding else width for i, width in enumerate(widths)]
    # Shrink the widest column of words until the widest column of numbers fits next to the words.
    room = without_key_numbers - max((widths[i] + GAP for i in range(keys, len(columns))), default=0)
    while left and sum(widths[i] + GAP for i in range(left)) > room and max(widths[:left]) > MIN_WORDS_WIDTH:
        widths[widths.index(max(widths[:left]))] -= 1
    return widths, folding


def _group_columns(widths: Sequence[int], keys: int, line_width: int) -> list[list[int]]:
    """Distribute the columns over as many tables as needed, each with the keys and at least one other column."""
    groups = [list(range(keys))]
    for column in range(keys, len(widths)):
        is_full = sum(widths[i] + GAP for i in (*groups[-1], column)) > line_width
        if is_full and len(groups[-1]) > keys:
            groups.append(list(range(keys)))
        groups[-1].append(column)
    return groups


def print_records(
    title: str,
    records: "pd.DataFrame | Sequence[Mapping[str, Any]]",
    columns: Mapping[str, str],
    *,
    left: int = 1,
    keys: int | None = None,
    missing: str = "",
) -> None:
    """Print a table of records.

    Args:
      title: Sentence above the table.
      records: Records, with their entries by name.
      columns: Format string of the cells, as for ``str.format``, for the head of each column.
      left: Number of leading columns of words, see `print_table`.
      keys: Number of leading columns that identify a row, see `print_table`.
      missing: Text of a cell with an entry that is None or NaN.
    """
    rows = records if isinstance(records, Sequence) else frames.rows(records)
    cells = [[_cell(form, row) or missing for form in columns.values()] for row in rows]
    json_rows = [_json_row(columns, row) for row in rows]
    print_table(title, list(columns), cells, left=left, keys=keys, records=json_rows)


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


def _width(head: str, cells: Sequence[str], *, words: bool) -> int:
    """Return the minimum width of a column: numbers need their whole width, words at most `WORDS_WIDTH`."""
    widest = max(map(len, cells), default=0)
    if words:
        return min(max(widest, len(head)), WORDS_WIDTH)
    return max(widest, *map(len, head.split()), min(len(head), HEAD_WIDTH))
