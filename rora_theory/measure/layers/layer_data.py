"""Real layers with their data held fixed, and read from an .npz."""

import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.io import files

Split = Literal["train", "heldout"]
"""Tokens at which a layer is read: of the batch that gave the gradient, or of text that it does not contain."""

SPLITS: tuple[Split, ...] = get_args(Split)

LARGEST = 1 << 32
"""Bytes of the largest .npz, packed and unpacked: 4 GiB, some twenty layers of a 7B model."""

SMALLEST_NORM = 1e-12
"""Of a gradient and of a token's input."""


@dataclass(frozen=True)
class Layer:
    """One adapted layer's gradient and inputs.

    Attributes:
      name: e.g. ``model.layers.0.self_attn.q_proj``.
      grad: G = dL/dm of the full weight.
      inputs: for each of `SPLITS`, the layer's inputs at some tokens.
    """

    name: str
    grad: Float[np.ndarray, "p_out p_in"]
    inputs: dict[str, Float[np.ndarray, "tokens p_in"]]


def read_layers(path: Path) -> list[Layer]:
    """Read layers from an .npz with arrays ``NAME/grad``, ``NAME/x_train`` and ``NAME/x_heldout``, sorted by name.

    Raises:
      InputError: no such file, not an .npz, an array missing, of another shape, or not finite; names file and key.
    """
    arrays = _arrays(path)
    names = sorted({key.rpartition("/")[0] for key in arrays} - {""}, key=_natural)
    if not names:
        raise InputError(f"{path}: has no layer; accepted are keys NAME/grad, NAME/x_train, NAME/x_heldout")
    layers = []
    for name in names:
        found = {}
        width = arrays[f"{name}/grad"].shape[-1:] if f"{name}/grad" in arrays else ()
        for part in ("grad", *(f"x_{split}" for split in SPLITS)):
            key = f"{name}/{part}"
            if key not in arrays:
                raise InputError(f"{path}: {key} is missing; accepted are NAME/grad, NAME/x_train and NAME/x_heldout")
            found[part] = arrays[key]
            if found[part].ndim != 2 or found[part].shape[1:] != width or not found[part].size:
                wanted = "[p_out, p_in]" if part == "grad" else f"[tokens, {', '.join(map(str, width))}]"
                raise InputError(f"{path}: {key} has shape {list(found[part].shape)}; accepted is {wanted}, none of 0")
            _check_size(f"{path}: {key}", found[part], by_row=part != "grad")
        layers.append(Layer(name, found["grad"], {split: found[f"x_{split}"] for split in SPLITS}))
    return layers


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz in float32. What they take is read off the file's headers before any of it is unpacked."""
    accepted = "accepted is an .npz of layers' gradients and inputs"
    data = io.BytesIO(files.read_bytes(path, LARGEST, accepted=accepted.removeprefix("accepted is ")))
    try:
        with zipfile.ZipFile(data) as packed:
            total = sum(part.file_size for part in packed.infolist())
            if total > LARGEST:
                raise InputError(f"{path}: unpacks to {total:,} bytes; {accepted} of at most {LARGEST:,}")
            for part in packed.infolist():
                with packed.open(part) as member:
                    _check_header(f"{path}: {part.filename}", member, part.file_size)
        data.seek(0)
        with np.load(data, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is not a readable .npz of numbers ({error}); {accepted}") from error
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {key} is of type {array.dtype}; accepted are real numbers")
    with np.errstate(over="ignore"):  # what float32 does not hold is refused with what is not finite
        return {key: array.astype(np.float32) for key, array in arrays.items()}


def _check_header(where: str, member: Any, size: int) -> None:
    """Refuse an array whose header claims more than the file holds, which would be given memory first."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if math.prod(shape) * dtype.itemsize > size:
        raise InputError(f"{where}: claims shape {list(shape)}, but has {size:,} bytes; accepted is a whole array")


def _check_size(where: str, array: Float[np.ndarray, "rows p_in"], *, by_row: bool) -> None:
    """Refuse what is not finite, and what is so small or large that its square is no float32: a law divides by it."""
    if not np.isfinite(array).all():
        raise InputError(f"{where} holds a value that is not a finite float32; accepted are finite ones")
    norms = np.linalg.norm(array.astype(np.float64), axis=1 if by_row else None)
    low, high = float(np.min(norms)), float(np.max(norms))
    if not SMALLEST_NORM <= low <= high <= 1 / SMALLEST_NORM:
        what = f"a row of norm {low if low < SMALLEST_NORM else high:g}" if by_row else f"norm {low:g}"
        raise InputError(
            f"{where} has {what}; accepted is {SMALLEST_NORM:g} to {1 / SMALLEST_NORM:g}, whose square float32 holds"
        )


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sort key: numbers by value, so that layer 2 comes before layer 15."""
    numbers = [(part, re.fullmatch("[0-9]{1,9}", part) is not None) for part in name.split(".")]
    return [(is_number, int(part) if is_number else part) for part, is_number in numbers]
