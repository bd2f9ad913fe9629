"""The sweep as a user runs it: files, verdicts, interruption, figures."""

import json
from pathlib import Path

import jax
import pytest
from support import commands, drawings

from figures import norm_vs_rank
from rora_theory.paper import simulation, verdicts
from rora_theory.runs import frames
from sims import variance_sweep

pytestmark = pytest.mark.usefixtures("optimised")  # many draws

# At a rate of 1 the grid and its direct check have the same settings.
SMALL = "--ranks 1 4 16 --p-in 64 --p-out 8 --overlaps 0 0.5 --relative-error 0.02 --lr 1"


def run_variance_sweep(*words: object) -> commands.Ended:
    return commands.run_command(variance_sweep.main, SMALL, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "run"
    (out.parent / "printed").write_text(commands.output(run_variance_sweep("--out", out, "--devices", 1)))
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
def test_printed_tables_and_figures(finished: Path) -> None:
    printed = (finished.parent / "printed").read_text()
    assert "Verdicts on the paper's equations" in printed
    assert "adam, A normal: exponent of the rms norm" in printed
    judged = [verdicts.Verdict(**row) for row in json.loads((finished / "verdicts.json").read_text())]
    assert " ".join(printed.split()).endswith(verdicts.describe_verdicts(judged)), "the answer is the last line"
    words = drawings.words(norm_vs_rank, finished)["norm_vs_rank"]
    assert [word for word in ("SGD, overlap 0", "exact law", "paper, Eq. 11") if word not in words] == []


@pytest.mark.slow
def test_an_interrupted_run_resumes_on_another_number_of_devices(finished: Path, tmp_path: Path) -> None:
    assert len(jax.devices()) > 2  # before the command chooses how many there are
    commands.check_resumption(variance_sweep.main, [SMALL, "--devices", 2], finished, tmp_path / "run")
