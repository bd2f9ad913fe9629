"""Reading of run folders of sims.horizon."""

import json

import pytest

from rora_theory.errors import InputError
from rora_theory.horizon.grid import HorizonGrid
from rora_theory.horizon.runs import read_comparison_runs
from rora_theory.runs import seals
from rora_theory.runs.reading import CELLS


def write_folder(path, identity) -> None:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps(seals.seal({"experiment": "horizon", "config": identity})))
    (path / CELLS).write_text("")


def test_the_settings_of_compared_runs_are_named(tmp_path) -> None:
    """A manifest leaves out a variant at its default, which is named nevertheless."""
    records = {"model": "m", "model_sha256": "0", "records": {"all": 3}}
    constant, cosine = HorizonGrid().identity(), HorizonGrid(schedule="cosine", read_at=(64,)).identity()
    assert "schedule" not in constant
    write_folder(tmp_path / "constant", constant | records)
    description, runs = read_comparison_runs(tmp_path / "constant", cosine | records)
    assert description == "schedule constant"
    assert runs == []
    write_folder(tmp_path / "cosine", cosine | records)
    with pytest.raises(InputError, match="no setting differs"):
        read_comparison_runs(tmp_path / "cosine", cosine | records)
    with pytest.raises(InputError, match="records"):
        read_comparison_runs(tmp_path / "constant", cosine | records | {"records": {"all": 4}})
