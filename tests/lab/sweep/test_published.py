"""The published runs are read as they are, and their analysis gives the published tables."""

import json
from pathlib import Path

import pandas as pd
import pytest

from rora_theory.lab.sweep import analysis, results
from rora_theory.lab.sweep.law import read_regime
from rora_theory.lab.sweep.runs import read_comparison_runs, read_runs, read_tokens
from rora_theory.runs import frames

PUBLISHED = Path(__file__).parents[3] / "results" / "published"
UNCHECKED = ("records.csv", "policies.csv", "predictions.csv", "change.csv")
"""Files that are no result of the analysis, that count the rows of the advice, or that only earlier commits wrote."""
EARLIER = {
    "parts.csv": {"exponent", "exponent_low", "exponent_high", "change", "law_ratio"},
    "exponents.csv": {"by_parts", "by_parts_low", "by_parts_high", "by_parts_verdict"},
}
"""Columns that only earlier commits wrote."""
RUN = ["rank", "gain", "learning_rate", "seed", "step"]
"""Columns that identify a row of results.csv."""


def option(command: list[str], name: str) -> Path | None:
    """Return the published folder that an option of a run's command names."""
    return PUBLISHED / Path(command[command.index(name) + 1]).name if name in command else None


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "name",
    [
        "horizon",
        "horizon_A_times_8",
        "horizon_attention",
        "horizon_batch_32",
        "horizon_cosine",
        "horizon_gemma",
        "horizon_gemma_cosine",
    ],
)
def test_the_analysis_of_published_runs_gives_their_tables(name, tmp_path) -> None:
    """Every table of the folder is the one that its runs give."""
    folder = PUBLISHED / name
    manifest = json.loads((folder / "manifest.json").read_text())
    regime, compare_to = (option(manifest["command"], words) for words in ("--regime", "--compare-to"))
    law = read_regime(regime) if regime else None
    others = dict([read_comparison_runs(compare_to, manifest["config"])] if compare_to else [])
    runs, tokens = read_runs(folder), read_tokens(folder)
    judged = analysis.analyse(runs, tokens, manifest["config"]["settings"], law=law, other_runs=others)
    tables = {f"{name}.csv": table for name, table in judged.items()}
    tables["results.csv"] = results.results_table(runs, tokens)
    checked = [path.name for path in folder.glob("*.csv") if path.name not in UNCHECKED]
    assert len(checked) >= 6
    for file in checked:
        (tmp_path / file).write_text(frames.to_csv(tables[file]))
        published, made = frames.read_csv(folder / file), frames.read_csv(tmp_path / file)
        if file == "results.csv":  # whose order and further columns are those of all sweeps
            published, made = (
                table.sort_values(RUN, ignore_index=True) for table in (published, made[list(published)])
            )
        published = published.drop(columns=EARLIER.get(file, ()), errors="ignore")
        pd.testing.assert_frame_equal(made, published, check_dtype=False, rtol=1e-9, atol=1e-12, obj=file)
