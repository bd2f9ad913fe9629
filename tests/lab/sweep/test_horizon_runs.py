"""Reading of run folders of sims.horizon."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.sweep.horizon_grid import HorizonGrid
from rora_theory.lab.sweep.horizon_runs import HorizonRun, read_comparison_runs, read_finished
from rora_theory.lab.sweep.readings import Reading, ReadRun
from rora_theory.runs import seals
from rora_theory.runs.journal import Journal
from rora_theory.runs.reading import CELLS, key_of

CELL = {"rank": 2, "strength": 4, "rate": 1e-3, "seed": 3, "read_at": [8]}
RESULT = {"readings": [{"step": 2, "losses": [1], "answer_losses": [0.5]}], "train_losses": [2], "diverged_at": 5}


def write_folder(path: Path, identity: dict[str, Any], experiment: str = "horizon") -> None:
    """Write a run folder with one finished cell."""
    path.mkdir()
    manifest = {"experiment": experiment, "run_id": "1", "config": identity}
    (path / "manifest.json").write_text(json.dumps(seals.seal(manifest)))
    Journal(path / CELLS, "1").append({"key": key_of(CELL), "cell": CELL, "value": RESULT, "files": {}})


def test_compared_runs_are_read_and_their_settings_named(tmp_path) -> None:
    """A manifest leaves out a variant at its default, which is named nevertheless.

    A run under a schedule that decays has its planned number of steps.
    """
    records = {"model": "m", "model_sha256": "0", "records": {"all": 3}}
    constant, cosine = HorizonGrid().identity(), HorizonGrid(schedule="cosine", read_at=(64,)).identity()
    assert "schedule" not in constant
    write_folder(tmp_path / "constant", constant | records)
    description, other_runs = read_comparison_runs(tmp_path / "constant", cosine | records)
    assert description == "schedule constant"
    reading = Reading(2, [1.0], [0.5])
    assert other_runs == [HorizonRun(2, 4.0, 1e-3, 3, ReadRun([2.0], [reading], diverged_at=5))]
    write_folder(tmp_path / "cosine", cosine | records)
    assert read_finished(tmp_path / "cosine") == [replace(other_runs[0], steps=8)]
    with pytest.raises(InputError, match="no setting differs"):
        read_comparison_runs(tmp_path / "cosine", cosine | records)
    with pytest.raises(InputError, match="records"):
        read_comparison_runs(tmp_path / "constant", cosine | records | {"records": {"all": 4}})
    write_folder(tmp_path / "other", constant | records, "lr_transfer")
    for name in ("other", "absent"):
        with pytest.raises(InputError, match=f"--compare-to .*sims.horizon, got .*{name}"):
            read_comparison_runs(tmp_path / name, cosine | records)
