"""The sweep as a user runs it: files, verdicts, interruption, figures."""

import json
from pathlib import Path

import jax
import pytest
from support import commands

from figures import norm_vs_rank, style
from rora_theory.io import frames
from rora_theory.paper import simulation, verdicts
from rora_theory.runs.reading import CELLS
from sims import variance_sweep

pytestmark = pytest.mark.usefixtures("optimised")  # many draws

# At a rate of 1 the grid and its direct check have the same settings.
SMALL = "--ranks 1 4 16 --p-in 64 --p-out 8 --overlaps 0 0.5 --relative-error 0.02 --lr 1"


def run(*words: object) -> commands.Ended:
    return commands.run(variance_sweep.main, SMALL, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "run"
    commands.output(run("--out", out, "--devices", 1))
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
    evidence = {row["equation"]: row["evidence"] for row in json.loads((finished / "verdicts.json").read_text())}
    assert len(evidence) == 17
    assert "over ranks 1-16: +0.5" in evidence["13"]  # of the grid's draws: the direct check's have another scaling


@pytest.mark.slow
def test_the_tables_are_printed_and_nothing_is_drawn_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle, on another number of devices, then on: the same bytes, each cell drawn once."""
    assert len(jax.devices()) > 2  # before the command chooses how many there are
    drawn: list[simulation.SimulationCell | None] = []
    draw, out = simulation.draw_cell, tmp_path / "run"

    def stopping(config: simulation.SimulationConfig, cell: simulation.SimulationCell, *rest: object) -> object:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(cell)
        return draw(config, cell, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(simulation, "draw_cell", stopping)
    assert run("--out", out, "--devices", 2).status == 130
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    assert len((out / CELLS).read_text().splitlines()) == 5
    drawn += [None] * 100
    printed = commands.output(run("--out", out, "--devices", 1))  # and quiet where there is no terminal
    assert "Verdicts on the paper's equations" in printed
    assert "adam, A normal: exponent of the rms norm" in printed
    judged = [verdicts.Verdict(**row) for row in json.loads((out / "verdicts.json").read_text())]
    assert " ".join(printed.split()).endswith(verdicts.describe_verdicts(judged)), "the answer is the last line"
    seconds = frames.read_csv(out / "second_moments.csv")
    assert {"optimizer", "init", "overlap", "rule", "rank", "estimate", "exact", "ratio", "paper", "z"} <= {*seconds}
    assert len(seconds) == (frames.read_csv(out / "results.csv")["quantity"] == "second_moment").sum()
    grid_cells = simulation.simulation_cells(simulation.SimulationConfig())
    drawn_once = [cell for cell in drawn if cell in grid_cells]
    assert len(drawn_once) == len(set(drawn_once))
    for name in ("results.csv", "direct_check.csv", "verdicts.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_the_figure_of_a_run(finished: Path, tmp_path: Path) -> None:
    style.main(norm_vs_rank.draw, norm_vs_rank.Config(finished, out=tmp_path))
    assert (tmp_path / "norm_vs_rank.png").stat().st_size > 10_000
    svg = (tmp_path / "norm_vs_rank.svg").read_text()
    assert all(word in svg for word in ("SGD, overlap 0", "exact law", "paper, Eq. 11"))
