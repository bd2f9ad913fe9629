"""`sims.finetune` and `sims.evaluate` with prefix tuning, series adapters and in full, on a tiny checkpoint."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import checkpoint

from rora_theory.adapters import count, load_peft
from rora_theory.data.tasks import TASKS, render_instruction
from rora_theory.evaluate import samples
from rora_theory.llama import load
from sims import evaluate, finetune
from sims.common import cli

METHODS = {
    "prefix": ("--virtual-tokens", "3", "--lr", "0.1"),
    "series": ("--bottleneck", "4", "--lr", "0.03", "--targets", "down_proj"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training records, and four questions of a task."""
    folder = tmp_path_factory.mktemp("data")
    checkpoint.records(folder / "train.json", 40)
    (folder / "boolq").mkdir()
    rows = [
        {
            "instruction": render_instruction(TASKS["boolq"], f"is it {word}", ("true", "false")),
            "input": "",
            "answer": "true",
            "output": "the correct answer is true",
        }
        for word in checkpoint.WORDS[:4]
    ]
    (folder / "boolq" / "test.json").write_text(json.dumps(rows))
    return folder


def train(monkeypatch, model, data, out, *more: str) -> None:
    plain = (
        "--batch-size 8 --epochs 3 --warmup 2 --held-out 8 --evaluate-every 8 --template clean --widths 1 --cutoff 400"
    )
    command = ["--model", str(model), "--data", str(data / "train.json"), "--out", str(out), *plain.split(), *more]
    monkeypatch.setattr(sys, "argv", ["finetune", *command])
    cli.run(finetune.main)


def scores(model, data, out, *more: str) -> list[float]:
    common = ["--model", str(model), "--data-dir", str(data), "--tasks", "boolq", "--protocol", "label"]
    evaluate.main([*common, "--out", str(out), "--template", "clean", *more])
    lines = (out / samples.FILE).read_text().splitlines()
    return [value for line in lines for _, value in json.loads(line)["log_likelihoods"]]


@pytest.fixture(scope="module")
def base_scores(model, data, tmp_path_factory) -> list[float]:
    return scores(model, data, tmp_path_factory.mktemp("base") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_scored(method, model, data, base_scores, tmp_path, monkeypatch, capsys) -> None:
    train(monkeypatch, model, data, tmp_path / "run", "--method", method, *METHODS[method])
    shown = capsys.readouterr().out
    assert f"{method} on" in shown
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    base = load(str(model))
    adapter = load_peft(tmp_path / "run" / "adapter", base.config, base.params)
    own = count(adapter)
    assert manifest["trainable_parameters"] == own
    assert manifest["trainable_share"] == own / (own + sum(leaf.size for leaf in jax.tree.leaves(base.params)))
    assert f"{own:,} trainable parameters, {manifest['trainable_share']:.2%} of all" in shown
    assert {"prefix": "virtual_tokens", "series": "bottleneck"}[method] in manifest["config"]
    assert "rank" not in manifest["config"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])

    beside = scores(model, data, tmp_path / "scored", "--adapter", str(tmp_path / "run" / "adapter"))
    # Run beside the weights by default; without the adapter the same scores to float32's rounding, some 1e-5.
    assert beside != pytest.approx(base_scores, abs=0.01)


def stop_at_3(events, event, add=finetune.Metrics.add) -> None:
    if event.step == 3:
        raise KeyboardInterrupt
    add(events, event)


@pytest.mark.slow
def test_full_fine_tuning_writes_a_model(model, data, tmp_path, monkeypatch, capsys) -> None:
    """After it was stopped and went on from its checkpoint, too."""
    command = ("--method", "full", "--lr", "0.01", "--targets", "q_proj", "down_proj", "--steps", "4")
    command += ("--checkpoint-every", "2", "--held-out", "0")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Metrics, "add", stop_at_3)
        with pytest.raises(SystemExit):
            train(patch, model, data, tmp_path / "run", *command)
    train(monkeypatch, model, data, tmp_path / "run", *command)
    said = capsys.readouterr().out
    assert "resumes after step 2 of 4" in said
    assert not (tmp_path / "run" / "adapter").exists()
    after, before = (load(str(one)).params for one in (tmp_path / "run" / "merged", model))
    for path, leaf in jax.tree.leaves_with_path(after):
        names, old = [entry.key for entry in path], before
        for name in names:
            old = old[name]
        chosen = len(names) > 1 and names[1].split(".")[-1] in ("q_proj", "down_proj")
        assert np.array_equal(leaf, old) != chosen, names
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "rank" not in manifest["config"]
    share = 2 * (16 * 16 + 16 * 24) / sum(leaf.size for leaf in jax.tree.leaves(before))
    assert manifest["trainable_share"] == pytest.approx(share)


def test_bad_input_is_one_line_before_anything_is_written(model, data, tmp_path, monkeypatch, capsys) -> None:
    for more, message in {
        ("--method", "prefix", "--merge"): "merge requires method lora, dora",
        ("--method", "series", "--rank", "4"): "rank has no effect with method series, got 4",
        ("--method", "series", "--targets", "w_proj"): "'w_proj', which matches no module",
    }.items():
        with pytest.raises(SystemExit) as caught:
            train(monkeypatch, model, data, tmp_path / "run", *more)
        stderr = capsys.readouterr().err
        assert caught.value.code == 2
        assert stderr.startswith("error: ")
        assert message in stderr
        assert stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()
