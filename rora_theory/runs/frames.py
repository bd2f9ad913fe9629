"""Read and write the tables of a run as pandas frames and CSV files.

Floats are written with all digits, so that reading them restores the same bits. Missing values (None, NaN or
`pandas.NA`) are empty cells, which are read as NaN.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.runs import files

if TYPE_CHECKING:  # importing pandas takes as long as a short command
    import pandas as pd

TEXT_COLUMNS = ("rule", "key", "file", "prediction", "claim")
"""Columns that hold text even if every entry looks like a number or a boolean.

Examples are a rule given by its exponent, ``0.25``, and a claim that is ``true``, ``false`` or close to either.
"""


def from_rows(rows: Iterable[Mapping[Any, Any]], columns: Sequence[str]) -> "pd.DataFrame":
    """Return the frame of some rows. Integers stay integers if other entries of their column are missing.

    Args:
      rows: Rows by column name; entries of other names are left out.
      columns: Columns of the frame, in order.

    Examples:
      >>> from_rows([{"rank": 8, "loss": 0.5}, {"loss": 1.0, "seconds": 3.0}], ["rank", "loss"])
         rank  loss
      0     8   0.5
      1  <NA>   1.0
    """
    import pandas as pd

    rows = list(rows)
    series: dict[str, Any] = {}
    for column in columns:
        values = [value.item() if isinstance(value := row.get(column), np.generic) else value for row in rows]
        types = {type(value) for value in values if value is not None}
        has_gaps = types == {int} and None in values
        is_mixed = len(types) > 1 or str in types  # keep each value unchanged
        series[column] = pd.Series(values, dtype="Int64" if has_gaps else object if is_mixed else None)
    return pd.DataFrame(series, columns=list(columns))


def rows(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return the rows of a frame with Python values, None for missing ones. This is the inverse of `from_rows`.

    Examples:
      >>> rows(from_rows([{"rank": 8, "loss": 0.5}, {"loss": 1.0}], ["rank", "loss"]))
      [{'rank': 8, 'loss': 0.5}, {'rank': None, 'loss': 1.0}]
    """
    names, values = [str(name) for name in frame], frame.astype(object).where(frame.notna(), None).to_numpy()
    return [dict(zip(names, row, strict=True)) for row in values.tolist()]


def where(frame: "pd.DataFrame", values: Mapping[str, Any]) -> "pd.DataFrame":
    """Return the rows that have the given values in the given columns.

    Args:
      frame: Table to select from.
      values: Required value of each column.

    Examples:
      >>> where(from_rows([{"rank": 8, "loss": 0.5}, {"rank": 16, "loss": 0.25}], ["rank", "loss"]), {"rank": 16})
         rank  loss
      1    16  0.25
    """
    is_equal = frame[list(values)] == list(values.values())
    return frame[is_equal.fillna(False).astype(bool).all(axis=1)]  # a missing entry equals no value


def to_csv(frame: "pd.DataFrame") -> str:
    r"""Return the text of a frame's CSV file: a header and one line for each row, each with its newline.

    Examples:
      >>> to_csv(from_rows([{"rank": 8, "loss": 0.1}, {"loss": 1e-7}], ["rank", "loss"]))
      'rank,loss\n8,0.1\n,1e-07\n'
    """
    return frame.to_csv(index=False, lineterminator="\n")


def read_csv(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    text_columns: Sequence[str] = TEXT_COLUMNS,
    accepted: str = "the file as the run wrote it",
) -> "pd.DataFrame":
    """Read a CSV file; floats are read to the last bit.

    Args:
      path: Path of the file.
      columns: Columns that the file must have, in order; None accepts any columns.
      text_columns: Columns that are not read as numbers.
      accepted: Description of the expected file, for error messages.

    Raises:
      InputError: The file does not exist or cannot be read, has other columns, or has a line that is incomplete or has
        another number of fields than the header; the message names the line.
    """
    text = files.read_text(path, accepted=accepted)
    if text and not text.endswith("\n"):
        raise InputError(f"{path}: line {text.count(chr(10)) + 1} is cut off. Expected {accepted}.")
    lines = csv.reader(io.StringIO(text))
    try:
        head = next(lines, None)
        if not head or (columns is not None and head != list(columns)):
            header = ",".join(columns) if columns is not None else "of a table"
            raise InputError(f"{path}: line 1 is not the header {header}. Expected {accepted}.")
        # pandas would fill short lines with missing values, and read an index from lines with one field more.
        for line in lines:
            if len(line) != len(head):
                raise InputError(f"{path}: line {lines.line_num} must have {len(head)} fields, got {len(line)}")
    except csv.Error as error:
        raise InputError(f"{path}: is not a table ({error}). Expected {accepted}.") from error
    import pandas as pd

    # Only empty fields and nan are missing: the default list would drop texts such as NA and None.
    frame = pd.read_csv(
        io.StringIO(text),
        dtype=dict.fromkeys((column for column in text_columns if column in head), object),
        dtype_backend="numpy_nullable",
        keep_default_na=False,
        na_values=["", "nan"],
        skip_blank_lines=False,
    )
    return frame.apply(_to_numpy_type)


def check_columns(path: Path, frame: "pd.DataFrame", columns: Iterable[str], *, advice: str) -> None:
    """Raise `InputError` unless a table has some columns.

    Args:
      path: Path of the table, for the error.
      frame: Table to check.
      columns: Names of the columns.
      advice: Sentence at the end of the error.
    """
    missing = [name for name in columns if name not in frame]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}. {advice}")


def _to_numpy_type(values: "pd.Series") -> "pd.Series":
    """Convert a column to NumPy's type; integers with missing entries keep pandas' ``Int64``."""
    numpy_types: dict[str, Any] = {"Float64": "float64", "string": "str"}
    if not values.hasnans:
        numpy_types |= {"Int64": "int64", "boolean": "bool"}
    return values.astype(numpy_types.get(values.dtype.name, values.dtype))
