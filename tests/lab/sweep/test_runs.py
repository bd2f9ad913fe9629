"""Reading of run folders of a matrix."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.sweep.runs import Reading, ReadRun, SweepRun, read_comparison_runs, read_runs
from rora_theory.runs.journal import Journal
from rora_theory.runs.reading import CELLS, key_of

CELL = {
    "model": "m", "method": "lora", "rank": 2, "alpha": 4, "rate": 1e-3, "seed": 3, "read_at": [8], "axes": {},
    "evaluation": None,
}  # fmt: skip
NEW = {
    "model": "n", "method": "rora", "rank": 16, "alpha": 4.0, "rate": 1e-3, "seed": 3, "read_at": [8],
    "axes": {"schedule": "linear"}, "evaluation": {"protocol": "label"},
}  # fmt: skip
RESULT = {"readings": [{"step": 2, "losses": [1], "answer_losses": [0.5]}], "train_losses": [2], "diverged_at": 5}


def write_folder(path: Path, settings: dict[str, Any], experiment: str = "sweep", **config: Any) -> dict[str, Any]:
    """Write a run folder with two finished cells, and return its configuration."""
    path.mkdir()
    config = {"models": ["m"], "model_sha256": {"m": "0"}, "data": {"all": 3}, "settings": settings} | config
    manifest = {"experiment": experiment, "run_id": "1", "config": config}
    (path / "manifest.json").write_text(json.dumps(manifest))
    journal = Journal(path / CELLS)
    for cell in (CELL, NEW):
        journal.append({"key": key_of(cell), "cell": cell, "value": RESULT | {"seconds": 3.0}, "files": []})
    return config


def test_compared_runs_are_read_and_their_settings_named(tmp_path) -> None:
    """A run under a schedule that decays has its planned number of steps; RoRA's G is gamma times the rank."""
    constant = write_folder(tmp_path / "constant", {"schedule": "constant", "warmup": 4})
    cosine = write_folder(tmp_path / "cosine", {"schedule": "cosine", "warmup": 4})
    description, (run, new) = read_comparison_runs(tmp_path / "constant", cosine)
    assert description == "schedule constant"
    reading = Reading(2, [1.0], [0.5])
    expected = SweepRun(
        2, 4.0, 1e-3, 3, ReadRun([2.0], [reading], diverged_at=5), alpha=4.0, model="m", key=key_of(CELL),
        result={"seconds": 3.0}, read_at=(8,), axes=(("schedule", "constant"),),
    )  # fmt: skip
    assert run == expected
    assert (new.method, new.adapter, new.gain, new.gamma) == ("rora", "lora", 16.0, 1.0)
    assert (new.steps, new.model) == (8, "n")
    assert (new.axes, new.evaluation) == ((("schedule", "linear"),), {"protocol": "label"})
    runs = {run.key: run for run in read_runs(tmp_path / "cosine")}
    assert runs[key_of(CELL)] == replace(expected, steps=8, axes=(("schedule", "cosine"),))
    with pytest.raises(InputError, match="no setting differs"):
        read_comparison_runs(tmp_path / "cosine", cosine)
    with pytest.raises(InputError, match="data differs"):
        read_comparison_runs(tmp_path / "constant", cosine | {"data": {"all": 4}})
    (tmp_path / "other").mkdir()
    manifest = {"experiment": "lr_transfer", "run_id": "1", "config": {}}
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    for name in ("other", "absent"):
        with pytest.raises(InputError, match=f"compare_to .*sims.sweep.*got .*{name}"):
            read_comparison_runs(tmp_path / name, constant)


def test_the_base_model_is_read_as_a_run_without_a_rate(tmp_path) -> None:
    """Its rate is 0, so that no curve has it."""
    write_folder(tmp_path / "run", {"schedule": "cosine"})
    settings = dict.fromkeys(("rank", "alpha", "rate", "seed"))
    base = CELL | settings | {"method": "base", "read_at": [], "evaluation": {"protocol": "label"}}
    value = {"readings": [RESULT["readings"][0] | {"step": 0}], "train_losses": [], "diverged_at": None}
    Journal(tmp_path / "run" / CELLS).append({"key": key_of(base), "cell": base, "value": value, "files": []})
    run = {run.key: run for run in read_runs(tmp_path / "run")}[key_of(base)]
    assert (run.method, run.rank, run.gain, run.rate, run.seed) == ("base", None, None, 0.0, 0)
    assert (run.steps, run.length, run.losses(0)) == (None, 0, [1.0])
