"""The command on tiny weights: a rate within the budget, and a folder that resumes."""

import json
import math
import re

import numpy as np
import pytest
from support import checkpoint

from rora_theory.data.batches import Examples
from rora_theory.errors import InputError
from rora_theory.horizon import probe
from rora_theory.io import frames
from rora_theory.runs.reading import CELLS
from rora_theory.tune.plan import ProbeRun
from sims import tune as sim


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    data = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    model = checkpoint.model(tmp_path_factory.mktemp("model"))
    words = ["--data", *(str(data / name / "train.json") for name in ("one", "two")), "--model", str(model)]
    words += ["--held-out", "12", "--batch-size", "4", "--cutoff", "400", "--steps", "256"]
    return [*words, "--rank", "16", "--alpha", "8", "--lr", "1e-2"]


@pytest.mark.slow
def test_it_finds_a_rate_and_resumes(base, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "run"
    trained: list[str] = []

    def train(self, trial, real=sim.Probe.run) -> ProbeRun:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(str(trial))
        return real(self, trial)

    monkeypatch.setattr(sim.Probe, "run", train)
    with pytest.raises(SystemExit) as stop:
        sim.main([*base, "--out", str(out)])
    assert stop.value.code == 130
    assert "Run the same command again" in capsys.readouterr().err
    first = (out / CELLS).read_text()
    assert first.count("\n") == 2 + first.count("software")
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "240")
    sim.main([*base, "--out", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (out / CELLS).read_text().startswith(first)
    result = json.loads((out / "tuning.json").read_text())
    assert said["tuning"] == result
    assert f"{result['learning_rate']:.3g}" in said["answer"]
    assert result["low"] < result["learning_rate"] < result["high"]
    assert result["cost"]["spent"] <= 25.6
    assert result["config"]["r"] == 16
    assert result["config"]["lora_alpha"] == 8
    assert result["probe"]["displacement_constant"] > 0
    curve = frames.read_csv(out / "results.csv")
    assert len(curve) >= 3
    assert curve["held_out_loss"].nunique() == len(curve)
    assert math.isclose(curve["learning_rate"].iloc[1] / curve["learning_rate"].iloc[0], 3.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 100", "steps .* got 100"),
        ("--budget 0", "budget"),
        ("--warmup 256", "warmup .* 256"),
        ("--targets q_proj q_proj", "targets"),
        ("--seed -1", "seed"),
        ("--held-out 1", "held-out"),
        ("--rule none", "rule"),
    ],
)
def test_bad_input(base, words, said, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        sim.main([*base, *words.split(), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_held_out_records_are_reduced_to_what_the_budget_allows() -> None:
    examples = Examples(np.arange(20), np.array([0, 4, 9, 14, 20]), np.arange(20) % 4 > 0, 0, 0)
    chosen = probe.select(examples, [1, 3])
    assert [chosen[index].tolist() for index in range(len(chosen))] == [[4, 5, 6, 7, 8], [14, 15, 16, 17, 18, 19]]
    assert chosen.target_counts.tolist() == examples.target_counts[[1, 3]].tolist()
    sizes = np.array([10, 20, 30, 40])
    for tokens, expected in ((100, [0, 1, 2, 3]), (60, [0, 1, 2]), (59, [0, 2]), (40, [0, 2])):
        assert probe._affordable(sizes, tokens).tolist() == expected
    with pytest.raises(InputError, match="39 tokens"):
        probe._affordable(sizes, 39)
