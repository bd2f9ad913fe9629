"""A file of real layers is read, or refused in one line before memory is allocated."""

import os
from pathlib import Path

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.laws.layers import layer_data

PARTS = ("grad", "x_train", "x_heldout")


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).normal(size=(3, 4, 5))
    return {f"layer/{part}": changed.get(part, value) for part, value in zip(PARTS, values, strict=True)}


def test_layers_are_read_in_float32(tmp_path: Path) -> None:
    np.savez(path := tmp_path / "a.npz", **arrays())
    (layer,) = layer_data.read_layers(path)
    assert (layer.name, layer.grad.dtype, sorted(layer.inputs)) == ("layer", np.float32, ["heldout", "train"])
    np.testing.assert_array_equal(layer.inputs["train"], arrays()["layer/x_train"].astype(np.float32))


ONES = np.ones((4, 5))


def test_layers_are_in_the_order_of_their_numbers_whatever_else_is_in_a_name(tmp_path: Path) -> None:
    names = ["layers.2", "layers.10", "layers.²", "layers." + "9" * 5000]
    np.savez(path := tmp_path / "a.npz", **{f"{name}/{part}": ONES for name in names[::-1] for part in PARTS})
    order = [layer.name for layer in layer_data.read_layers(path)]
    assert sorted(order) == sorted(names)
    assert order.index("layers.2") + 1 == order.index("layers.10")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": 0 * ONES}, "layer/grad .*1e-12 to 1e\\+12.* got 0$"),
        ({"grad": 1e-30 * ONES}, "layer/grad .* got 4.4.*e-30$"),
        ({"grad": 1e30 * ONES}, "layer/grad .* got 4.4.*30$"),
        ({"x_train": ONES * [[1], [1], [0], [1]]}, "layer/x_train .*rows.* got 0$"),
        ({"x_heldout": ONES * [[1], [1], [1e-25], [1]]}, "layer/x_heldout .*rows.* got 2.2.*e-25$"),
        ({"x_train": 1e200 * ONES}, "layer/x_train .*finite"),
        ({"grad": np.float64(1)}, r"layer/grad .*\[p_out, p_in\].* got \[\]$"),
        ({"x_train": np.float64(1)}, r"layer/x_train .*\[tokens, 5\].* got \[\]$"),
        ({"grad": np.ones((0, 5))}, r"layer/grad .* got \[0, 5\]$"),
        ({"grad": ONES.astype(complex)}, "layer/grad .* complex128$"),
        ({"grad": np.full((4, 5), "a")}, "layer/grad .* <U1$"),
        ({"grad": np.full((4, 5), None)}, "not a readable .npz"),
    ],
)
def test_invalid_arrays_are_refused(tmp_path: Path, changed: dict, message: str) -> None:
    np.savez(path := tmp_path / "a.npz", **arrays(**changed))
    with pytest.raises(InputError, match=f"a.npz: {message}"):
        layer_data.read_layers(path)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "cut.npz", **arrays())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    np.save(tmp_path / "one.npz.npy", np.ones(3))
    for name, message in (
        ("none.npz", "no such file"),
        ("pipe.npz", "is not a regular file"),
        ("text.npz", "not a readable .npz"),
        ("cut.npz", "not a readable .npz"),
        ("one.npz.npy", "not a readable .npz"),
        ("../../../../../../../../dev/zero", "is not a regular file"),
    ):
        with pytest.raises(InputError, match=rf"{message}.*an .npz of layers' gradients and inputs"):
            layer_data.read_layers(tmp_path / name)
