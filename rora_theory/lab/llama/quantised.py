r"""Weights held in few bits: blocks of 32 inputs of a row, each with its own scale, as GGUF files store them.

.. math:: w = d\,(q - z) + m

The codes q have 8 bits (``q8_0``) or 4 (``q4_0`` with z = 8, and ``q4_1`` with m the block's least weight), and d and m
are float16. That makes 8.5, 4.5 and 5 bits a weight. Only linear modules may have such weights. A module's weight
becomes dense where it is multiplied, and again in the backward pass, so that no more than one layer is dense at a time
(Dettmers et al. 2023, "QLoRA"). The blocks are ggml's:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

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
"""Storage of the linear modules' weights in memory: as arrays (``none``), or in blocks."""

BLOCK = 32
"""Number of weights in a block, neighbours along the inputs."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "mins"], meta_fields=["kind", "dtype"])
@dataclass(frozen=True)
class QuantisedWeight:
    """Weights in blocks: a pytree in place of an array.

    Attributes:
      codes: Codes q. For ``q8_0`` int8 [..., out, in]. Otherwise uint8 [..., out, in / 2]: byte i of a block's 16 has
        the code of the block's weight i in its low half and that of weight i + 16 in its high half.
      scales: Scales d, float16 [..., out, in / 32].
      mins: Offsets m of ``q4_1``, with the type and shape of ``scales``; None for the other kinds.
      kind: ``q8_0``, ``q4_0`` or ``q4_1``.
      dtype: Type of the dense weights.
    """

    codes: Any
    scales: Any
    mins: Any
    kind: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weights."""
        return (*self.scales.shape[:-1], BLOCK * self.scales.shape[-1])

    def dense(self) -> Float[Array, "*l o i"]:
        """Compute the weights in float32 and round them once: bit for bit those of the `gguf` package."""
        blocks = self.scales.shape
        # Codes as numbers, [..., out, blocks, 32]. Two 4-bit codes share a byte: low halves first, then high halves.
        if self.kind == "q8_0":
            codes = self.codes.reshape(*blocks, BLOCK).astype(jnp.float32)
        else:
            halves = jnp.expand_dims(self.codes.reshape(*blocks, BLOCK // 2), -2)
            shifts = jnp.array([[0], [4]], jnp.uint8).reshape((1,) * len(blocks) + (2, 1))
            codes = ((halves >> shifts) & jnp.uint8(15)).reshape(*blocks, BLOCK).astype(jnp.float32)
        if self.kind == "q4_0":
            codes = codes - 8
        # d has 11 significant bits and q at most 8, so the product is exact whether it is fused with the sum or not.
        wide = self.scales.astype(jnp.float32)[..., None] * codes
        if self.mins is not None:
            wide = wide + self.mins.astype(jnp.float32)[..., None]
        return wide.reshape(self.shape).astype(self.dtype)


def to_dense(weight: Any) -> Any:
    """Return a weight as an array, whether it is held in blocks or is an array already."""
    return weight.dense() if isinstance(weight, QuantisedWeight) else weight


def dense_params(params: Any) -> Any:
    """Return a tree of weights with all of them as arrays."""
    return jax.tree.map(to_dense, params, is_leaf=is_quantised)


def is_quantised(node: Any) -> bool:
    """Return whether a node of a tree of weights is a quantised weight, which counts as one leaf."""
    return isinstance(node, QuantisedWeight)


def abstract_weight(name: str, shape: tuple[int, ...], dtype: np.dtype, kind: str) -> QuantisedWeight:
    """Return the shapes of a weight in blocks, as `jax.ShapeDtypeStruct`.

    Raises:
      InputError: The number of inputs is not a multiple of 32.
    """
    if shape[-1] % BLOCK:
        raise InputError(
            f"quantization must be 'none' for {name}, because its {shape[-1]} inputs are not a multiple of {BLOCK}, "
            f"got {kind!r}"
        )
    # One scale for each block of 32 inputs.
    scales = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // BLOCK), np.dtype(np.float16))
    if kind == "q8_0":
        codes = jax.ShapeDtypeStruct(shape, np.dtype(np.int8))
    else:  # two codes a byte
        codes = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 2), np.dtype(np.uint8))
    return QuantisedWeight(codes, scales, scales if kind == "q4_1" else None, kind, dtype)


def quantise(rows: Float[np.ndarray, "o i"], kind: str) -> UInt8[np.ndarray, "o bytes"]:
    """Quantise weights as ggml's reference does.

    Returns:
      The blocks of each row one after the other, as a GGUF file stores them.
    """
    from gguf import GGMLQuantizationType
    from gguf import quantize as quantize_blocks

    blocks: np.ndarray = quantize_blocks(rows, GGMLQuantizationType[kind.upper()])
    return blocks


def write_layer(out: QuantisedWeight, layer: int, stored: UInt8[np.ndarray, "o bytes"]) -> None:
    """Write a GGUF file's blocks of one weight to a layer of host arrays: the same bits in another order.

    A stored block is its scale, its offset (``q4_1`` only) and its codes, one after the other.
    """
    # A block begins with its float16 numbers; the codes are the rest of it.
    halves = [out.scales] if out.mins is None else [out.scales, out.mins]
    blocks = stored.reshape(*out.scales.shape[1:], -1)
    for i, numbers in enumerate(halves):
        numbers[layer] = np.ascontiguousarray(blocks[..., 2 * i : 2 * i + 2]).view(np.float16)[..., 0]
    codes = np.ascontiguousarray(blocks[..., 2 * len(halves) :]).view(out.codes.dtype)
    out.codes[layer] = codes.reshape(out.codes.shape[1:])
