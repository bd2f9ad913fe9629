"""Tables on standard output."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(*, wrap: bool = False) -> Console:
    """The console of standard output; lines of figures are never cut, words fold at 150 columns off a terminal."""
    plain = Console()
    if not wrap:
        return Console(width=max(plain.width, 240))
    return plain if plain.is_terminal else Console(width=150)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, wrap: bool = False
) -> None:
    """Print a table; the first ``left`` columns are words (folded where ``wrap``), the others right-aligned figures."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=not wrap, overflow="fold")
    for row in rows:
        table.add_row(*[Text(str(cell)) for cell in row])  # Text: brackets are no markup
    console(wrap=wrap).print(table)
