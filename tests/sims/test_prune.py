"""`python -m sims.prune` on a tiny checkpoint: a folder that loads, its figures, going on, bad input."""

import csv
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint

from rora_theory.data.windows import read_texts, sample_windows
from rora_theory.finetune.held_out import perplexity
from rora_theory.llama import forward, load, pruning
from sims import prune
from sims.common import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    checkpoint.records(folder / "train.json", 10)
    (folder / "more.txt").write_text("the quick brown fox " * 20)
    return folder


def run(monkeypatch, model, text, out, *more: str) -> None:
    plain = "--share 0.85 --windows 10 --held-out 3 --seq 32 --batch-size 4 --layers 1"
    files = ["--text", str(text / "train.json"), str(text / "more.txt")]
    command = [*files, "--model", str(model), "--out", str(out), *plain.split(), *more]
    monkeypatch.setattr(sys, "argv", ["prune", *command])
    cli.run(prune.main)


@pytest.mark.slow
def test_a_run_leaves_a_model_and_its_figures(model, text, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, model, text, tmp_path / "run")
    shown = capsys.readouterr().out
    whole, pruned = load(str(model)), load(str(tmp_path / "run" / "model"))
    config = pruned.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (1, 2, 8)
    assert np.isfinite(forward(pruned.params, jnp.array([[1, 2, 3]]), config)).all()
    assert pruned.tokenizer.encode("fox</s>") == whole.tokenizer.encode("fox</s>")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one.params)) for one in (whole, pruned)]
    assert manifest["parameters"] == sizes
    assert manifest["share"] == sizes[1] / sizes[0] <= 0.85
    assert manifest["shape"] == {"layers": 1, "kv_heads": 1, "width": config.intermediate_size}
    for name in ("held_out", "calibration"):
        before, after = manifest[f"perplexity_{name}"]
        assert before != after
        assert min(before, after) > 1
    texts = read_texts([str(text / "train.json"), str(text / "more.txt")])
    windows, held_out = sample_windows(texts, whole.tokenizer, windows=10, held_out=3, seq=32)
    expected = {
        name: [perplexity(one.params, one.config, rows) for one in (whole, pruned)]
        for name, rows in (("held_out", held_out), ("calibration", windows))
    }
    # Each its own text's, and before is before: weights read back are those that were measured.
    assert {name: manifest[f"perplexity_{name}"] for name in expected} == {
        name: pytest.approx(pair, rel=1e-6) for name, pair in expected.items()
    }
    scores = pruning.score_parts(whole.params, pruning.calibrate(whole.params, [windows], whole.config), whole.config)
    assert f"{sizes[1]:,}" in shown
    with (tmp_path / "run" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kept"] for row in rows].count("True") == 1
    assert [float(row["influence"]) for row in rows] == pytest.approx(scores.layers.tolist(), rel=1e-6)
    best = max(rows, key=lambda row: float(row["influence"]))
    assert best["kept"] == "True"
    assert 0 < float(best["features_kept_score"]) <= 1
    assert best["heads"] == "0"
    kept = int(best["layer"])
    expected = np.asarray(whole.params["layers"]["input_layernorm"][kept])
    np.testing.assert_array_equal(pruned.params["layers"]["input_layernorm"][0], expected)

    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    run(monkeypatch, model, text, tmp_path / "run")  # again: what is there stays
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["parameters"] == sizes

    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()}
    for file in (tmp_path / "run" / "model").iterdir():  # emptied: it is no success, and is made again
        file.unlink()
    run(monkeypatch, model, text, tmp_path / "run")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()} == before
    weights = tmp_path / "run" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit):
        run(monkeypatch, model, text, tmp_path / "run")
    assert f"{weights}: was changed since the run wrote it" in capsys.readouterr().err


def test_bad_input_is_one_line_before_anything_is_written(model, text, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for more, message in {
        ("--text", str(tmp_path / "none.txt")): "none.txt: no such file",
        ("--text", str(tmp_path / "none.json")): "none.json: no such file",
        ("--text", str(tmp_path / "empty.txt")): "empty.txt: is empty",
        ("--windows", "0"): "windows must be",
        ("--windows", "1000"): "at least 1003 windows",
        ("--layers", "3"): "layers must be 1 to 2, the model's, got 3",
        ("--share", "0.1"): "share must be at least",
        ("--seq", "600"): "--seq must be at most 512, the model's max_position_embeddings, got 600",
        ("--model", str(tmp_path / "nowhere")): "nowhere",
    }.items():
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, model, text, tmp_path / "run", *more)
        stderr = capsys.readouterr().err
        assert caught.value.code == 2, more
        assert stderr.startswith("error: "), more
        assert message in stderr, more
        assert stderr.count("\n") == 1, more
        assert not (tmp_path / "run").exists(), more
