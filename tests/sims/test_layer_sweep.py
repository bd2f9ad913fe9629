"""The sweep over real layers as a user runs it: measurement against the law, and the figure."""

from pathlib import Path

import numpy as np
import pytest
from support import commands

from figures import layers_vs_rank, style
from rora_theory import laws
from rora_theory.laws.layers import layer_grid
from rora_theory.laws.layers.layer_data import read_layers
from rora_theory.optimizers import OPTIMIZERS
from rora_theory.runs import frames
from sims import layer_sweep

pytestmark = pytest.mark.usefixtures("optimised")  # many draws


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


def sweep(layers: Path, out: Path, words: str) -> str:
    return commands.output(commands.run_command(layer_sweep.main, "--layers", layers, "--out", out, words))


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_layers_against_the_law(layers: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "run", "--ranks 1 8 32 --relative-error 0.02"
    printed = sweep(layers, out, words)
    assert "adam, A kaiming_uniform, heldout tokens: crossing rank r*" in printed
    results = frames.read_csv(out / "results.csv", layer_grid.COLUMNS)
    assert len(results) == 2 * 3 * 2 * 2 * 3  # layers x ranks x optimizers x splits x rules
    assert ((results["estimate"] - results["exact"]) / results["standard_error"]).abs().max() < 5
    assert (results["standard_error"] <= 0.02 * results["estimate"]).all()
    assert (frames.read_csv(out / layer_grid.CROSSINGS)["crossing_rank"] >= 1).all()
    before = (out / "results.csv").read_bytes()
    assert sweep(layers, out, words) == printed, "the finished run is printed again"
    assert (out / "results.csv").read_bytes() == before
    style.main(layers_vs_rank.draw_layers_vs_rank, layers_vs_rank.LayersVsRankOptions(out))
    assert (out / "layers_vs_rank.svg").stat().st_size > 1000


@pytest.mark.slow
def test_one_rank_has_a_crossing_rank_and_no_exponent(layers: Path, tmp_path: Path) -> None:
    printed = sweep(layers, tmp_path / "run", "--ranks 4 --inits normal gaussian --draws 64")
    assert set(frames.read_csv(tmp_path / "run" / "results.csv")["init"]) == {"normal", "gaussian"}
    assert "sgd, A gaussian, train tokens: crossing rank r*" in printed
    assert "nan" not in printed


@pytest.mark.parametrize(
    ("name", "value", "message"), [("grad", np.ones((6, 23)), "shape"), ("x_heldout", None, "is missing")]
)
def test_bad_layers(layers: Path, tmp_path: Path, name: str, value: np.ndarray | None, message: str) -> None:
    """The message names the file and its array; the tests of the layers' reader have other invalid arrays."""
    with np.load(layers) as saved:
        arrays = dict(saved) | {f"model.layers.10.self_attn.q_proj/{name}": value}
    bad = tmp_path / "bad.npz"
    np.savez(bad, **{key: array for key, array in arrays.items() if array is not None})
    ended = commands.run_command(layer_sweep.main, "--layers", bad, "--out", tmp_path / "run")
    assert "bad.npz" in commands.refusal(ended)
    assert message in ended.err


@pytest.mark.slow
def test_real_layers(layer_data: Path) -> None:
    """The regime of real layers of a model, computed from the law, has the published figures."""
    real_layers = read_layers(layer_data)
    assert len(real_layers) == 9
    for layer in real_layers:
        for x in layer.inputs.values():
            sgd, adam = (float(np.median(laws.crossing_rank(layer.grad, x, optimizer=name))) for name in OPTIMIZERS)
            assert 1 <= sgd < 64
            assert sgd < adam < 64
