"""A run of sims.regime is read for advice: the requested rows, targets, damaged files."""

import json
from pathlib import Path

import pytest
from support import regime_runs

from rora_theory.errors import InputError
from rora_theory.measure.regimes import saved_run as regime_run
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.runs import frames


@pytest.fixture
def run(tmp_path) -> Path:
    return regime_runs.write(tmp_path / "run")


@pytest.mark.parametrize("term", ["", "many"])
def test_a_non_numeric_linear_term_is_named(run, term) -> None:
    """Rows that are not requested may be damaged."""
    path = run / regime_tables.CROSSINGS
    (run / "manifest.json").write_text(json.dumps({}))
    table = frames.read_csv(path).astype({"linear_term": object})
    line = table.index[(table["optimizer"] == "adam") & (table["split"] == "heldout")][2]
    table.loc[line, "linear_term"] = term
    path.write_text(frames.to_csv(table))
    with pytest.raises(InputError, match=rf"{regime_tables.CROSSINGS}: line {line + 2}: linear_term .*, got"):
        regime_run.read_regime_run(run, optimizer="adamw", init=table["init"][line], split="heldout")
    regime_run.read_regime_run(run, optimizer="sgd", init="kaiming_uniform", split="heldout")


def test_targets_are_matched_as_peft_does(run) -> None:
    """A target is a whole name or the part behind a dot; a word such as all-linear, or none, selects every module."""
    regime = regime_run.read_regime_run(run, optimizer="adamw", init="gaussian", split="heldout")
    assert regime.module_types == ["q_proj", "down_proj"]
    assert list(regime.terms_of(["self_attn.q_proj"])) == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert regime.terms_of("all-linear") == regime.terms_of(None) == regime.linear_terms
    with pytest.raises(InputError, match="no row for optimizer adam, init normal, split heldout"):
        regime_run.read_regime_run(run, optimizer="adamw", init="normal", split="heldout")
    with pytest.raises(InputError, match=r"targets has proj, which .* did not measure; measured: q_proj down_proj"):
        regime.terms_of(["q_proj", "proj"])
