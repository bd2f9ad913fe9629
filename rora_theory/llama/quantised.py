r"""Weights held in few bits: blocks of 32 inputs of a row, each with its own scale, as GGUF files have them.

.. math:: w = d\,(q - z) + m

with codes q of 8 bits (``q8_0``) or 4 (``q4_0``, whose z is 8; ``q4_1``, whose m is the block's least weight) and d, m
in float16: 8.5, 4.5 and 5 bits a weight. A model's linear modules may have them; it makes a module's weight dense where
it is multiplied, and again in the backward pass, so that no more than one layer is ever dense (Dettmers et al. 2023,
"QLoRA"). Blocks are ggml's: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rora_theory.errors import InputError

Quantization = Literal["none", "q8_0", "q4_0", "q4_1"]

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
"""How the weights of linear modules are held: as they are multiplied, or in blocks."""

BLOCK = 32
"""Weights of a block, neighbours along the inputs."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "mins"], meta_fields=["kind", "dtype"])
@dataclass(frozen=True)
class Quantised:
    """Weights in blocks: a pytree that stands where the array would.

    Attributes:
      codes: int8 [..., out, in] of ``q8_0``, else uint8 [..., out, in / 2]: byte i of a block's 16 has the code of its
        weight i in its low half and that of weight i + 16 in its high one.
      scales: float16 [..., out, in / 32].
      mins: float16 like ``scales`` of ``q4_1``; None of the others.
      kind: ``q8_0``, ``q4_0`` or ``q4_1``.
      dtype: of the dense weights.
    """

    codes: Any
    scales: Any
    mins: Any
    kind: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weights."""
        return (*self.scales.shape[:-1], BLOCK * self.scales.shape[-1])

    def dense(self) -> Float[Array, "*l o i"]:
        """The weights, computed in float32 and rounded once: bit for bit those of the `gguf` package."""
        blocks = self.scales.shape
        if self.kind == "q8_0":
            codes = self.codes.reshape(*blocks, BLOCK).astype(jnp.float32)
        else:
            halves = jnp.expand_dims(self.codes.reshape(*blocks, BLOCK // 2), -2)
            shifts = jnp.array([[0], [4]], jnp.uint8).reshape((1,) * len(blocks) + (2, 1))
            codes = ((halves >> shifts) & jnp.uint8(15)).reshape(*blocks, BLOCK).astype(jnp.float32)
        if self.kind == "q4_0":
            codes = codes - 8
        # d has 11 significant bits and q at most 8: the product is exact, fused with the sum or not.
        wide = self.scales.astype(jnp.float32)[..., None] * codes
        if self.mins is not None:
            wide = wide + self.mins.astype(jnp.float32)[..., None]
        return wide.reshape(self.shape).astype(self.dtype)


def dense(weight: Any) -> Any:
    """A weight as an array, whether it is held in blocks or is one."""
    return weight.dense() if isinstance(weight, Quantised) else weight


def dense_params(params: Any) -> Any:
    """A tree of weights with all of them as arrays."""
    return jax.tree.map(dense, params, is_leaf=is_quantised)


def is_quantised(node: Any) -> bool:
    """Whether a node of a tree of weights is one held in blocks: a leaf, where weights are counted or named."""
    return isinstance(node, Quantised)


def check_quantization(kind: object) -> None:
    """Raise `InputError` for what is none of `QUANTIZATIONS`."""
    if kind not in QUANTIZATIONS:
        raise InputError(f"quantization is {kind!r}; accepted is {', '.join(QUANTIZATIONS)}")


def abstract(what: str, shape: tuple[int, ...], dtype: np.dtype, kind: str) -> Quantised:
    """The blocks of weights of this shape, as `jax.ShapeDtypeStruct`.

    Args:
      what: names the module.

    Raises:
      InputError: a number of inputs that is no multiple of 32.
    """
    if shape[-1] % BLOCK:
        raise InputError(
            f"quantization is {kind!r} and {what} has {shape[-1]} inputs; accepted are multiples of {BLOCK}, or none"
        )
    numbers = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // BLOCK), np.dtype(np.float16))
    codes = (shape, np.int8) if kind == "q8_0" else ((*shape[:-1], shape[-1] // 2), np.uint8)
    mins = numbers if kind == "q4_1" else None
    return Quantised(jax.ShapeDtypeStruct(codes[0], np.dtype(codes[1])), numbers, mins, kind, dtype)


def random(key: Any, like: Quantised, deviation: float) -> Quantised:
    """Random blocks of the shapes of `abstract`: uniform codes, one scale, weights of this standard deviation."""
    count = 256 if like.kind == "q8_0" else 16
    spread = math.sqrt((count**2 - 1) / 12)
    bits = jax.random.bits(key, like.codes.shape, jnp.uint8)
    scales = jnp.full(like.scales.shape, deviation / spread, jnp.float16)
    mins = None if like.mins is None else -7.5 * scales
    return Quantised(jax.lax.bitcast_convert_type(bits, like.codes.dtype), scales, mins, like.kind, like.dtype)


def quantise(rows: Float[np.ndarray, "o i"], kind: str) -> UInt8[np.ndarray, "o bytes"]:
    """The blocks of a file, a row's one behind the other, that ggml's reference makes of these weights."""
    from gguf import GGMLQuantizationType
    from gguf import quantize as blocks_of

    found: np.ndarray = blocks_of(rows, GGMLQuantizationType[kind.upper()])
    return found


def fill(out: Quantised, layer: int, blocks: UInt8[np.ndarray, "o bytes"]) -> None:
    """Write a file's blocks of one weight to a layer of host arrays: the same bits in another order."""
    parts = [out.scales] if out.mins is None else [out.scales, out.mins]
    shape = out.scales.shape[1:]
    each = blocks.reshape(*shape, -1)
    for i, numbers in enumerate(parts):
        numbers[layer] = np.ascontiguousarray(each[..., 2 * i : 2 * i + 2]).view(np.float16)[..., 0]
    codes = np.ascontiguousarray(each[..., 2 * len(parts) :]).view(out.codes.dtype)
    out.codes[layer] = codes.reshape(out.codes.shape[1:])
