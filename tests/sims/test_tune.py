"""The command on tiny weights: a rate within the budget, and a folder that resumes."""

import json
import math

import numpy as np
import pytest
from support import commands

from rora_theory.errors import InputError
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.horizon import probe
from rora_theory.measure.tuning.plan import ProbeRun
from rora_theory.runs import frames
from rora_theory.runs.reading import CELLS
from sims import tune as sim


@pytest.mark.slow
def test_a_probe_finds_a_rate_and_resumes(model, data, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    settings = "--held-out 12 --batch-size 4 --cutoff 400 --steps 256 --rank 16 --alpha 8 --lr 1e-2"
    words = ["--data", *(data / name / "train.json" for name in ("one", "two")), "--model", model, "--out", out]
    trained: list[str] = []

    def train(self, trial, real=sim.Probe.run) -> ProbeRun:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(str(trial))
        return real(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(sim.Probe, "run", train)
        stopped = commands.run(sim.main, *words, settings)
    assert stopped.status == 130
    assert "Run the same command again" in stopped.err
    first = (out / CELLS).read_text()
    assert first.count("\n") == 2 + first.count("software")
    answered = json.loads(commands.output(commands.run(sim.main, *words, settings, "--json")))
    assert (out / CELLS).read_text().startswith(first)
    result = json.loads((out / "tuning.json").read_text())
    assert answered["tuning"] == result
    assert f"{result['learning_rate']:.3g}" in answered["answer"]
    assert result["low"] < result["learning_rate"] < result["high"]
    assert result["cost"]["spent"] <= 25.6
    assert (result["config"]["r"], result["config"]["lora_alpha"]) == (16, 8)
    assert result["probe"]["displacement_constant"] > 0
    curve = frames.read_csv(out / "results.csv")
    assert len(curve) >= 3
    assert curve["held_out_loss"].nunique() == len(curve)
    assert math.isclose(curve["learning_rate"].iloc[1] / curve["learning_rate"].iloc[0], 3.0)


def test_held_out_records_are_reduced_to_what_the_budget_allows() -> None:
    examples = Examples(np.arange(20), np.array([0, 4, 9, 14, 20]), np.arange(20) % 4 > 0, 0, 0)
    chosen = probe.select_examples(examples, [1, 3])
    assert [chosen[index].tolist() for index in range(len(chosen))] == [[4, 5, 6, 7, 8], [14, 15, 16, 17, 18, 19]]
    assert chosen.target_counts.tolist() == examples.target_counts[[1, 3]].tolist()
    sizes = np.array([10, 20, 30, 40])
    for tokens, expected in ((100, [0, 1, 2, 3]), (60, [0, 1, 2]), (59, [0, 2]), (40, [0, 2])):
        assert probe._affordable_records(sizes, tokens).tolist() == expected
    with pytest.raises(InputError, match="39 tokens"):
        probe._affordable_records(sizes, 39)
