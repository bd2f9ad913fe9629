"""The published accuracies as data, labelled with where they are printed, and what the paper's text says of them.

`paper_tables.csv` holds Tables I and II of the RoRA paper, `paper_claims.csv` the differences that its text
quotes, and `anchor_tables.csv` what was published before, each row with the address of the file that prints it: the
LLaMA rows of LLM-Adapters' `README.md` and of the DoRA repository's `commonsense_reasoning/README.md`, in its first
version and in its present one. Entries are percentages exactly as printed. The data are others' claims, not results
of this package; `audit` checks them.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rora_theory.data.tasks import TASKS
from rora_theory.io import frames

NAMES = tuple(task.name for task in TASKS.values())
"""Column names of the eight accuracies."""


@dataclass(frozen=True)
class PublishedRow:
    """One printed row.

    Attributes:
      source: ``RoRA paper``, ``LLM-Adapters repository``, ``DoRA repository (first version)`` or ``DoRA repository``.
      address: of the file that prints it, at its commit; empty for the paper.
      table: ``I`` or ``II`` in the paper.
      model, method: as printed.
      rank: None where the row does not state it (Table I).
      learning_rate: where printed.
      params_percent: trainable parameters in percent, where printed.
      marked_best: whether the paper marks the row ``(Best)``.
      scores: the eight accuracies in percent, in the order of `TASKS`.
      average: the printed average.
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
        """Where the row stands, in words."""
        place = f"Table {self.table}" if self.table else self.source
        return f"{place}, {self.model} {self.method}" + (f" r={self.rank}" if self.rank else "")


@dataclass(frozen=True)
class Claim:
    """A difference of averages quoted in the paper's text: ``method`` minus ``against``, in points."""

    place: str
    quote: str
    model: str
    method: str
    rank: int | None
    against: str
    against_rank: int | None
    printed: float


def published_rows(source: str | None = None) -> list[PublishedRow]:
    """Every `PublishedRow`, or those of one source; sources in order of publication but the paper's first."""
    found = [
        PublishedRow(
            source=row["source"],
            address=row.get("address") or "",
            table=row.get("table") or "",
            model=row["model"],
            method=row["method"],
            rank=_whole(row["rank"]),
            learning_rate=row["learning_rate"],
            params_percent=row.get("params_percent"),
            marked_best=row.get("marked_best") == "yes",
            scores=tuple(row[name] for name in NAMES),
            average=row["average"],
        )
        for row in [*_read("paper_tables.csv"), *_read("anchor_tables.csv")]
    ]
    return [row for row in found if source is None or row.source == source]


def claims() -> list[Claim]:
    """Every stored claim, in the paper's order."""
    return [
        Claim(
            place=row["place"],
            quote=row["quote"],
            model=row["model"],
            method=row["method"],
            rank=_whole(row["rank"]),
            against=row["against"],
            against_rank=_whole(row["against_rank"]),
            printed=row["printed"],
        )
        for row in _read("paper_claims.csv")
    ]


def _read(name: str) -> list[dict[str, Any]]:
    return frames.rows(frames.read_csv(Path(str(files(__package__) / name))))


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
