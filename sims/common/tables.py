"""Tables and sentences on standard output, never wider than the terminal: 80 columns where there is none."""

import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rora_theory.io import frames

if TYPE_CHECKING:
    import pandas as pd

WORDS = 24  # columns of words are not made narrower than this for the sake of further figures beside them,
LEAST = 8  # nor than this for the sake of the widest figure
HEAD = 10  # heads of figures fold to no less than this
GAP = 2  # spaces between columns; the box has one more at either end
collect: Callable[[Mapping[str, Any]], None] | None = None
"""Takes every table that is printed, where one is set (see `answers`)."""
listeners: list[Callable[[str, Sequence[str], Sequence[Sequence[str]], int], None]] = []
"""Functions called with the title, the columns, the cells and the number of text columns of every printed table."""


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: int = 1,
    keys: int | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print a table; the first ``left`` columns are words, which fold, the others figures, which are never cut.

    Columns of figures that find no room follow in a further table, beside the same keys. One that finds none there
    either has words in it, and folds too.

    Args:
      title: Sentence above the table.
      columns: Heads of the columns.
      rows: Cells, row by row.
      left: Number of leading columns of words.
      keys: Number of leading columns that identify a row, ``left`` or more: they are repeated in each further table.
        The default is ``left``.
      records: Rows given to a machine in place of the cells.
    """
    keys = left if keys is None else keys
    console = Console()
    given = [list(row) for row in rows]
    cells = [[str(cell) for cell in row] for row in given]
    for listener in listeners:
        listener(title, columns, cells, left)
    if collect is not None:
        own = [dict(zip(columns, row, strict=True)) for row in given] if records is None else records
        collect({"title": title, "rows": own})
    widths = [_width(column, [row[i] for row in cells], words=i < left) for i, column in enumerate(columns)]
    width = console.width - sum(widths[i] + GAP for i in range(left, keys))  # beside keys that are figures
    widest = width - left * (LEAST + GAP) - GAP  # of a column beside the narrowest words
    folds = {i for i in range(keys, len(columns)) if widths[i] > widest}
    widths = [WORDS if i in folds else width for i, width in enumerate(widths)]
    room = width - max((widths[i] + GAP for i in range(keys, len(columns))), default=0)
    while left and sum(widths[i] + GAP for i in range(left)) > room and max(widths[:left]) > LEAST:
        widths[widths.index(max(widths[:left]))] -= 1
    groups = [list(range(keys))]
    for figure in range(keys, len(columns)):
        wider = [*groups[-1], figure]
        if len(groups[-1]) > keys and sum(widths[i] + GAP for i in wider) > console.width:
            wider = [*range(keys), figure]
            groups.append(wider)
        groups[-1] = wider
    print_text(title)
    for group in groups:
        spare = console.width - sum(widths[i] + GAP for i in group)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for i in group:
            if i < left:
                table.add_column(columns[i], overflow="fold", min_width=widths[i])
            elif i in folds:
                table.add_column(columns[i], overflow="fold", width=widths[i] + max(spare, 0))
                spare = 0
            else:
                head = "\n".join(textwrap.wrap(columns[i], widths[i]))
                table.add_column(head, justify="right", no_wrap=True, min_width=widths[i])
        for row in cells:
            table.add_row(*[Text(row[i]) for i in group])  # Text: brackets are no markup
        console.print(table)


def print_records(
    title: str,
    records: "pd.DataFrame | Sequence[Mapping[str, Any]]",
    columns: Mapping[str, str],
    *,
    left: int = 1,
    keys: int | None = None,
    missing: str = "",
) -> None:
    """`print_table` of rows by name: ``columns`` has of each head the form of its cells, as for ``str.format``.

    A cell with a figure that is None or NaN is ``missing``.
    """
    rows = records if isinstance(records, Sequence) else frames.rows(records)
    cells = [[_cell(form, row) or missing for form in columns.values()] for row in rows]
    figures = [_figures(columns, row) for row in rows]
    print_table(title, list(columns), cells, left=left, keys=keys, records=figures)


def _figures(columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a row that its cells are made of, as they are; a cell that is made of others in its own words."""
    found: dict[str, Any] = {}
    for head, form in columns.items():
        own = {name: row[name] for name in _names(form)}
        simple = all(value is None or isinstance(value, (str, int, float)) for value in own.values())
        found |= own if simple else {head: _cell(form, row)}
    return found


def _names(form: str) -> list[str]:
    return [name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(form) if name is not None]


def _cell(form: str, row: Mapping[str, Any]) -> str:
    """The form filled with a row's entries; empty where one of them is missing."""
    empty = any(row[name] is None or row[name] != row[name] for name in _names(form))
    return "" if empty else form.format_map(row)


def slope(row: Mapping[Any, Any]) -> str:
    """A fitted exponent with its standard error, and the exact law's; empty where there is none."""
    return (
        ""
        if row["slope"] != row["slope"]
        else f"{row['slope']:+.3f} ± {row['standard_error']:.3f} ({row['exact']:+.3f})"
    )


def print_text(text: str) -> None:
    """Print sentences, folded between words; a line that begins with spaces is a command, and folds as shells read."""
    width = Console().width
    for line in text.split("\n"):
        if len(line) <= width:
            print(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        print(
            (" \\\n" if indent else "\n").join(
                textwrap.wrap(
                    line,
                    width - 2 if indent else width,
                    subsequent_indent=indent + "  " if indent else "",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        )


def printable(text: str, *, but: str = "") -> str:
    """A text as a terminal may show it: no control characters ``but`` these, and no letter that it has not."""
    plain = "".join(one if one.isprintable() or one in but else ascii(one)[1:-1] for one in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def _width(head: str, cells: Sequence[str], *, words: bool) -> int:
    """The least width of a column: of its figures all, of its words `WORDS` or what they need."""
    widest = max(map(len, cells), default=0)
    if words:
        return min(max(widest, len(head)), WORDS)
    return max(widest, *map(len, head.split()), min(len(head), HEAD))
