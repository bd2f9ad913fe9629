"""Tables of a run as pandas frames: the one place where a CSV file becomes a frame, and a frame a CSV file.

A float is written with every digit, so that it is read back to the bit. What is missing (None, NaN or `pandas.NA`) is
an empty cell, which is read as NaN.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.io import files

if TYPE_CHECKING:  # pandas takes as long to import as a short command to run
    import pandas as pd

WORDS = ("rule", "key", "file", "prediction")
"""Columns that hold words even where each word is a number: a rule may be an exponent, ``0.25``."""


def of(rows: Iterable[Mapping[Any, Any]], columns: Sequence[str]) -> "pd.DataFrame":
    """The frame of some rows: ``columns`` in their order, entries of other names left out.

    Whole numbers stay whole where others of their column are missing.

    Examples:
      >>> of([{"rank": 8, "loss": 0.5}, {"loss": 1.0, "seconds": 3.0}], ["rank", "loss"])
         rank  loss
      0     8   0.5
      1  <NA>   1.0
    """
    import pandas as pd

    rows = list(rows)
    found: dict[str, Any] = {}
    for column in columns:
        values = [value.item() if isinstance(value := row.get(column), np.generic) else value for row in rows]
        kinds = {type(value) for value in values if value is not None}
        whole_but_missing = kinds == {int} and None in values
        mixed = len(kinds) > 1 or str in kinds  # each value stays as it is
        found[column] = pd.Series(values, dtype="Int64" if whole_but_missing else object if mixed else None)
    return pd.DataFrame(found, columns=list(columns))


def rows(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows of a frame as Python's values; None is missing. The other way round is `of`.

    Examples:
      >>> rows(of([{"rank": 8, "loss": 0.5}, {"loss": 1.0}], ["rank", "loss"]))
      [{'rank': 8, 'loss': 0.5}, {'rank': None, 'loss': 1.0}]
    """
    names, values = [str(name) for name in frame], frame.astype(object).where(frame.notna(), None).to_numpy()
    return [dict(zip(names, row, strict=True)) for row in values.tolist()]


def where(frame: "pd.DataFrame", values: Mapping[str, Any]) -> "pd.DataFrame":
    """The rows that have these values in the columns of these names.

    Examples:
      >>> where(of([{"rank": 8, "loss": 0.5}, {"rank": 16, "loss": 0.25}], ["rank", "loss"]), {"rank": 16})
         rank  loss
      1    16  0.25
    """
    same = frame[list(values)] == list(values.values())
    return frame[same.fillna(False).astype(bool).all(axis=1)]  # what is missing is no value


def to_csv(frame: "pd.DataFrame") -> str:
    r"""The text of a frame's CSV file: a head and a line a row, each with its newline.

    Examples:
      >>> to_csv(of([{"rank": 8, "loss": 0.1}, {"loss": 1e-7}], ["rank", "loss"]))
      'rank,loss\n8,0.1\n,1e-07\n'
    """
    return frame.to_csv(index=False, lineterminator="\n")


def read_csv(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    words: Sequence[str] = WORDS,
    accepted: str = "the file as the run wrote it",
) -> "pd.DataFrame":
    """The frame of a CSV file; floats to the bit.

    Args:
      path: the file.
      columns: those that it must have, in this order; None takes what there is.
      words: columns that are not read as numbers.
      accepted: what the file should have been, for the errors.

    Raises:
      InputError: no such file or one that can't be read, other columns, a line that is cut off or has another number
        of fields than the first; names the line.
    """
    text = files.read_text(path, accepted=accepted)
    if text and not text.endswith("\n"):
        raise InputError(f"{path}: line {text.count(chr(10)) + 1} is cut off; accepted is {accepted}")
    lines = csv.reader(io.StringIO(text))
    try:
        head = next(lines, None)
        if not head or (columns is not None and head != list(columns)):
            header = ",".join(columns) if columns is not None else "of a table"
            raise InputError(f"{path}: line 1 is not the header {header}")
        for line in lines:
            if len(line) != len(head):
                raise InputError(f"{path}: line {lines.line_num} has {len(line)} fields; accepted are {len(head)}")
    except csv.Error as error:
        raise InputError(f"{path}: is not a table ({error}); accepted is {accepted}") from error
    import pandas as pd

    found = pd.read_csv(  # from pandas 3.1 on floats are exact without being asked for
        io.StringIO(text),
        dtype=dict.fromkeys((column for column in words if column in head), object),
        dtype_backend="numpy_nullable",
        keep_default_na=False,
        na_values=["", "nan"],
        skip_blank_lines=False,
    )
    return found.apply(_plain)


def _plain(values: "pd.Series") -> "pd.Series":
    """A column of NumPy's type; whole numbers of which some are missing stay pandas' ``Int64``."""
    plain: dict[str, Any] = {"Float64": "float64", "string": "str"}
    if not values.hasnans:
        plain |= {"Int64": "int64", "boolean": "bool"}
    return values.astype(plain.get(values.dtype.name, values.dtype))
