"""The check as a command on a tiny checkpoint: rows, slopes, controls, going on, batches fixed or fresh, bad input."""

import json
from pathlib import Path

import jax
import pytest
from support import checkpoint

from figures import coordinate_check as figure
from figures import style
from rora_theory.io import frames
from rora_theory.llama import load
from rora_theory.llama.weights import save_hf
from rora_theory.measure.rank_check import check as rank_check
from rora_theory.runs.reading import CELLS
from sims import coordinate_check as sim

ARGUMENTS = (
    "--ranks 2 4 16 --rules lora --optimizers adamw --targets q_proj down_proj --steps 1 3 "
    "--seeds 0 1 2 3 4 5 6 7 --batch-size 2 --held-out 6 --cutoff 160 --template clean --adam-lr 1e-5 --band 0.35"
)
SMALL = ARGUMENTS.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its tokens are bytes alone: of so many the signal leads by enough for alpha/r to be flat in this band."""
    return checkpoint.model(tmp_path_factory.mktemp("model"), words=())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return checkpoint.records(tmp_path_factory.mktemp("data") / "train.json", 40)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("check") / "run"
    sim.main(["--data", str(data), "--model", str(model), *SMALL, "--out", str(out)])
    return out


def verdict(finished, **wanted):
    slopes = frames.read_csv(finished / "slopes.csv", rank_check.SLOPE_COLUMNS)
    (row,) = slopes[(slopes[list(wanted)] == list(wanted.values())).all(axis=1)].to_dict("records")
    return row["slope"], row["verdict"]


@pytest.mark.slow
def test_rules_and_controls(finished):
    """alpha/r is flat under AdamW at the first step; kappa = 0 grows by one power more, and gaussian A shrinks."""
    wanted = {"split": "train", "step": 1, "quantity": "output"}
    for module in ("self_attn.q_proj", "mlp.down_proj", "model"):
        slope, found = verdict(finished, rule="lora", init="kaiming_uniform", module=module, **wanted)
        assert found == "flat"
        unscaled, found = verdict(finished, rule="0", module=module, **wanted)
        assert found == "grows"
        assert unscaled - slope == pytest.approx(1, abs=0.02)  # gamma enters the first Adam step once
        assert verdict(finished, init="gaussian", module=module, **wanted)[1] == "shrinks"


@pytest.mark.slow
def test_rows(finished, model):
    sizes = frames.read_csv(finished / "results.csv", rank_check.COLUMNS)
    # Of each of 2 modules: 2 gradients, output and inner on two splits, delta; of the model 3 on two splits.
    assert len(sizes) == 3 * 8 * 3 * 2 * (2 * (2 + 4 + 1) + 6)
    assert set(sizes["control"][(sizes["rule"] == "0") | (sizes["init"] == "gaussian")]) == {1}
    assert sizes["scaling"].to_numpy() == pytest.approx(2 * (8 / sizes["rank"]) ** sizes["kappa"])
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"]["model"] == model.name
    assert manifest["config"]["batches"] == "fixed"
    assert str(model.parent) not in json.dumps(manifest["config"])


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_goes_on_and_refuses_another_model(finished, model, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    lines = (finished / CELLS).read_text().splitlines(keepends=True)
    (out / CELLS).write_text("".join(lines[:-2]))
    command = ["--data", str(data), "--model", str(model), *SMALL, "--out", str(out)]
    sim.main(command)
    for name in ("results.csv", "slopes.csv"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    other = tmp_path / model.name
    loaded = load(model)
    save_hf(other, jax.tree.map(lambda a: 2 * a, loaded.params), loaded.config, tokenizer_from=model)
    with pytest.raises(SystemExit) as stopped:
        sim.main(["--data", str(data), "--model", str(other), *SMALL, "--out", str(out)])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 4", "--ranks"),
        ("--ranks 2 64", "rank"),
        ("--rules lora lora", "--rules"),
        ("--seeds 1", "--seeds"),
        ("--steps 0", "steps"),
        ("--sgd-lr -1", "--sgd-lr"),
        ("--held-out 40", "held_out must be less than the number of records, 40, got 40"),
        ("--model nowhere/at/all", "nowhere/at/all"),
        ("--targets z_proj", "z_proj"),
        ("--targets", "--targets must have 1 or more values, got 0"),
        ("--targets q_proj q_proj", "--targets must have different values, got q_proj q_proj"),
    ],
)
def test_bad_input(arguments, named, model, data, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        sim.main(["--data", str(data), "--model", str(model), *SMALL, *arguments.split(), "--out", str(out)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    assert not out.exists()


@pytest.mark.slow
def test_figures(finished, tmp_path, capsys):
    style.main(figure.draw, figure.Config(finished, out=tmp_path))
    assert len(capsys.readouterr().out.split()) == 4
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
