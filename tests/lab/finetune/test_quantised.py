"""Training on a quantised base equals training on its dense weights, in the memory of the blocks."""

import dataclasses

import jax
import numpy as np
import pytest
from support import training
from support.tiny import LARGE, WIDE

from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.finetune.memory import StepMemory
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.lab.llama import count_parameters
from rora_theory.lab.llama.quantised import dense_params
from rora_theory.lab.llama.weights import build_params

PLAIN = FinetuneConfig(
    rank=2, alpha=4, targets=("q_proj", "down_proj"), batch_size=4, dropout=0.0, warmup=0, lr=0.02, quantization="q4_1"
)


def read(names, out):
    """Draw weights of standard deviation 0.2, so that at this width every layer matters."""
    for i, name in enumerate(names):
        drawn = np.random.default_rng(list(name.encode())).normal(scale=0.2, size=out[i].shape)
        out[i] = np.ones_like(drawn) if "norm" in name else drawn


def base(config=PLAIN):
    """Return a model in blocks, and the same model dense."""
    params = build_params(WIDE, config.dtype, read, quantization=config.quantization)
    return params, jax.jit(dense_params)(params)


BATCHES = [training.batch(4, 16, seed, WIDE.vocab_size) for seed in range(5)]


@pytest.mark.slow
def test_steps_are_those_of_the_dense_weights():
    """DoRA's losses, gradients, row norms and magnitudes agree: the same products in the same order."""
    config = dataclasses.replace(PLAIN, method="dora")
    ours, theirs = (training.train(params, WIDE, config, BATCHES) for params in base(config))
    np.testing.assert_allclose((ours.losses, ours.norms), (theirs.losses, theirs.norms), rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours.weights[-1], theirs.weights[-1])
    assert theirs.losses[-1] < theirs.losses[0]


def test_devices_share_the_blocks():
    """Codes and scales are sharded as the rows of dense weights."""
    blocks, _ = base()
    weight = Layout.over(jax.devices()[:2], split_weights=True).place(blocks)["layers"]["mlp.up_proj"]["weight"]
    assert weight.codes.addressable_shards[0].data.shape == (2, 48, 16)
    assert weight.scales.addressable_shards[0].data.shape == (2, 48, 1)


@pytest.mark.slow
def test_the_program_takes_the_memory_of_the_blocks_and_makes_one_layer_dense():
    """The reference is XLA's own account, which on a CPU keeps wide copies of a dense bfloat16 base."""
    config = dataclasses.replace(PLAIN, batch_size=1, dtype="bfloat16", quantization="q4_0")
    dense = dataclasses.replace(config, quantization="none")
    blocks, half = (StepMemory.from_compiled(training.lower(LARGE, c, 8).compile()) for c in (config, dense))
    arrays = 2 * (1024 * 256 * 2 + 256 * (2 * 8 + 1))  # embeddings, head and norms stay bfloat16
    linear = 2 * count_parameters(LARGE) - arrays
    assert half.arguments - blocks.arguments == pytest.approx(linear * (1 - 4.5 / 16), abs=64)
    assert blocks.temporaries < linear / 2
