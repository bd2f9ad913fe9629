"""Reading of run folders of sims.horizon."""

import json

import pytest

from rora_theory.errors import InputError
from rora_theory.horizon import runs
from rora_theory.horizon.grid import HorizonGrid
from rora_theory.runs import seals


def write_folder(path, identity) -> None:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps(seals.seal({"experiment": "horizon", "config": identity})))


def test_the_settings_of_compared_runs_are_named(tmp_path, monkeypatch) -> None:
    """A manifest leaves out a variant at its default, which is named nevertheless."""
    monkeypatch.setattr(runs, "read_finished", lambda path: [])
    records = {"model": "m", "model_sha256": "0", "records": {"all": 3}}
    constant, cosine = HorizonGrid().identity(), HorizonGrid(schedule="cosine", read_at=(64,)).identity()
    assert "schedule" not in constant
    write_folder(tmp_path / "constant", constant | records)
    description, other_runs = runs.read_comparison_runs(tmp_path / "constant", cosine | records)
    assert description == "schedule constant"
    assert other_runs == []
    write_folder(tmp_path / "cosine", cosine | records)
    with pytest.raises(InputError, match="no setting differs"):
        runs.read_comparison_runs(tmp_path / "cosine", cosine | records)
    with pytest.raises(InputError, match="records"):
        runs.read_comparison_runs(tmp_path / "constant", cosine | records | {"records": {"all": 4}})
