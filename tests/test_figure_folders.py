"""Figures name the run folder whose manifest they cannot use."""

import json
import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", ["norm_vs_rank", "training_dynamics", "loss_vs_rate"])
def test_a_manifest_that_lacks_a_setting_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is complete, except for the experiment's own settings."""
    experiments = {"norm_vs_rank": "variance_sweep", "loss_vs_rate": "rank_sweep"}
    published = Path(__file__).parents[1] / "results" / "published" / experiments.get(name, name)
    for path in published.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((published / "manifest.json").read_text()) | {"config": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    options = ["--rank", "32"] if name == "loss_vs_rate" else []
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"figures.{name}", run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert "KeyError" in error
