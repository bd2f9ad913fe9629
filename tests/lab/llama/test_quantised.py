"""Quantised weights: their values, their sources, and refused files."""

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from support.harness import TOKENIZER
from support.tiny import WIDE

from rora_theory.errors import InputError
from rora_theory.lab.adapters import FullConfig
from rora_theory.lab.llama import Model, ModelSource, abstract_params, init_params, pruning
from rora_theory.lab.llama.quantised import (
    QUANTIZATIONS,
    abstract_weight,
    dense_params,
    quantise,
    to_dense,
    write_layer,
)
from rora_theory.lab.llama.weights import build_params, load_hf, save_hf

KINDS = QUANTIZATIONS[1:]


def weights_of_all_sizes(shape, seed=0):
    """Return rows of every size that a float16 scale allows, down to subnormal numbers, and one of zeros."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-7, 4, (*shape[:-1], 1))
    sizes[0] = 0
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def to_layer(blocks, kind, shape, dtype):
    """Return a file's blocks as one layer of weights in memory."""
    out = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract_weight("a", (1, *shape), jnp.dtype(dtype), kind))
    write_layer(out, 0, blocks)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_equal_those_of_gguf_bit_for_bit(kind):
    """This includes random bits, which no file has, and one rounding in bfloat16."""
    block_type, shape = Type[kind.upper()], (40, 96)
    quantised_blocks = quantise(weights_of_all_sizes(shape), kind)
    bits = np.random.default_rng(1).integers(0, 256, quantised_blocks.shape).astype(np.uint8)
    scales = bits.reshape(40, 3, -1)[..., : 4 if kind == "q4_1" else 2].view(np.uint16)
    scales &= np.uint16(0xBFFF)  # of which none is infinite
    for blocks in (quantised_blocks, bits):
        expected = gguf.dequantize(blocks, block_type)
        for dtype in (jnp.float32, jnp.bfloat16):
            dense = jax.jit(to_dense)(to_layer(blocks, kind, shape, dtype))
            assert dense.shape == (1, *shape)
            assert dense.dtype == dtype
            reference = expected.astype(dtype)
            unsigned = np.uint32 if dtype == jnp.float32 else np.uint16
            zeros = (np.asarray(dense[0]) == 0) & (reference == 0)  # of either sign
            same = np.asarray(dense[0]).view(unsigned) == reference.view(unsigned)
            assert np.all(same | zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_folder_are_quantised_on_loading_and_saved_dense(kind, draw_params, tmp_path):
    """The result is that of ggml's reference for the weights in float32, before they are rounded to the dtype."""
    plain = draw_params(WIDE)
    save_hf(tmp_path / "a", plain, WIDE)
    blocks = load_hf(tmp_path / "a", WIDE, jnp.bfloat16, quantization=kind)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        for layer in range(2):
            weight, block_type = np.asarray(plain["layers"][name]["weight"][layer]), Type[kind.upper()]
            expected = gguf.dequantize(gguf.quantize(weight, block_type), block_type).astype(jnp.bfloat16)
            np.testing.assert_array_equal(blocks["layers"][name]["weight"].dense()[layer], expected)
    np.testing.assert_array_equal(blocks["embed_tokens"], plain["embed_tokens"].astype(jnp.bfloat16))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), blocks) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_params(WIDE, jnp.bfloat16, kind)
    )
    save_hf(tmp_path / "b", blocks, WIDE)
    again = load_hf(tmp_path / "b", WIDE, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, again, dense_params(blocks))


def test_pruning_and_full_fine_tuning_start_from_the_dense_weights(tmp_path):
    save_hf(tmp_path / "wide", init_params(jax.random.key(0), WIDE), WIDE)
    blocks = load_hf(tmp_path / "wide", WIDE, quantization="q4_1")
    tokens = np.arange(18).reshape(2, 9)
    pruned, trained = [], []
    for params in (blocks, dense_params(blocks)):
        model = Model(params, WIDE, TOKENIZER, ModelSource("wide", Path("wide")))
        pruned.append(pruning.prune_model(model, [tokens], pruning.PrunedShape(1, 1, 48))[0].params)
        trained.append(FullConfig(("q_proj",)).build(jax.random.key(2), WIDE, params).params)
    for ours, theirs in (pruned, trained):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_invalid_values_are_refused(tiny):
    with pytest.raises(InputError, match=r"quantization .*none, q8_0, q4_0, q4_1, got 'nf4'"):
        abstract_params(WIDE, jnp.float32, "nf4")
    with pytest.raises(InputError, match=r"self_attn\.o_proj.* 48 inputs.* 32, got 'q4_0'"):
        abstract_params(tiny, jnp.float32, "q4_0")

    def too_large(names, out):
        out[:] = 1e7 if "up_proj" in names[0] else 1.0

    with pytest.raises(
        InputError, match=r"scale of model\.layers\.0\.mlp\.up_proj\.weight .*float16, got -inf at \[0, 0\]"
    ):
        build_params(WIDE, jnp.float32, too_large, quantization="q4_0")
