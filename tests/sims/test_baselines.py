"""`sims.finetune` and `sims.evaluate` with prefix tuning and full fine-tuning, on a tiny checkpoint."""

import json

import jax
import numpy as np
import pytest
from support import commands

from rora_theory.lab.evaluate import samples
from rora_theory.lab.finetune.checkpoints import Checkpoints
from rora_theory.lab.llama import load
from sims import evaluate, finetune

METHODS = {
    "prefix": "--virtual-tokens 3 --lr 0.1",
    "full": "--lr 0.01 --targets q_proj down_proj --steps 4 --checkpoint-every 2 --held-out 0",
}
ARGUMENTS = "--batch-size 8 --epochs 3 --warmup 2 --held-out 8 --evaluate-every 8 --template clean --widths 1"


def train(model, data, out, method: str, more: str = "") -> commands.Ended:
    words = f"{ARGUMENTS} --cutoff 400 --method {method} {METHODS[method]}"
    files = ["--model", model, "--data", data / "train.json", "--out", out]
    return commands.run_command(finetune.main, *files, words, more)


def scores(model, data, out, *more: object) -> list[float]:
    words = ["--model", model, "--data-dir", data, "--tasks boolq --protocol label --out", out, *more]
    commands.output(commands.run_command(evaluate.main, *words, "--template clean"))
    lines = (out / samples.FILE).read_text().splitlines()
    return [value for line in lines for _, value in json.loads(line)["log_likelihoods"]]


@pytest.mark.slow
def test_a_prefix_is_trained_saved_and_scored(model, data, tmp_path) -> None:
    """Commands work the same with every method; `test_sweep` tests the others."""
    printed = commands.output(train(model, data, tmp_path / "run", "prefix"))
    assert "prefix on" in printed
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    trainable = 2 * 3 * 2 * 8  # keys and values of two layers
    assert manifest["trainable_parameters"] == trainable
    assert f"{trainable:,} trainable parameters of " in printed
    assert f"({manifest['trainable_share']:.2%})" in printed
    assert "by XLA's analysis" in printed
    assert "virtual_tokens" in manifest["config"]
    assert "rank" not in manifest["config"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])

    adapted = scores(model, data, tmp_path / "scored", "--adapter", tmp_path / "run" / "adapter")
    # Run beside the weights by default; without the adapter the same scores to float32's rounding, some 1e-5.
    assert adapted != pytest.approx(scores(model, data, tmp_path / "base"), abs=0.01)


def stop_at_3(events, event, add=finetune.Metrics.add) -> None:
    if event.step == 3:
        raise KeyboardInterrupt
    add(events, event)


@pytest.mark.slow
def test_full_fine_tuning_writes_a_model(model, data, tmp_path, monkeypatch) -> None:
    """This includes a run that resumed from its checkpoint."""
    run, close, closed = tmp_path / "run", Checkpoints.close, []
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Metrics, "add", stop_at_3)
        patch.setattr(Checkpoints, "close", lambda self: (closed.append(self.latest), close(self)))
        assert train(model, data, run, "full").status == 130
    assert closed == [2], "an interrupted run ends after its checkpoint is written"
    assert "resumes after step 2 of 4" in commands.output(train(model, data, run, "full"))
    assert not (run / "adapter").exists()
    after, before = (load(str(path)).params for path in (run / "merged", model))
    is_changed = jax.tree.map(lambda new, old: not np.array_equal(new, old), after, before)
    changed = {tuple(entry.key for entry in path) for path, value in jax.tree.leaves_with_path(is_changed) if value}
    assert changed == {("layers", name, "weight") for name in ("self_attn.q_proj", "mlp.down_proj")}
    manifest = json.loads((run / "manifest.json").read_text())
    assert "rank" not in manifest["config"]
    share = 2 * (16 * 16 + 16 * 24) / sum(leaf.size for leaf in jax.tree.leaves(before))
    assert manifest["trainable_share"] == pytest.approx(share)
