"""Crossing distances and linear terms for the grid's law: one initialisation and split of a run of sims.regime."""

import json

import pytest
from support import regime_runs

from rora_theory.errors import InputError
from rora_theory.lab.sweep.law import read_regime
from rora_theory.measure.regimes.tables import CROSSING_DISTANCE_COLUMNS, CROSSING_DISTANCES

TERMS = [1.0, 3.0, 6.0, 8.0]
"""Linear terms of the modules of `regime_runs.write` under Adam at held-out tokens."""


def test_values_are_those_of_pefts_init_at_held_out_tokens_under_adam(tmp_path) -> None:
    run = regime_runs.write(tmp_path / "run")
    law = read_regime(run)
    assert law.crossing_distances == pytest.approx([term / 100 for term in TERMS], rel=1e-12)
    assert law.linear_terms == tuple(TERMS)
    (run / "manifest.json").write_text(json.dumps({}))
    (run / CROSSING_DISTANCES).write_text(",".join(CROSSING_DISTANCE_COLUMNS) + "\n")
    with pytest.raises(InputError, match=r"crossing_distances\.csv has no held-out row for kaiming_uniform"):
        read_regime(run)
