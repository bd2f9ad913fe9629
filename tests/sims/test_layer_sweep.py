"""The sweep over real layers as a user runs it: measurement against the law, bad input, the figure."""

from pathlib import Path

import numpy as np
import pytest

from figures import layers_vs_rank, style
from rora_theory.io import frames
from rora_theory.measure.layers import layer_grid
from rora_theory.optimizers import OPTIMIZERS
from rora_theory.theory import laws
from sims import layer_sweep

pytestmark = pytest.mark.usefixtures("optimised")  # many draws


def run(*arguments: object) -> None:
    layer_sweep.main(list(map(str, arguments)))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that the command ends with, status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.10.self_attn.q_proj"):
        x = rng.standard_normal((12, 24)) + 0.5
        arrays |= {f"{name}/grad": rng.standard_normal((6, 12)) @ x, f"{name}/x_train": x}
        arrays |= {f"{name}/x_heldout": rng.standard_normal((9, 24)) + 0.5}
    path = tmp_path / "layers.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_layers_against_the_law(layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--layers", layers, "--ranks", 1, 8, 32, "--out", out, "--relative-error", 0.02]
    run(*arguments)
    first = capsys.readouterr().out
    assert "adam, A kaiming_uniform, heldout tokens: crossing rank r*" in first
    results = frames.read_csv(out / "results.csv", layer_grid.COLUMNS)
    assert len(results) == 2 * 3 * 2 * 2 * 3  # layers x ranks x optimizers x splits x rules
    assert ((results["estimate"] - results["exact"]) / results["standard_error"]).abs().max() < 5
    assert (results["standard_error"] <= 0.02 * results["estimate"]).all()
    assert (frames.read_csv(out / layer_grid.CROSSINGS)["crossing_rank"] >= 1).all()
    before = (out / "results.csv").read_bytes()
    run(*arguments)  # it is finished: printed again
    assert capsys.readouterr().out == first
    assert (out / "results.csv").read_bytes() == before
    style.main(layers_vs_rank.draw, layers_vs_rank.Config(out))
    assert (out / "layers_vs_rank.svg").stat().st_size > 1000


@pytest.mark.slow
def test_one_rank_has_a_crossing_rank_and_no_exponent(
    layers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layers", layers, "--ranks", 4, "--inits", "normal", "gaussian", "--draws", 64]
    run(*arguments, "--out", tmp_path / "run")
    assert set(frames.read_csv(tmp_path / "run" / "results.csv")["init"]) == {"normal", "gaussian"}
    shown = capsys.readouterr().out
    assert "sgd, A gaussian, train tokens: crossing rank r*" in shown
    assert "nan" not in shown


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grad", np.ones((6, 23)), "shape"),
        ("x_train", np.full((3, 24), np.nan), "must be finite in float32"),
        ("x_heldout", None, "is missing"),
    ],
)
def test_bad_layers(
    layers: Path, tmp_path: Path, key: str, value: np.ndarray | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(layers) as data:
        arrays = {name: data[name] for name in data.files}
    arrays[f"model.layers.10.self_attn.q_proj/{key}"] = value
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    error = refused(capsys, "--layers", path, "--out", tmp_path / "run")
    assert said in error
    assert "bad.npz" in error


@pytest.mark.slow
def test_real_layers(layer_data: Path) -> None:
    """Real layers of a real model: their regime, from the law, with the figures the README quotes."""
    from rora_theory.measure.layers.layer_data import read_layers

    found = read_layers(layer_data)
    assert len(found) == 9
    for layer in found:
        for x in layer.inputs.values():
            sgd, adam = (float(np.median(laws.crossing_rank(layer.grad, x, optimizer=name))) for name in OPTIMIZERS)
            assert 1 <= sgd < 64
            assert sgd < adam < 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "--layers"),
        ("--layers nowhere.npz", "nowhere.npz"),
        ("--layers nowhere.npz --p-in 64", "--p-in"),
        ("--layers nowhere.npz --sampler reduced", "--sampler"),
        ("--layers nowhere.npz --ranks 0", "rank"),
    ],
)
def test_bad_arguments(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments.split())
