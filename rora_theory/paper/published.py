"""Published accuracies as data, with the place where each is printed, and the claims in the paper's text.

`paper_tables.csv` holds Tables I and II of the RoRA paper, and `paper_claims.csv` the differences that its text quotes.
`anchor_tables.csv` holds earlier publications, each row with the address of the file that prints it: the LLaMA rows of
LLM-Adapters' `README.md`, and of the first and the present version of the DoRA repository's
`commonsense_reasoning/README.md`. Entries are percentages exactly as printed. The data are claims of others, not
results of this package; `audit` checks them.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rora_theory.paper.tasks import PUBLISHED_TASKS
from rora_theory.runs import frames

NAMES = tuple(task.name for task in PUBLISHED_TASKS.values())
"""Column names of the eight accuracies."""


@dataclass(frozen=True)
class PublishedRow:
    """A printed row of a table.

    Attributes:
      source: Publication: ``RoRA paper``, ``LLM-Adapters repository``, ``DoRA repository (first version)`` or
        ``DoRA repository``.
      address: Address of the file that prints the row, at a fixed commit; empty for the paper.
      table: Table of the paper, ``I`` or ``II``; empty for other sources.
      model: Model as printed.
      method: Method as printed.
      rank: Rank; None if the row does not state it (Table I).
      learning_rate: Learning rate, if printed.
      params_percent: Percentage of trainable parameters, if printed.
      marked_best: Whether the paper marks the row ``(Best)``.
      scores: The eight accuracies in percent, in the order of `PUBLISHED_TASKS`.
      average: Printed average.
    """

    source: str
    address: str
    table: str
    model: str
    method: str
    rank: int | None
    learning_rate: float | None
    params_percent: float | None
    marked_best: bool
    scores: tuple[float, ...]
    average: float

    @property
    def label(self) -> str:
        """Short description of the row: table or source, model, method and rank."""
        place = f"Table {self.table}" if self.table else self.source
        return f"{place}, {self.model} {self.method}" + (f" r={self.rank}" if self.rank else "")


@dataclass(frozen=True)
class Claim:
    """A difference of averages that the paper's text quotes, ``method`` minus ``against``.

    Attributes:
      place: Section or caption that quotes the difference.
      quote: Sentence of the paper.
      model: Model of both rows.
      method: Method of the first row.
      rank: Rank of the first row, if stated.
      against: Method of the second row.
      against_rank: Rank of the second row, if stated.
      printed: Quoted difference in percentage points.
    """

    place: str
    quote: str
    model: str
    method: str
    rank: int | None
    against: str
    against_rank: int | None
    printed: float


def published_rows(source: str | None = None) -> list[PublishedRow]:
    """Return the published rows.

    Args:
      source: Publication to select. None selects all.

    Returns:
      The rows: first the paper's, then the earlier publications in order.
    """
    rows = [
        PublishedRow(
            source=row["source"],
            address=row.get("address") or "",
            table=row.get("table") or "",
            model=row["model"],
            method=row["method"],
            rank=_optional_int(row["rank"]),
            learning_rate=row["learning_rate"],
            params_percent=row.get("params_percent"),
            marked_best=row.get("marked_best") == "yes",
            scores=tuple(row[name] for name in NAMES),
            average=row["average"],
        )
        for row in [*_read("paper_tables.csv"), *_read("anchor_tables.csv")]
    ]
    return [row for row in rows if source is None or row.source == source]


def claims() -> list[Claim]:
    """Return all stored claims in the paper's order."""
    return [
        Claim(
            place=row["place"],
            quote=row["quote"],
            model=row["model"],
            method=row["method"],
            rank=_optional_int(row["rank"]),
            against=row["against"],
            against_rank=_optional_int(row["against_rank"]),
            printed=row["printed"],
        )
        for row in _read("paper_claims.csv")
    ]


def _read(name: str) -> list[dict[str, Any]]:
    return frames.rows(frames.read_csv(Path(str(files(__package__) / name))))


def _optional_int(number: float | None) -> int | None:
    return None if number is None else int(number)
