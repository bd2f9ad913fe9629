"""Gradients and inputs of real layers, and their reader for .npz files."""

import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.runs import files

Split = Literal["train", "heldout"]
"""Batch of the tokens at which a layer's inputs are sampled: the batch of the gradient, or other text."""

SPLITS: tuple[Split, ...] = get_args(Split)

MIN_NORM = 1e-12
"""Smallest norm of a gradient and of a token's input."""


@dataclass(frozen=True)
class Layer:
    """Gradient and inputs of one linear module.

    Attributes:
      name: Name of the module, for example ``model.layers.0.self_attn.q_proj``.
      grad: Gradient G = dL/dm of the full weight m.
      inputs: Inputs of the module at sampled tokens, for each of `SPLITS`.
    """

    name: str
    grad: Float[np.ndarray, "p_out p_in"]
    inputs: dict[str, Float[np.ndarray, "tokens p_in"]]


def read_layers(path: Path) -> list[Layer]:
    """Read layers from an .npz with arrays ``NAME/grad``, ``NAME/x_train`` and ``NAME/x_heldout``, sorted by name.

    Args:
      path: File with an array [p_out, p_in] and two arrays [tokens, p_in] for each layer.

    Returns:
      The layers in natural order of their names, in float32.

    Raises:
      InputError: If the file is missing or no .npz, or if an array is missing, has a wrong shape or is not finite.
    """
    arrays = _load_arrays(path)
    # Layers by the common part of their keys, in natural order (2 before 10).
    names = sorted({key.rpartition("/")[0] for key in arrays} - {""}, key=_natural_key)
    if not names:
        raise InputError(f"{path}: no layer in the file. Its keys must be NAME/grad, NAME/x_train and NAME/x_heldout.")
    layers = []
    for name in names:
        layer_arrays = {}
        # Number of inputs, which the gradient and both arrays of inputs must share.
        width = arrays[f"{name}/grad"].shape[-1:] if f"{name}/grad" in arrays else ()
        # Check the gradient and the inputs of each split.
        for suffix in ("grad", *(f"x_{split}" for split in SPLITS)):
            key = f"{name}/{suffix}"
            if key not in arrays:
                raise InputError(
                    f"{path}: {key} is missing. Each layer needs NAME/grad, NAME/x_train and NAME/x_heldout."
                )
            array = arrays[key]
            if array.ndim != 2 or array.shape[1:] != width or not array.size:
                expected = "[p_out, p_in]" if suffix == "grad" else f"[tokens, {', '.join(map(str, width))}]"
                raise InputError(f"{path}: {key} must have the shape {expected} without zeros, got {list(array.shape)}")
            _check_norms(f"{path}: {key}", array, by_row=suffix != "grad")
            layer_arrays[suffix] = array
        layers.append(Layer(name, layer_arrays["grad"], {split: layer_arrays[f"x_{split}"] for split in SPLITS}))
    return layers


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Load the arrays of an .npz in float32."""
    expected = "an .npz of layers' gradients and inputs"
    data = io.BytesIO(files.read_bytes(path, accepted=expected))
    try:
        with np.lib.npyio.NpzFile(data, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz of numbers ({error}). Expected {expected}.") from error
    # Integers and floats of any width are accepted, and converted to float32.
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {key} must hold real numbers, got the type {array.dtype}")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused later
        return {key: array.astype(np.float32) for key, array in arrays.items()}


def _check_norms(where: str, array: Float[np.ndarray, "rows p_in"], *, by_row: bool) -> None:
    """Refuse values that are not finite, and norms with squares outside float32, since laws divide by them."""
    if not np.isfinite(array).all():
        raise InputError(f"{where} must be finite in float32, got a value that is not")
    norms = np.linalg.norm(array.astype(np.float64), axis=1 if by_row else None)
    low, high = float(np.min(norms)), float(np.max(norms))
    if not MIN_NORM <= low <= high <= 1 / MIN_NORM:
        norm = low if low < MIN_NORM else high
        subject = "rows with a norm" if by_row else "a norm"
        raise InputError(
            f"{where} must have {subject} from {MIN_NORM:g} to {1 / MIN_NORM:g}, so that float32 holds its square, "
            f"got {norm:g}"
        )


def _natural_key(name: str) -> list[tuple[bool, int | str]]:
    """Return a sort key that compares numbers by value, so that layer 2 comes before layer 15."""
    key: list[tuple[bool, int | str]] = []
    for part in name.split("."):
        is_number = re.fullmatch("[0-9]{1,9}", part) is not None
        # The flag comes first, because numbers and strings cannot be compared.
        key.append((is_number, int(part) if is_number else part))
    return key
