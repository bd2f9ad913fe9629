"""`python -m sims.prune` on a tiny checkpoint: a folder that loads, its figures, resuming, damaged weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import commands

from rora_theory.lab.data.windows import read_texts, sample_windows
from rora_theory.lab.finetune.held_out import perplexity
from rora_theory.lab.llama import forward, load
from sims import prune


@pytest.fixture(scope="module")
def texts(data, tmp_path_factory) -> list[str]:
    """Write files of text."""
    path = tmp_path_factory.mktemp("text") / "more.txt"
    path.write_text("the quick brown fox " * 20)
    return [str(data / "train.json"), str(path)]


@pytest.fixture(scope="module")
def command(model, texts, tmp_path_factory) -> list[object]:
    """Return the command line; its last word is the run folder."""
    small = "--share 0.85 --windows 10 --held-out 3 --seq 32 --batch-size 4"
    return ["--text", *texts, "--model", model, small, "--out", tmp_path_factory.mktemp("prune") / "run"]


@pytest.fixture(scope="module")
def printed(command) -> str:
    """Return the output of a finished run."""
    return commands.output(commands.run_command(prune.main, *command))


@pytest.mark.slow
def test_a_run_writes_a_model_and_its_key_figures(model, texts, command, printed) -> None:
    run = command[-1]
    original, pruned = load(str(model)), load(str(run / "model"))
    config = pruned.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (1, 2, 8)
    assert np.isfinite(forward(pruned.params, jnp.array([[1, 2, 3]]), config)).all()
    assert pruned.tokenizer.encode("fox</s>") == original.tokenizer.encode("fox</s>")
    manifest = json.loads((run / "manifest.json").read_text())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) for loaded in (original, pruned)]
    assert manifest["parameters"] == sizes
    assert f"{sizes[1]:,}" in printed
    assert manifest["share"] == sizes[1] / sizes[0] <= 0.85
    assert manifest["shape"] == {"layers": 1, "kv_heads": 1, "width": config.intermediate_size}
    windows, held_out = sample_windows(read_texts(texts), original.tokenizer, windows=10, held_out=3, seq=32)
    for name, rows in (("held_out", held_out), ("calibration", windows)):
        before, after = manifest[f"perplexity_{name}"]
        assert before != after
        assert min(before, after) > 1
        # Each its own text's, and before is before: weights read back are those that were measured.
        expected = [perplexity(loaded.params, loaded.config, rows) for loaded in (original, pruned)]
        assert [before, after] == pytest.approx(expected, rel=1e-6)
    rows = commands.rows(run / "results.csv")
    best = max(rows, key=lambda row: float(row["influence"]))
    assert commands.selected(rows, kept=True) == best
    assert 0 < float(best["features_kept_score"]) <= 1
    assert best["heads"] == "0"
    norm = np.asarray(original.params["layers"]["input_layernorm"][int(best["layer"])])
    np.testing.assert_array_equal(pruned.params["layers"]["input_layernorm"][0], norm)


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
def test_existing_outputs_are_kept_and_missing_ones_are_recreated(command) -> None:
    run: Path = command[-1]
    weights = run / "model" / "model.safetensors"
    manifest, written = json.loads((run / "manifest.json").read_text()), weights.stat().st_mtime_ns
    commands.output(commands.run_command(prune.main, *command))
    assert weights.stat().st_mtime_ns == written
    assert json.loads((run / "manifest.json").read_text())["parameters"] == manifest["parameters"]

    before = {file.name: file.read_bytes() for file in (run / "model").iterdir()}
    for file in (run / "model").iterdir():
        file.unlink()
    commands.output(commands.run_command(prune.main, *command))
    assert {file.name: file.read_bytes() for file in (run / "model").iterdir()} == before
