"""Takeover distances and linear terms for the grid's law: one initialisation and split of a run of sims.regime."""

import json

import pytest
from support import regime_runs

from rora_theory.errors import InputError
from rora_theory.lab.sweep.law import read_regime
from rora_theory.measure.regimes.tables import TAKEOVER, TAKEOVER_COLUMNS

TERMS = [1.0, 3.0, 6.0, 8.0]
"""Linear terms of the modules of `regime_runs.write` under Adam at held-out tokens."""


def test_values_are_those_of_pefts_init_at_held_out_tokens_under_adam(tmp_path) -> None:
    run = regime_runs.write(tmp_path / "run")
    takeovers, terms = read_regime(run)
    assert takeovers == pytest.approx([term / 100 for term in TERMS], rel=1e-12)
    assert terms == TERMS
    (run / "manifest.json").write_text(json.dumps({}))
    (run / TAKEOVER).write_text(",".join(TAKEOVER_COLUMNS) + "\n")
    with pytest.raises(InputError, match=r"takeover\.csv has no held-out row for kaiming_uniform"):
        read_regime(run)
