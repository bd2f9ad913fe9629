"""The command on tiny weights: a rate within the budget, a folder that resumes, and a rate without a probe."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support import commands

pytest.importorskip("torch", reason="the extra torch")

from rora_theory.measure.tuning import search
from rora_theory.measure.tuning.training import ProbeModel
from rora_theory.runs import frames
from sims import tune as sim

SETTINGS = "--held-out 16 --batch-size 4 --cutoff 400 --steps 256 --rank 16 --alpha 8 --lr 1e-2 --budget 0.1"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
def test_a_probe_finds_a_rate_and_resumes(model, data, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    words = ["--data", *(data / name / "train.json" for name in ("one", "two")), "--model", model, "--out", out]
    trained: list[str] = []

    def train(self, *arguments, real=ProbeModel.train):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(str(arguments[0]))
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search.ProbeModel, "train", train)
        stopped = commands.run_command(sim.main, *words, SETTINGS)
    assert stopped.status == 130
    first = json.loads((out / sim.CHECKPOINT).read_text())["runs"]
    assert len(first) == 2
    ended = commands.run_command(sim.main, *words, SETTINGS, "--json")
    assert ended.status == 0, ended.err
    answered = json.loads(ended.out)
    assert json.loads((out / sim.CHECKPOINT).read_text())["runs"][:2] == first
    result = json.loads((out / "tuning.json").read_text())
    assert answered["tuning"] == result
    assert f"{result['learning_rate']:.3g}" in answered["answer"]
    assert result["low"] < result["learning_rate"] < result["high"]
    assert result["cost"]["spent"] <= 25.6
    assert (result["config"]["r"], result["config"]["lora_alpha"]) == (16, 8)
    assert result["prior"]["mean"] == pytest.approx(math.log(1e-2))
    assert result["posterior"]["spread"] < result["prior"]["spread"]
    curve = frames.read_csv(out / "results.csv")
    assert len(curve) >= 3
    assert curve["held_out_loss"].nunique() == len(curve)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0])
def test_ctrl_c_at_any_moment_ends_with_one_line(delay, model, data, tmp_path) -> None:
    """The signal comes some time after the first line of output; the checkpoint has whole runs, which resume."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "sims.tune", "--data", data / "train.json", "--model", model, "--out", out]
    # Large batches, so that the probe outlasts the delays.
    settings = SETTINGS.replace("256", "20000").replace("size 4", "size 128").split()
    process = subprocess.Popen(
        [*map(str, words), *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in err
    checkpoint = out / sim.CHECKPOINT
    assert not checkpoint.exists() or json.loads(checkpoint.read_text())["runs"]


def test_by_default_the_rate_is_the_prior_s_without_data(model) -> None:
    """The rate is the prior's for the planned run; a larger gain lowers it."""
    rates = []
    for alpha in (8, 64):
        words = ["--model", model, f"--rank 16 --alpha {alpha} --steps 256 --json"]
        rates.append(json.loads(commands.output(commands.run_command(sim.main, *words)))["answer"])
    assert all("expected regret" in answer and "probe" not in answer for answer in rates)
    low, high = (float(answer.split("learning rate ")[1].split()[0]) for answer in rates)
    assert 2 < low / high < 8


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--budget 0.1", "--data .*budget"),
        ("--data x.json", "--data .*budget"),
        ("--data x.json --budget 0.1 --held-out 4", "--held-out .*16.* 4"),
        ("--data x.json --budget 2", "--budget .* 2"),
    ],
)
def test_bad_input_is_refused_before_work(words, named) -> None:
    assert re.search(named, commands.refusal(commands.run_command(sim.main, words)))
