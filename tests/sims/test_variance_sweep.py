"""The sweep as a user runs it: files, verdicts, interruption, bad input, figures."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from figures import exponent_map, norm_vs_rank, style
from rora_theory.io import frames
from rora_theory.paper import simulation, verdicts
from rora_theory.runs.reading import CELLS
from sims import variance_sweep

pytestmark = pytest.mark.usefixtures("optimised")  # many draws

ROOT = Path(__file__).parents[2]
# At a rate of 1 the grid and its direct check have the same settings.
ARGUMENTS = "--ranks 1 4 16 --p-in 64 --p-out 8 --overlaps 0 0.5 --relative-error 0.02 --lr 1"
SMALL = ARGUMENTS.split()


def run(*arguments: object) -> None:
    variance_sweep.main(list(map(str, arguments)))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ends with, status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "run"
    run(*SMALL, "--out", out, "--devices", 1)
    return out


@pytest.mark.slow
def test_files(finished: Path) -> None:
    results, check = (
        frames.read_csv(finished / name, simulation.COLUMNS) for name in ("results.csv", "direct_check.csv")
    )
    assert len(results) == 2 * 3 * 2 * 3 * 4  # optimizers x rules x overlaps x ranks x quantities
    for table in (results, check):
        assert ((table["estimate"] - table["exact"]) / table["standard_error"]).abs().max() < 5.6  # as in the library's
    assert set(check["sampler"]) == {"direct"}
    assert set(check["rank"]) == {1}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["config"]["ranks"] == [1, 4, 16]
    assert manifest["config"]["p_in"] == 64
    assert {"packages", "device", "seed", "start", "end", "units"} <= set(manifest)
    evidence = {one["equation"]: one["evidence"] for one in json.loads((finished / "verdicts.json").read_text())}
    assert len(evidence) == 17
    assert "over ranks 1-16: +0.5" in evidence["13"]  # of the grid's draws: the direct check's have another scaling


@pytest.mark.slow
def test_the_tables_are_printed_and_nothing_is_drawn_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle, on another number of devices, then on: the same bytes, each cell drawn once."""
    assert len(jax.devices()) > 2  # before the command chooses how many there are
    drawn: list[simulation.SimulationCell] = []
    draw, out = simulation.draw_cell, tmp_path / "run"

    def stopping(config: simulation.SimulationConfig, cell: simulation.SimulationCell, *rest: object) -> object:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(cell)
        return draw(config, cell, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(simulation, "draw_cell", stopping)
    with pytest.raises(SystemExit) as stopped:
        run(*SMALL, "--out", out, "--devices", 2)
    assert stopped.value.code == 130
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    assert len((out / CELLS).read_text().splitlines()) == 5
    capsys.readouterr()
    drawn += [None] * 100  # type: ignore[list-item]
    run(*SMALL, "--out", out, "--devices", 1)
    shown = capsys.readouterr()
    assert "Verdicts on the paper's equations" in shown.out
    assert "adam, A normal: exponent of the rms norm" in shown.out
    judged = [verdicts.Verdict(**one) for one in json.loads((out / "verdicts.json").read_text())]
    assert " ".join(shown.out.split()).endswith(verdicts.verdicts_in_words(judged)), "the answer is the last line"
    seconds = frames.read_csv(out / "second_moments.csv")
    assert {"optimizer", "init", "overlap", "rule", "rank", "estimate", "exact", "ratio", "paper", "z"} <= {*seconds}
    assert len(seconds) == (frames.read_csv(out / "results.csv")["quantity"] == "second_moment").sum()
    assert shown.err == ""  # quiet where there is no terminal
    own = [cell for cell in drawn if cell in simulation.simulation_cells(simulation.SimulationConfig())]
    assert len(own) == len(set(own))
    for name in ("results.csv", "direct_check.csv", "verdicts.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_killed_and_started_again(finished: Path, tmp_path: Path) -> None:
    """SIGKILL once some cells are done, then on: the same bytes."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sims.variance_sweep", *SMALL, "--out", str(out), "--devices", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / CELLS).exists() and (out / CELLS).read_text().count("\n") > 2):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    run(*SMALL, "--out", out, "--devices", 1)
    for name in ("results.csv", "direct_check.csv", "verdicts.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ranks 0", "--ranks must be an integer of 1 or more, got 0"),
        ("--ranks 2.5", "2.5"),
        ("--rules loar", "--rules"),
        ("--alpha -1", "--alpha must be a finite number above 0, got -1.0"),
        ("--learning-rate 0.1", "--learning-rate"),
        ("--layer-data layers.npz", "--layer-data"),
        ("--overlaps 1.5", "--overlaps"),
        ("--inits xavier", "xavier"),
        ("--sampler reduced --inits rademacher", "--sampler reduced"),
        ("--p-in 0", "--p-in must be an integer of 1 or more, got 0"),
        ("--devices 0", "--devices must be an integer of 1 or more, got 0"),
        ("--draws 64 --relative-error 0.1", "--relative-error 0.1 has no effect with --draws"),
        ("--out /proc/none", "/proc/none"),
    ],
)
def test_bad_arguments(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments.split())


@pytest.mark.slow
def test_run_folders_are_not_overwritten(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    error = refused(capsys, *SMALL, "--alpha", "8", "--out", finished)
    assert "other arguments (alpha there 16.0, here 8.0)" in error
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before

    stray = tmp_path / "full"
    stray.mkdir()
    (stray / "thesis.txt").write_text("mine")
    refused(capsys, *SMALL, "--out", stray)
    assert [path.name for path in stray.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [lambda text: text[:-20], lambda text: text.replace("lora", "lore", 1), lambda text: text[:600]]
)
def test_damaged_results(finished: Path, tmp_path: Path, damage, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "manifest.json", out)
    text = damage((finished / "results.csv").read_text())
    (out / "results.csv").write_text(text)
    assert "was changed since" in refused(capsys, *SMALL, "--out", out)
    assert (out / "results.csv").read_text() == text


@pytest.mark.slow
def test_norm_figure(finished: Path, tmp_path: Path) -> None:
    for _ in range(2):
        style.main(norm_vs_rank.draw, norm_vs_rank.Config(finished, out=tmp_path))
    assert (tmp_path / "norm_vs_rank.png").stat().st_size > 10_000
    svg = (tmp_path / "norm_vs_rank.svg").read_text()
    assert all(word in svg for word in ("SGD, overlap 0", "exact law", "paper, Eq. 11"))


@pytest.mark.slow
def test_exponent_map(tmp_path: Path) -> None:
    style.main(exponent_map.draw, exponent_map.Config(out=tmp_path, p_in=256))
    assert (tmp_path / "exponent_map.png").exists()
    assert (tmp_path / "exponent_map.svg").exists()


def test_a_figure_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"manifest\.json: no such file\. Expected the file of a run folder"):
        style.main(norm_vs_rank.draw, norm_vs_rank.Config(tmp_path))
