"""`python -m sims.pretrain` on a few words: a model that loads, its losses, and a repeated command."""

import hashlib
import json

import jax.numpy as jnp
import pytest
from support import commands

from rora_theory.lab.llama import count_parameters, forward, load
from sims import pretrain

WORDS = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.mark.slow
def test_a_run_writes_a_model_that_loads_and_is_complete_when_repeated(tmp_path):
    (tmp_path / "words.txt").write_text(WORDS)
    small = "--layers 1 --hidden-size 16 --intermediate-size 24 --heads 2 --context 16 --vocabulary 257 --batch-size 4"
    out = tmp_path / "run"
    run = "--steps 6 --warmup 1 --held-out 4 --evaluate-every 3"
    words = ["--data", tmp_path / "words.txt", small, run, "--out", out]
    printed = commands.output(commands.run_command(pretrain.main, *words))
    model = load(out / "model")
    assert forward(model.params, jnp.array([model.tokenizer.encode("fox")]), model.config).shape == (1, 3, 257)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["parameters"] == count_parameters(model.config)
    assert f"{manifest['parameters']:,}" in printed
    assert manifest["config"]["text_sha256"] == hashlib.sha256(json.dumps([WORDS]).encode()).hexdigest()
    validations = [row for row in commands.rows(out / "results.csv") if row["event"] == "validation"]
    assert [row["step"] for row in validations] == ["3", "6"]
    assert f"{float(validations[-1]['loss']):.4f}" in printed
    written = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert "all 6 steps are already done" in commands.output(commands.run_command(pretrain.main, *words))
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == written
