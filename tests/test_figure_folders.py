"""Figures are drawn into folders of their own, never into another's."""

import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from figures import style
from rora_theory.errors import InputError


@pytest.mark.parametrize("names", [[], ["a.png", "a.svg", "table.md", "table.csv"], ["notes.txt", "manifest.json"]])
def test_new_folders_run_folders_and_figure_folders_are_accepted(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"experiment": "regime"}))
    style.check_output_folder(tmp_path)
    style.check_output_folder(tmp_path / "new")


@pytest.mark.parametrize("names", [["photo.png"], ["a.png", "a.svg", "data.csv"], [".git"], ["manifest.json"]])
def test_folders_with_other_files_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"name": "a web page's"}))
    with pytest.raises(InputError, match=f"holds {names[-1]}, which is not a figure"):
        style.check_output_folder(tmp_path)


@dataclass(frozen=True)
class FigureOptions:
    """Options of a figure."""

    out: Path
    """folder"""


def test_the_output_folder_is_checked_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(config: FigureOptions) -> list[Path]:
        (config.out / "a.png").touch()
        return []

    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(sys, "argv", ["figure", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        style.command(draw, FigureOptions, "")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


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
