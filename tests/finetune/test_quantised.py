"""Training on a base held in blocks is training on its dense weights, in the memory of the blocks."""

import dataclasses

import jax
import numpy as np
import pytest

from rora_theory import adapters
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune import FinetuneConfig, capacity
from rora_theory.finetune import step as steps
from rora_theory.finetune.sharding import Layout, mesh
from rora_theory.llama import LlamaConfig, count_parameters
from rora_theory.llama.quantised import QUANTIZATIONS, dense_params
from rora_theory.llama.weights import build_params

MODEL = LlamaConfig(64, 32, 64, 2, 4, 2, 8, max_position_embeddings=64)
PLAIN = FinetuneConfig(
    rank=2, alpha=4, targets=("q_proj", "down_proj"), batch_size=4, dropout=0.0, warmup=0, lr=0.02, quantization="q4_1"
)
STEPS = 5


def read(names, out):
    """Weights of standard deviation 0.2, so that at this width every layer matters."""
    for i, name in enumerate(names):
        drawn = np.random.default_rng(list(name.encode())).normal(scale=0.2, size=out[i].shape)
        out[i] = np.ones_like(drawn) if "norm" in name else drawn


def base(config=PLAIN):
    """A model in blocks, and the same model dense."""
    params = build_params(MODEL, config.dtype, read, quantization=config.quantization)
    return params, jax.jit(dense_params)(params)


def batches(count=STEPS, rows=4, width=16):
    random = np.random.default_rng(0)
    for _ in range(count):
        tokens = random.integers(1, 64, (rows, width + 1)).astype(np.int32)
        weights = (np.arange(width) < random.integers(5, width + 1, (rows, 1))).astype(np.float32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], weights, None)


def train(params, config):
    """Losses, norms of gradients, and the adapter after some steps."""
    adapter = adapters.init(jax.random.key(1), config.lora(), MODEL, params)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, STEPS), jax.random.key(2))
    function = steps.train_step(adapter, MODEL, config, STEPS)
    found = []
    for batch in batches():
        state, metrics = function(state, params, batch)
        found.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(found), jax.tree.map(np.asarray, state.params)


@pytest.mark.slow
def test_steps_are_those_of_the_dense_weights():
    """DoRA's: losses, gradients, row norms and magnitudes. Both multiply the same numbers in the same order."""
    config = dataclasses.replace(PLAIN, method="dora")
    held, plain = base(config)
    ours, adapter = train(held, config)
    theirs, expected = train(plain, config)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), adapter, expected)
    assert theirs[-1, 0] < theirs[0, 0]


def test_devices_share_the_blocks():
    """Codes and scales lie where the weights' rows would."""
    held, _ = base()
    weight = Layout(mesh(fsdp=2, devices=jax.devices()[:2])).params(held)["layers"]["mlp.up_proj"]["weight"]
    assert weight.codes.addressable_shards[0].data.shape == (2, 32, 16)
    assert weight.scales.addressable_shards[0].data.shape == (2, 32, 1)


@pytest.mark.slow
def test_the_program_takes_the_memory_of_the_blocks_and_makes_one_layer_dense():
    """By XLA's own account, which on this machine's processor keeps wide copies of a dense bfloat16 base."""
    model = LlamaConfig(64, 256, 512, 16, 4, 2, 64, max_position_embeddings=64)
    config = dataclasses.replace(PLAIN, batch_size=1, dtype="bfloat16", quantization="q4_0")
    found, xla = capacity.account(model, config, 8), capacity.compile_here(model, config, 8)
    half = capacity.account(model, dataclasses.replace(config, quantization="none"), 8)
    assert xla.arguments == pytest.approx(found.base + found.adapter + found.optimizer + found.batch, abs=64)
    arrays = 2 * (64 * 256 * 2 + 256 * (2 * 16 + 1))  # embeddings, head and norms stay bfloat16
    assert found.base - arrays == (half.base - arrays) * 4.5 / 16
    assert found.parameters == half.parameters == count_parameters(model)
    assert xla.temporaries < half.base / 4
    # The account's: at most one layer's weights in bfloat16 beside what a step of the dense base holds.
    layer = (half.base - arrays) / 16
    assert half.working < found.working <= half.working + layer


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_run_is_known_by_its_quantization(kind):
    """The plain one by nothing: it is the run it was before there was a choice."""
    found = FinetuneConfig(quantization=kind).settings()
    assert found["quantization"] == kind


def test_weights_that_are_trained_are_none_of_the_frozen_base():
    with pytest.raises(InputError, match="quantization must be none with method full, got 'q8_0'"):
        FinetuneConfig(method="full", dropout=0.0, quantization="q8_0")
