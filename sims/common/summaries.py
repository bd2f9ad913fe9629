"""Write a run's summary from what its report prints."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rora_theory.runs.folder import RunFolder
from rora_theory.runs.summary import KeyFigure, SummaryTable, write_summary
from sims.common import answers, tables


@contextmanager
def summarised(folder: RunFolder, figures: Iterable[KeyFigure] = (), *, answer: str | None = None) -> Iterator[None]:
    """Write `summary.json` and `tables.md` with the answer and the tables that the block prints.

    The files belong to the run: finish it after the block.

    Args:
      folder: Folder of the run, which must be open.
      figures: Key figures with their errors and scope.
      answer: Sentence that answers the run's question; None is the one that the block prints.
    """
    printed: list[SummaryTable] = []
    sentences: list[tuple[str, list[str]]] = []

    def add_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> None:
        printed.append(SummaryTable(title, columns, rows, text_columns))

    def add_answer(sentence: str, warnings: list[str]) -> None:
        sentences.append((sentence, warnings))

    # Listen to what the block prints, so that files and terminal agree.
    tables.listeners.append(add_table)
    answers.listeners.append(add_answer)
    try:
        yield
    finally:
        tables.listeners.remove(add_table)
        answers.listeners.remove(add_answer)
    sentence, warnings = sentences[-1] if sentences else (None, [])
    write_summary(folder, answer=answer or sentence, warnings=warnings, figures=figures, tables=printed)
