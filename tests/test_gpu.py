"""Tests that need a GPU: fused attention, steps against the CPU's, exact resumption, bfloat16.

Run by `pytest -m gpu` with JAX_PLATFORMS=cuda,cpu; `benchmarks/gpu.py` does. Without a GPU they skip, but for
RORA_GPU_REHEARSAL=1, under which the CPU stands in with the blocked route, to show that the tests themselves run.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune import Batches, FinetuneConfig, StepCompleted, Trainer, choose_widths, tokenize
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.llama import attention
from rora_theory.lab.llama.attention import attend, choose_route
from rora_theory.lab.llama.generate import beam_search
from rora_theory.laws import sampling

pytestmark = pytest.mark.gpu

MODEL = dataclasses.replace(tiny.CONFIG, head_dim=64)
PLAIN = FinetuneConfig(rank=4, alpha=8, batch_size=4, dropout=0.0, warmup=0, lr=1e-2, template="clean")
EPS = float(jnp.finfo(jnp.bfloat16).eps)


@pytest.fixture(scope="module", autouse=True)
def fused():
    """Return the route of attention that the device takes in bfloat16."""
    if jax.default_backend() == "gpu":
        return "cudnn"
    if os.environ.get("RORA_GPU_REHEARSAL"):
        return "blocked"
    return pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def params():
    return tiny.params(config=MODEL)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_blocked_one(fused, masked):
    assert choose_route(jnp.dtype(jnp.bfloat16), 64, queries=64, keys=64, masked=masked) == fused
    keys = jax.random.split(jax.random.key(1), 4)
    q, g = (jax.random.normal(key, (2, 64, 4, 64)).astype(jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 64, 2, 64)).astype(jnp.bfloat16) for key in keys[2:])
    real = np.arange(64) >= np.array([0, 9])[:, None]
    mask = jnp.asarray(np.tril(np.ones((64, 64), bool))[None, None] & real[:, None, None]) if masked else None

    def both_ways(route, dtype):
        def weighted(q, k, v):
            out = attend(*(a.astype(dtype) for a in (q, k, v)), mask, route=route).astype(jnp.float32)
            # A query that sees nothing gives no meaningful output: here the first nine of the second row.
            return jnp.sum((out * g.astype(jnp.float32))[:, 9:]), out[:, 9:]

        return jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    # Values, probabilities and results are rounded to bfloat16 once each, and cotangents on the way back.
    for ours, plain in zip(
        jax.tree.leaves(both_ways(fused, jnp.bfloat16)), jax.tree.leaves(both_ways("blocked", jnp.float32)), strict=True
    ):
        plain = np.asarray(plain, np.float32)
        np.testing.assert_allclose(np.asarray(ours, np.float32), plain, rtol=0, atol=4 * EPS * np.abs(plain).max())


def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 128, (4, 33)).astype(np.int32)
    weights = (np.arange(32) < random.integers(8, 33, (4, 1))).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, None)


def take(params, config, device, count=4):
    """Return losses, gradient norms and the last adapter of a few steps on a device."""
    with jax.default_device(device), pytest.MonkeyPatch.context() as patch:
        if device.platform == "cpu":  # also where the default backend is a GPU
            patch.setattr(attention, "_has_fused_kernel", lambda: False)
        base, data = jax.device_put((params, batch()), device)
        fresh = config.adapter().build(jax.random.key(1), MODEL, base)
        state = steps.init_state(fresh, steps.finetune_optimizer(config, count), jax.random.key(2))
        function = steps.train_step(fresh, MODEL, config, count)
        rows = []
        for _ in range(count):
            state, metrics = function(state, base, data)
            rows.append([float(metrics.loss), float(metrics.grad_norm)])
    return np.array(rows), jax.tree.map(np.asarray, state.params)


def devices():
    return jax.devices()[0], jax.devices("cpu")[0]


def test_a_step_in_float32_is_the_cpus(params):
    with jax.default_matmul_precision("highest"):
        here, there = (take(params, PLAIN, device) for device in devices())
    # Sums in another order: a few float32 roundings of losses near log 128 and of gradients.
    np.testing.assert_allclose(here[0], there[0], rtol=2e-5)
    assert here[0][-1, 0] < here[0][0, 0]
    # Adam divides a gradient by its own size: only where that is rounding alone may a weight differ by whole steps.
    for ours, theirs in zip(jax.tree.leaves(here[1]), jax.tree.leaves(there[1]), strict=True):
        assert np.mean(np.abs(ours - theirs) > 1e-5) < 0.01


@pytest.mark.parametrize("changes", [{}, {"method": "dora", "remat": "mlp", "accumulation": 2}])
def test_a_step_in_bfloat16_is_the_cpus(params, changes):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    config = dataclasses.replace(PLAIN, dtype="bfloat16", **changes)
    here, there = (take(half, config, device) for device in devices())
    # Activations of 8 bits through two layers: losses move in the third place, and the gradient of the first step, from
    # B = 0, in the second.
    np.testing.assert_allclose(here[0][:, 0], there[0][:, 0], rtol=1e-2)
    np.testing.assert_allclose(here[0][0, 1], there[0][0, 1], rtol=3e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(here[1])} == {np.dtype(np.float32)}


def test_a_resumed_run_ends_in_the_same_bits(params, tmp_path):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    config = dataclasses.replace(PLAIN, dtype="bfloat16", dropout=0.1, epochs=2, checkpoint_every=2, steps=6)
    examples = tokenize(tiny.records(16), tiny.ByteEncoder(), template=config.template)

    def trainer(folder):
        adapter = config.adapter().build(jax.random.key(1), MODEL, half)
        train = Batches(examples, choose_widths(examples.input_lengths, 1), batch_size=4, epochs=2, seed=1)
        return Trainer(half, MODEL, adapter, config, train, None, folder)

    def losses(run, until):
        values = []
        for event in run.train():
            if isinstance(event, StepCompleted):
                values.append(event.loss)
            if len(values) == until:
                break
        return values

    uninterrupted = trainer(tmp_path / "uninterrupted")
    expected = losses(uninterrupted, 6)
    first = trainer(tmp_path / "cut")
    assert losses(first, 5) == expected[:5]
    first.close()
    second = trainer(tmp_path / "cut")
    assert second.step == 4
    assert losses(second, 2) == expected[4:]
    jax.tree.map(np.testing.assert_array_equal, second.adapter("last").params, uninterrupted.adapter("last").params)
    uninterrupted.close()
    second.close()


def test_generated_texts_are_the_cpus(params):
    prompts = [[1, 5, 9, 11], [1, 5, 70]]
    with jax.default_matmul_precision("highest"):
        here, there = (
            beam_search(jax.device_put(params, device), MODEL, prompts, max_new_tokens=6, eos_ids=(2,))
            for device in devices()
        )
    assert here == there


def test_draws_are_the_cpus():
    setting = sampling.RandomStep(rank=4, p_in=64, p_out=1, overlap=0.5)
    with jax.default_matmul_precision("highest"):
        here, there = (
            next(sampling.stream(setting, "direct", jax.random.key(0), devices=[device])) for device in devices()
        )
    # The same keys give the same numbers, up to the rounding of logarithms and sums.
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
