"""The check as a command on a tiny checkpoint: rows, slopes, controls, going on, batches fixed or fresh, bad input."""

import csv
import json
from pathlib import Path

import checkpoint
import jax
import numpy as np
import pytest

from figures import coordinate_check as figure
from figures import style
from rora_theory.llama import load
from rora_theory.llama.weights import save_hf
from sims import coordinate_check as sim

ARGUMENTS = (
    "--ranks 2 4 16 --rules lora --optimizers adamw --targets q_proj down_proj --steps 1 3 --seeds 8 --batch 2 "
    "--held-out 6 --cutoff 160 --template clean --adam-rate 1e-5 --band 0.35"
)
SMALL = ARGUMENTS.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return checkpoint.records(tmp_path_factory.mktemp("data") / "train.json", 40)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("check") / "run"
    sim.main(["--data", str(data), "--model", str(model), *SMALL, "--out", str(out)])
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def verdict(finished, **wanted):
    rows = [r for r in rows_of(finished / "slopes.csv") if all(r[name] == value for name, value in wanted.items())]
    assert len(rows) == 1
    return float(rows[0]["slope"]), rows[0]["verdict"]


def test_rules_and_controls(finished):
    """alpha/r is flat under AdamW at the first step; kappa = 0 grows by one power more, and gaussian A shrinks."""
    wanted = {"split": "train", "step": "1", "quantity": "output"}
    for module in ("self_attn.q_proj", "mlp.down_proj", "model"):
        slope, found = verdict(finished, rule="lora", init="kaiming_uniform", module=module, **wanted)
        assert found == "flat"
        unscaled, found = verdict(finished, rule="0", module=module, **wanted)
        assert found == "grows"
        assert unscaled - slope == pytest.approx(1, abs=0.02)  # gamma enters the first Adam step once
        assert verdict(finished, init="gaussian", module=module, **wanted)[1] == "shrinks"


def test_rows(finished, model):
    rows = rows_of(finished / "results.csv")
    assert tuple(rows[0]) == sim.COLUMNS
    # Of each of 2 modules: 2 gradients, output and inner on two splits, delta; of the model 3 on two splits.
    assert len(rows) == 3 * 8 * 3 * 2 * (2 * (2 + 4 + 1) + 6)
    assert {row["control"] for row in rows if row["rule"] == "0" or row["init"] == "gaussian"} == {"1"}
    for row in rows:
        assert float(row["scaling"]) == pytest.approx(2 * (8 / int(row["rank"])) ** float(row["kappa"]))
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"]["model"] == model.name
    assert str(model.parent) not in json.dumps(manifest["config"])


def test_goes_on_and_refuses_another_model(finished, model, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    lines = (finished / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join(lines[: 1 + 70 * 40]))  # all cells but the last two
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


def test_fresh_batches(model, data):
    """Fixed: one batch in every step; fresh: another in each; no held-out record is trained on."""
    loaded = load(model)
    records = sim.read_records([str(data)])
    found = {}
    for kind in ("fixed", "fresh"):
        config = sim.Config(data=(str(data),), batches=kind, batch=2, held_out=6, cutoff=160, template="clean", seeds=2)
        found[kind] = sim.prepare(config, records, loaded)
    fixed, fresh = found["fixed"], found["fresh"]
    np.testing.assert_array_equal(fixed.batch(0, 0).inputs, fixed.batch(0, 3).inputs)
    assert not np.array_equal(fresh.batch(0, 0).inputs, fresh.batch(0, 3).inputs)
    assert not np.array_equal(fixed.batch(0, 0).inputs, fixed.batch(1, 0).inputs)
    trained = {row.tobytes() for step in range(17) for row in fresh.batch(0, step).inputs}
    assert len(trained) == 34
    for row, weights in zip(fresh.held_out[0].inputs, fresh.held_out[0].weights, strict=True):
        assert row.tobytes() not in trained
        first = int(np.argmax(weights))  # what is read begins where the prompt's common opening ends
        assert any(row[:first].tobytes() == other[: first * row.itemsize] for other in trained)
        assert not any(row[: first + 1].tobytes() == other[: (first + 1) * row.itemsize] for other in trained)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 4", "--ranks"),
        ("--ranks 2 64", "rank"),
        ("--rules lora lora", "--rules"),
        ("--seeds 1", "--seeds"),
        ("--steps 0", "steps"),
        ("--sgd-rate -1", "--sgd-rate"),
        ("--held-out 40", "validation"),
        ("--model nowhere/at/all", "nowhere/at/all"),
        ("--targets z_proj", "z_proj"),
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


def test_figures(finished, tmp_path, capsys):
    style.main(figure.draw, figure.Config(finished, out=tmp_path))
    assert len(capsys.readouterr().out.split()) == 4
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
