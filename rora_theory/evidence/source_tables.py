"""All tables of the evidence: computed from losses where there are any, and read from the package elsewhere."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rora_theory.errors import InputError
from rora_theory.evidence import absolute_rates, histories, regrets
from rora_theory.evidence.best_rates import best_rates, exponents
from rora_theory.evidence.calibration import LEVEL, calibrate
from rora_theory.evidence.policies import advised_range, policies_for
from rora_theory.evidence.sources import SOURCES, SWEEPS, TABLES, read_table
from rora_theory.evidence.sweeps import Sweep, full_rates, load_sweeps
from rora_theory.runs import frames

if TYPE_CHECKING:
    import pandas as pd

CALIBRATION_COLUMNS = (
    "source", "policy", "level", "pairs", "models", "share", "share_error", "share_with_errors",
    "share_with_errors_error", "median_width", "needed_scale",
)  # fmt: skip
"""Columns of the table of `calibration_table`."""

REFERENCE = "tinker"
"""Source to which the exponent in the rank is fitted: it has many models, and its losses are in the package."""


def sweep_tables(sweeps: Sequence[Sweep], reference: Sequence[Sweep]) -> dict[str, "pd.DataFrame"]:
    """Compute the tables of one source, by the names of `sources.TABLES`.

    Args:
      sweeps: Sweeps of the source.
      reference: Sweeps to which the exponent in the rank is fitted, without the model that is judged.
    """
    return {
        "best_rates": best_rates(sweeps),
        "exponents": exponents(sweeps),
        "regrets": regrets.regrets_on_sweeps(sweeps, lambda sweep: policies_for(sweep, reference)),
        "calibration": calibration_table(sweeps),
    }


def calibration_table(sweeps: Sequence[Sweep]) -> "pd.DataFrame":
    """Return the calibration of the range of `rora_theory.transfer`, with the columns `CALIBRATION_COLUMNS`."""
    try:
        result = calibrate(sweeps, advised_range)
    except InputError:  # no pair of best rates inside their grids
        return frames.from_rows([], CALIBRATION_COLUMNS)
    row = {"source": sweeps[0].source, "policy": "advice", "level": LEVEL, "pairs": result.pairs}
    row |= {"models": result.models, "share": result.share.value, "share_error": result.share.known_error}
    row |= {"share_with_errors": result.share_with_errors.value}
    row |= {"share_with_errors_error": result.share_with_errors.known_error}
    row |= {"median_width": result.median_width}
    row |= {"needed_scale": result.needed_scale if math.isfinite(result.needed_scale) else None}
    return frames.from_rows([row], CALIBRATION_COLUMNS)


def all_tables(folder: Path | None = None) -> dict[str, "pd.DataFrame"]:
    """Return the tables of all public sources, by the names of `sources.TABLES`.

    Args:
      folder: Folder with the original files; None reads the tables of the sources without a licence from the package.

    Returns:
      The tables. Rows of a source whose losses are at hand are computed, all others are read.
    """
    sources = [source for source in SWEEPS if SOURCES[source].file is not None or folder is not None]
    # Read all files before the work, so that a missing one is named at once.
    by_source = {source: load_sweeps(source, folder) for source in sources}
    losses = None if folder is None else histories.load_histories(folder)
    computed: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    reference = by_source[REFERENCE]
    for source, sweeps in by_source.items():
        for name, table in sweep_tables(sweeps, reference).items():
            computed[name].append(table)
        computed["absolute_rates"].append(absolute_rates.absolute_regrets(sweeps))
        if folder is not None and SOURCES[source].file is None:
            full = {source: full_rates(source, folder)}
            computed["full_ratios"].append(absolute_rates.full_ratios(full, sweeps))
    if losses is not None:
        computed["loss_differences"].append(histories.loss_difference_table(losses))
        computed["speeds"].append(histories.speed_table(losses))
        sources.append(histories.HISTORIES)
    return {name: _with_derived(name, tables, sources) for name, tables in computed.items()}


def _with_derived(name: str, computed: Sequence["pd.DataFrame"], sources: Sequence[str]) -> "pd.DataFrame":
    """Return the computed rows, followed by those of the package for all other sources."""
    import pandas as pd

    parts = [table for table in computed if len(table)]
    if set(SOURCES) - set(sources):
        table = read_table(name)
        parts.append(table[~table["source"].isin(sources)])
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def source_table() -> "pd.DataFrame":
    """Return the sources with their settings, a row for each."""
    rows: list[Mapping[str, object]] = [vars(source) for source in SOURCES.values()]
    return frames.from_rows(rows, [name for name in rows[0] if name not in ("file", "original")])
