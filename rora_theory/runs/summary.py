"""Write a run's key figures to ``summary.json`` and its tables to ``tables.md``.

Examples:
  >>> import pandas as pd
  >>> slopes = pd.DataFrame({"rule": ["lora", "rora"], "slope": [0.97, 0.46], "standard_error": [0.02, 0.02]})
  >>> for figure in key_figures(slopes, "slope of the best rate", "slope", over="seeds", scope=["rule"]):
  ...     print(figure.value, figure.standard_error, figure.over, figure.scope)
  0.97 0.02 seeds {'rule': 'lora'}
  0.46 0.02 seeds {'rule': 'rora'}
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rora_theory.runs import frames
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import as_json

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "summary.json"
TABLES = "tables.md"


@dataclasses.dataclass(frozen=True)
class KeyFigure:
    """Headline number of a run.

    Attributes:
      name: Quantity, with its unit if it has one.
      value: Value; None if the run could not determine it.
      standard_error: Standard error in the same unit; None for counts and exact values.
      over: Kind of samples behind the error or the range: ``"draws"``, ``"seeds"``, ``"records"``; empty if there is
        neither.
      low: Lower end of a range over the samples, or None.
      high: Upper end of that range, or None.
      scope: Conditions under which the value holds, such as the optimizer and the rule, by name.
    """

    name: str
    value: float | int | str | None
    standard_error: float | None = None
    over: str = ""
    low: float | None = None
    high: float | None = None
    scope: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SummaryTable:
    """Table with formatted cells.

    Attributes:
      title: Sentence above the table.
      columns: Heads of the columns.
      rows: Cells, row by row.
      text_columns: Number of leading columns that hold text; the others are aligned to the right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    def to_markdown(self) -> str:
        """Return the title and the table in Markdown."""
        alignment = ["---" if i < self.text_columns else "--:" for i in range(len(self.columns))]
        cells = [[_escape(cell) for cell in row] for row in (self.columns, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in (cells[0], alignment, *cells[1:])]
        return f"{self.title.strip()}\n\n" + "\n".join(lines) + "\n"


def key_figures(
    frame: "pd.DataFrame",
    name: str,
    value: str,
    error: str | None = "standard_error",
    *,
    over: str = "",
    bounds: tuple[str, str] | None = None,
    scope: Sequence[str] = (),
) -> list[KeyFigure]:
    """Convert each row of a data frame to a key figure.

    Args:
      frame: Table of results.
      name: Quantity, with its unit if it has one.
      value: Column of the values.
      error: Column of the standard errors; None if the values have none.
      over: Kind of samples behind the errors or ranges. A column ``error_over`` states it for each row instead.
      bounds: Columns of the lower and upper ends of a range over the samples; None if there is no range.
      scope: Columns that state the conditions of a row. Missing entries are left out.
    """
    figures = []
    for row in frames.rows(frame):
        standard_error = row[error] if error is not None else None
        kind = row.get("error_over") or over
        low, high = (row[column] for column in bounds) if bounds is not None else (None, None)
        conditions = {column: row[column] for column in scope if row[column] is not None}
        has_samples = standard_error is not None or low is not None
        figures.append(KeyFigure(name, row[value], standard_error, kind if has_samples else "", low, high, conditions))
    return figures


def write_summary(
    folder: RunFolder,
    *,
    answer: str | None = None,
    warnings: Iterable[str] = (),
    figures: Iterable[KeyFigure] = (),
    tables: Iterable[SummaryTable] = (),
) -> None:
    """Write ``summary.json`` and ``tables.md`` into a run folder.

    Args:
      folder: Folder of the run, which must be open.
      answer: Sentence that answers the run's question.
      warnings: Reservations about the answer.
      figures: Key figures with their errors and scope.
      tables: Tables that documents include.
    """
    summary = {
        "experiment": folder.entry("experiment"),
        "answer": answer,
        "warnings": list(warnings),
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }
    folder.write(SUMMARY, json.dumps(as_json(summary), indent=2, ensure_ascii=False, default=str) + "\n")
    folder.write(TABLES, "\n".join(table.to_markdown() for table in tables))


def _escape(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", "<br>")
