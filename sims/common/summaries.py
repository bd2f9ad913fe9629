"""Write a run's summary from what its report prints."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rora_theory.runs.folder import RunFolder
from rora_theory.runs.summary import KeyFigure, write_summary
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
    first_table, first_answer = len(tables.printed), len(answers.printed)
    yield
    printed_tables = [table for table, _ in tables.printed[first_table:]]
    sentence, warnings = None, list[str]()
    for printed in answers.printed[first_answer:]:
        sentence, warnings, _ = printed
    write_summary(folder, answer=answer or sentence, warnings=warnings, figures=figures, tables=printed_tables)
