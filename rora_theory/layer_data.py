"""Real layers with their data held fixed: read from an .npz, and sampled by adapters really drawn and stepped."""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import first_step, inits
from rora_theory.errors import InputError
from rora_theory.laws import Optimizer

SPLITS = ("train", "heldout")
"""Tokens of the batch that gave the gradient, and tokens of other text."""

_DRAW_ROWS = 4096
"""Rows of A that a block draws (all its adapters together), at least one adapter."""


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


def read(path: Path) -> list[Layer]:
    """Read layers from an .npz with arrays ``NAME/grad``, ``NAME/x_train`` and ``NAME/x_heldout``, sorted by name.

    Raises:
      InputError: no such file, not an .npz, an array missing, of another shape, or not finite; names file and key.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key], np.float32) for key in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; accepted is an .npz of layers' gradients and inputs") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is not a readable .npz of numbers ({error})") from error
    names = sorted({key.rpartition("/")[0] for key in arrays} - {""}, key=_natural)
    if not names:
        raise InputError(f"{path}: has no layer; accepted are keys NAME/grad, NAME/x_train, NAME/x_heldout")
    layers = []
    for name in names:
        found = {}
        width = arrays[f"{name}/grad"].shape[-1] if f"{name}/grad" in arrays else 0
        for part in ("grad", *(f"x_{split}" for split in SPLITS)):
            key = f"{name}/{part}"
            if key not in arrays:
                raise InputError(f"{path}: {key} is missing; accepted are NAME/grad, NAME/x_train and NAME/x_heldout")
            found[part] = arrays[key]
            if found[part].ndim != 2 or found[part].shape[1] != width or not found[part].size:
                raise InputError(f"{path}: {key} has shape {found[part].shape}; accepted is [rows, {width}]")
            if not np.isfinite(found[part]).all():
                raise InputError(f"{path}: {key} holds a value that is not finite")
        layers.append(Layer(name, found["grad"], {split: found[f"x_{split}"] for split in SPLITS}))
    return layers


def mean_squares(
    layer: Layer,
    key: PRNGKeyArray,
    *,
    rank: int,
    steps: Sequence[tuple[Optimizer, float]],
    learning_rate: float,
    init: inits.Init,
    epsilon: float,
) -> Iterator[Float[np.ndarray, "adapters steps splits"]]:
    """Without end, blocks of adapters: the mean of w_i^2 over tokens and outputs after one step of each adapter.

    Every adapter is drawn, its loss <G, dM> differentiated, stepped with optax and read at the layer's inputs.

    Args:
      layer: gradient and inputs.
      key: of the stream; block i draws from ``fold_in(key, i)``.
      rank: of the adapters.
      steps: optimizer and scaling gamma of each first step that is taken from one drawn A.
      learning_rate, init, epsilon: of the step.
    """
    adapters = max(1, _DRAW_ROWS // rank)
    data = jax.device_put((layer.grad, tuple(layer.inputs[split] for split in SPLITS)))
    scalings = tuple(jnp.float32(scaling) for _, scaling in steps)
    names = tuple(name for name, _ in steps)
    block = 0
    ahead = None
    while True:
        following = _block(
            jax.random.fold_in(key, block),
            *data,
            scalings,
            jnp.float32(learning_rate),
            names=names,
            rank=rank,
            adapters=adapters,
            init=init,
            epsilon=epsilon,
        )
        if ahead is not None:
            yield np.asarray(ahead, np.float64)
        ahead, block = following, block + 1


@partial(jax.jit, static_argnames=("names", "rank", "adapters", "init", "epsilon"))
def _block(
    key: PRNGKeyArray,
    grad: Array,
    inputs: tuple[Array, ...],
    scalings: tuple[Array, ...],
    learning_rate: Array,
    *,
    names: tuple[Optimizer, ...],
    rank: int,
    adapters: int,
    init: inits.Init,
    epsilon: float,
) -> Float[Array, "adapters steps splits"]:
    p_out, p_in = grad.shape
    optimizers = {name: first_step.optimizer(name, learning_rate, epsilon=epsilon) for name in set(names)}

    def one(adapter_key: PRNGKeyArray) -> Array:
        lora_A = inits.draw(adapter_key, init, rank=rank, p_in=p_in)
        found = []
        for name, scaling in zip(names, scalings, strict=True):
            step = first_step.run(
                lambda dm: dm.inner(grad), lora_A, p_out=p_out, scaling=scaling, optimizer=optimizers[name]
            )
            found.append(jnp.stack([_mean_square(step, x) for x in inputs]))
        return jnp.stack(found)

    return jax.vmap(one)(jax.random.split(key, adapters))


def _mean_square(step: first_step.Increment, x: Float[Array, "tokens p_in"]) -> Float[Array, ""]:
    """Mean of w_i^2 over tokens and outputs, w = gamma B A x.

    At a low rank sum w^2 = gamma^2 <(A X^T)(A X^T)^T, B^T B> costs less than w itself, which is tokens x p_out numbers.
    """
    (tokens, p_out), rank = (x.shape[0], step.lora_B.shape[0]), step.lora_A.shape[0]
    if rank * (tokens + p_out) >= tokens * p_out:
        return jnp.mean(step(x) ** 2)
    inner = jnp.einsum("ti,ri->tr", x, step.lora_A)
    grams = jnp.vdot(jnp.einsum("tr,ts->rs", inner, inner), jnp.einsum("or,os->rs", step.lora_B, step.lora_B))
    return step.scaling**2 * grams / (tokens * p_out)


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sort key: numbers by value, so that layer 2 comes before layer 15."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
