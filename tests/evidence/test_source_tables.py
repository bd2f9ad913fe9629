"""The package's tables are what the originals give, and all tables are complete with and without the originals."""

from pathlib import Path

import pandas as pd
import pytest

from rora_theory.evidence import source_tables, sources
from rora_theory.evidence.sources import SOURCES, SWEEPS

KEYS = {
    "best_rates": ["source", "model", "rank"],
    "exponents": ["source", "from_rank", "method"],
    "regrets": ["source", "model", "old_rank", "rank", "policy"],
    "absolute_rates": ["source", "model", "rank", "policy"],
    "calibration": ["source"],
    "full_ratios": ["source", "rank"],
    "loss_differences": ["model", "learning_rate", "first_step", "rank"],
    "speeds": ["model", "rank"],
}


@pytest.mark.slow
def test_the_packages_tables_are_those_of_the_originals(originals: Path) -> None:
    computed = source_tables.all_tables(originals)
    assert set(computed) == set(sources.TABLES) == set(KEYS)
    unlicensed = [name for name, source in SOURCES.items() if source.file is None]
    for name, keys in KEYS.items():
        shipped = sources.read_table(name).set_index(keys).sort_index()
        fresh = computed[name]
        fresh = fresh if name == "best_rates" else fresh[fresh["source"].isin(unlicensed)]
        fresh = fresh.set_index(keys).sort_index()
        assert shipped.index.equals(fresh.index)
        for column in shipped.columns:
            both = [pd.Series(table[column]).astype(object) for table in (shipped, fresh)]
            for left, right in zip(*both, strict=True):
                if pd.isna(left) or pd.isna(right):
                    assert all(pd.isna(value) or value == "" for value in (left, right)), (name, column)
                elif isinstance(left, int | float) and not isinstance(left, bool):
                    # Best rates of draws may differ by rounding between processors.
                    assert float(left) == pytest.approx(float(right), rel=1e-6, abs=1e-12), (name, column)
                else:
                    assert str(left) == str(right), (name, column)


def test_every_source_has_its_settings() -> None:
    table = source_tables.source_table()
    assert table["source" if "source" in table else "name"].tolist() == list(SOURCES)
    assert not table.drop(columns="path").isin([""]).any(axis=None)
    # Only a source with a licence has its losses in the package.
    for source in SOURCES.values():
        assert (source.file is None) == (source.licence == "none stated")
    packaged = {path.name for path in sources.table_path("speeds").parent.parent.glob("*.csv")}
    assert packaged == {"models.csv", *(source.file for source in SOURCES.values() if source.file)}
    assert set(SWEEPS) < set(SOURCES)
