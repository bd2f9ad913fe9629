"""The takeover distances and linear terms that the grid's law is of: one init and split of a run of sims.regime."""

import json

import pytest
from support import regime_runs

from rora_theory.errors import InputError
from rora_theory.horizon.law import read_regime
from rora_theory.measure.regimes.tables import TAKEOVER, TAKEOVER_COLUMNS
from rora_theory.runs import seals

TERMS = [1.0, 3.0, 6.0, 8.0]
"""Of `regime_runs.write` under Adam at held-out tokens, a module each."""


def test_they_are_those_of_peft_s_init_at_held_out_tokens_under_adam(tmp_path) -> None:
    takeovers, terms = read_regime(regime_runs.write(tmp_path / "run"))
    assert takeovers == pytest.approx([term / 100 for term in TERMS], rel=1e-15)
    assert terms == TERMS


def test_a_run_without_a_takeover_distance_of_them_is_bad_input(tmp_path) -> None:
    run = regime_runs.write(tmp_path / "run")
    (run / "manifest.json").write_text(json.dumps(seals.seal({})))
    (run / TAKEOVER).write_text(",".join(TAKEOVER_COLUMNS) + "\n")
    with pytest.raises(InputError, match=r"takeover\.csv has no held-out row for kaiming_uniform"):
        read_regime(run)


def test_a_distance_that_was_changed_is_bad_input(tmp_path) -> None:
    run = regime_runs.write(tmp_path / "run")
    (run / TAKEOVER).write_text((run / TAKEOVER).read_text().replace("0.01", "0.02"))
    with pytest.raises(InputError, match=r"takeover\.csv: was changed since the run wrote it"):
        read_regime(run)
