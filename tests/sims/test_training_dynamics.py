"""The experiment at small size: rows, slopes and answers, resuming, diverged runs."""

import json
from pathlib import Path

import pytest
from support import commands, drawings

from figures import training_dynamics as figure
from rora_theory.lab.sweep import controlled_grid, rank_exponents
from rora_theory.runs import frames
from sims import training_dynamics as sim

SMALL = (
    "--ranks 4 64 --optimizers sgd adam --model linear --read-at 1 4 "
    "--seeds 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 --p-in 64 --p-out 6 --samples 1 --held-out 4 "
    "--sgd-lrs 1e-4 --adam-lrs 1e-6"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dynamics") / "run"
    commands.output(commands.run_command(sim.main, SMALL, "--out", out))
    return out


def slope(table, **values):
    (row,) = table[(table[list(values)] == list(values.values())).all(axis=1)].to_dict("records")
    return row["slope"], row["standard_error"], row["verdict"]


@pytest.mark.slow
def test_slopes_are_the_table(finished):
    """With one training input the signal dominates on it, so kappa = 1/2 and 1 are flat for ranks up to p_in.

    The exact law's slopes over these ranks are within 0.03 of the limit on the training input (r* is 1 and 2.6); the
    rest is the sampling error.
    """
    rows = frames.read_csv(finished / "exponents.csv", rank_exponents.FIT_COLUMNS)
    common = {"trained": "both", "range": "all", "step": 1}
    for optimizer, power, flat in (("sgd", 2, 0.5), ("adam", 1, 1.0)):
        for rule, kappa in (("lora", 1.0), ("rora", 0.5), ("0.25", 0.25)):
            value, error, verdict = slope(rows, optimizer=optimizer, rule=rule, quantity="output_train", **common)
            assert abs(value - power * (flat - kappa)) < 0.03 + 4 * error
            assert (verdict == "flat") <= (kappa == flat)  # the others must fail
        # At the held-out inputs, in an independent direction: cross-talk with power 1/2, more for r near p_in.
        value, error, _ = slope(rows, optimizer=optimizer, rule="rora", quantity="output_held_out", **common)
        assert 0.5 - power / 2 < value + 4 * error
        assert value - 4 * error < 0.75 - power / 2


@pytest.mark.slow
def test_files(finished):
    seeds = frames.read_csv(finished / "seeds.csv", controlled_grid.COLUMNS)
    cells = 2 * 2 * 3 * 2  # optimizers, ranks, rules, A trained or frozen
    assert len(seeds) == cells * 16 * 3
    assert set(seeds["output_train"][seeds["step"] == 0]) == {0.0}
    assert dict(zip(seeds["rule"], seeds["kappa"], strict=True)) == {"lora": 1, "rora": 0.5, "0.25": 0.25}
    assert seeds["scaling"].to_numpy() == pytest.approx((4 / seeds["rank"]) ** seeds["kappa"])
    assert len(frames.read_csv(finished / "results.csv", rank_exponents.MEAN_COLUMNS)) == cells * 3
    manifest = json.loads((finished / "manifest.json").read_text())
    assert (manifest["status"], manifest["config"]["samples"]) == ("complete", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_an_interrupted_run_resumes(finished, tmp_path):
    commands.check_resumption(sim.main, [SMALL], finished, tmp_path / "run")


@pytest.mark.slow
def test_diverged_runs_are_reported(tmp_path):
    words = ["--optimizers", "sgd", "--no-freeze-control", "--sgd-lrs", "3", "--out", tmp_path / "run"]
    assert "diverged by the last step" in commands.output(commands.run_command(sim.main, SMALL, *words))
    means = frames.read_csv(tmp_path / "run" / "results.csv").set_index("step")
    assert means["diverged"][4].any()
    assert not means["diverged"][0].any()


@pytest.mark.slow
def test_figures(finished):
    assert drawings.names(figure, finished) == {f"training_dynamics_linear_{kind}" for kind in ("exponents", "rms")}
    with pytest.raises(SystemExit):
        figure.draw_training_dynamics(figure.TrainingDynamicsOptions(finished, model="mlp"))
