"""Figures are drawn into folders of their own, never into another's."""

import json
import os
import runpy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from figures import loss_curves, style
from rora_theory.errors import InputError
from rora_theory.runs import digests, seals
from rora_theory.runs.folder import RunFolder


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
class Config:
    """Options of a figure."""

    out: Path
    """folder"""


def test_the_output_folder_is_checked_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(config: Config) -> list[Path]:
        (config.out / "a.png").touch()
        return []

    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(sys, "argv", ["figure", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        style.command(draw, Config, "")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["manifest.json", "results.csv", "metrics.jsonl", "cell.json"])
def test_a_pipe_in_a_run_folder_does_not_block(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], time_limit
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(seals.seal({"experiment": "regime", "config": {}})))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    of_training = name in ("metrics.jsonl", "cell.json")
    with pytest.raises((InputError, SystemExit)) as caught, time_limit(5):
        loss_curves.read_events(tmp_path) if of_training else style.read_frame(tmp_path, "regime")
    assert "is not a regular file" in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", "results.csv", "cells/k/cell.json", "cells/k/metrics.jsonl"])
def test_a_changed_run_or_cell_is_not_drawn(tmp_path: Path, name: str) -> None:
    """The run's manifest has the digests of both."""
    run = RunFolder.open("regime", {}, out=tmp_path / "run")
    cell = run.path / "cells" / "k"
    run.write("results.csv", "rank\n1\n")
    cell.mkdir(parents=True)
    (cell / "cell.json").write_text('{"training": 1.5}')
    (cell / "metrics.jsonl").write_text("{}\n")
    run.add_digests({f"cells/k/{file.name}": digests.of_file(file) for file in cell.iterdir()})
    run.finish(best_loss=1.5)
    read = partial(loss_curves.read_events, cell) if "cells" in name else partial(style.read_frame, run.path)
    seals.check_unchanged(run.path)
    seals.check_unchanged(run.path, "cells/k")
    text = (run.path / name).read_text()
    (run.path / name).write_text(text.replace("1.5", "1.4") if "1.5" in text else text + "2\n")
    with pytest.raises(InputError, match=f"^{run.path / name}: was changed since the run wrote it"):
        read()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", ["norm_vs_rank", "training_dynamics", "loss_vs_rate"])
def test_a_manifest_that_lacks_a_setting_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is complete with a valid digest, except for the experiment's own settings."""
    experiments = {"norm_vs_rank": "variance_sweep", "loss_vs_rate": "rank_sweep"}
    published = Path(__file__).parents[1] / "results" / "published" / experiments.get(name, name)
    for path in published.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((published / "manifest.json").read_text()) | {"config": {}}
    manifest.pop(seals.DIGEST, None)
    (tmp_path / "manifest.json").write_text(json.dumps(seals.seal(manifest)))
    options = ["--rank", "32"] if name == "loss_vs_rate" else []
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"figures.{name}", run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert "KeyError" in error
