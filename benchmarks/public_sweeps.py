"""Compute the tables that stand in the package for public sweeps whose licence does not allow to copy their losses.

    python benchmarks/public_sweeps.py FOLDER

FOLDER has the original files as CSV, see `original` of each source in `rora_theory/evidence/sources.json`. The tables
go to `rora_theory/evidence/tables`. Run it again after a change of the policies, the advice or the statistics.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from rora_theory.errors import InputError
from rora_theory.evidence import source_tables, sources
from rora_theory.evidence.best_rates import best_rates
from rora_theory.evidence.sources import SOURCES
from rora_theory.evidence.sweeps import load_sweeps
from rora_theory.runs import frames

SIGNIFICANT_DIGITS = 10


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round the floats of a table, so that they do not depend on the processor."""
    floats = table.select_dtypes(float)
    return table.assign(
        **{
            name: [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in floats[name].to_numpy(np.float64)]
            for name in floats
        }
    )


def write(name: str, table: pd.DataFrame) -> None:
    """Write a table of the package."""
    path = sources.table_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(frames.to_csv(rounded(table)))
    print(f"{path}: {len(table)} rows")


def main(folder: Path) -> None:
    """Write all tables."""
    # The starting rates are fitted to the best rates of all sources, those in the package included.
    write(
        "best_rates",
        pd.concat([best_rates(load_sweeps(source, folder)) for source in source_tables.SWEEPS], ignore_index=True),
    )
    unlicensed = [name for name, source in SOURCES.items() if source.file is None]
    for name, table in source_tables.all_tables(folder).items():
        if name != "best_rates":
            write(name, table[table["source"].isin(unlicensed)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with the original files")
    try:
        main(parser.parse_args().folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
