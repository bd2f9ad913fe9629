"""LoRA, RoRA and DoRA: initial values, merging, padding, the scaling rule, dropout, precision and compilation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.lab.adapters import LoraConfig
from rora_theory.lab.llama import MODULES, linear

RAGGED = {"layers.1.self_attn.q_proj": 2, "down_proj": 7}


def settings(**changes):
    return {"rank": 4, "alpha": 3.0, "rank_pattern": RAGGED} | changes


def test_modules_and_layers_of_one_shape_have_different_initial_values(config, params) -> None:
    """Over seven modules with four shapes and three layers, no two of one shape share a number of A."""
    adapter = LoraConfig(rank=3, alpha=3.0, target_modules="all-linear").build(jax.random.key(0), config, params)
    drawn = [np.asarray(layer) for tensors in adapter.params.values() for layer in tensors["lora_A"]]
    pairs = [(a, b) for a, b in itertools.combinations(drawn, 2) if a.shape == b.shape]
    assert len(pairs) > 3 * len(MODULES)
    assert all(not np.any(a == b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_merging_adds_the_update_to_each_layer(dora, params, perturbed) -> None:
    """The rows of W + gamma B A, with the trained norms for DoRA, and nothing else changes."""
    adapter = perturbed(**settings(use_dora=dora, target_modules="all-linear"))
    merged = adapter.merge(params)
    for name in MODULES:
        tensors = {kind: np.asarray(stack, np.float64) for kind, stack in adapter.params[name].items()}
        gamma = np.asarray(adapter.scaling[name])[:, None, None]
        weight = np.asarray(params["layers"][name]["weight"])
        expected = weight + gamma * tensors["lora_B"] @ tensors["lora_A"]
        if dora:
            norms = np.linalg.norm(expected, axis=2, keepdims=True)
            expected *= tensors["lora_magnitude_vector"][:, :, None] / norms
        assert np.abs(expected - weight).max() > 0.05
        np.testing.assert_allclose(merged["layers"][name]["weight"], expected, rtol=0, atol=2e-6)
        assert merged["layers"][name]["bias"] is params["layers"][name]["bias"]


@pytest.mark.slow
def test_merging_into_bfloat16_rounds_once(params, perturbed) -> None:
    adapter = perturbed(**settings())
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged, exact = adapter.merge(low), adapter.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low))
    for rounded, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        assert rounded.dtype == jnp.bfloat16
        # Half a last place of bfloat16, and float32's rounding in two programs: a second rounding exceeds it.
        np.testing.assert_allclose(np.asarray(rounded, np.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_padded_layer_is_the_layer_at_its_own_rank(dora, params, perturbed) -> None:
    """Padding adds exact zeros, so that the outputs agree to 1e-6, the rounding of another summation order."""
    adapter = perturbed(**settings(use_dora=dora))
    name, layer = "self_attn.q_proj", 1
    target = next(target for target in adapter.targets if target.module == name)
    assert (target.width, target.ranks[layer]) == (4, 2)
    padded = {kind: value[layer] for kind, value in adapter.layers()[name].items()}
    assert not padded["lora_A"][2:].any()
    narrow = padded | {"lora_A": padded["lora_A"][:2], "lora_B": padded["lora_B"][:, :2]}
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    weight, bias = (params["layers"][name][kind][layer] for kind in ("weight", "bias"))
    outputs = [adapter.linear(name, x, weight, bias, {name: tensors}, key=None) for tensors in (padded, narrow)]
    np.testing.assert_allclose(*outputs, rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(outputs[0] - linear(x, weight, bias))).max() > 0.1


@pytest.mark.slow
def test_excluded_layers_get_no_gradient(params, tokens, perturbed, run) -> None:
    """DoRA's magnitudes are drawn for all layers. For LoRA, peft's golden cases test the layers left out."""
    adapter = perturbed(rank=4, alpha=3.0, layers=[1], use_dora=True)
    for name, tensors in adapter.params.items():
        assert adapter.scaling[name].tolist() == [0.0, 1.5, 0.0]
        assert not np.asarray(tensors["lora_A"])[[0, 2]].any()
    loss = jax.grad(lambda p: jnp.sum(jnp.sin(run(params, tokens, adapter.replace(p)))))
    for tensors in jax.device_get(jax.jit(loss)(adapter.params)).values():
        for value in tensors.values():
            assert [bool(layer.any()) for layer in value] == [False, True, False]


@pytest.mark.parametrize(("rule", "kappa"), [("lora", 1.0), ("rora", 0.5), ("rslora", 0.5), (0.25, 0.25)])
def test_the_rule_affects_only_the_scaling_at_the_rank_of_each_layer(rule, kappa, config, params) -> None:
    adapter, other = (LoraConfig(**settings(rule=r)).build(jax.random.key(0), config, params) for r in (rule, 2.0))
    np.testing.assert_allclose(
        adapter.scaling["self_attn.q_proj"], [3 / 4**kappa, 3 / 2**kappa, 3 / 4**kappa], rtol=1e-7
    )
    np.testing.assert_allclose(adapter.scaling["mlp.down_proj"], [3 / 7**kappa] * 3, rtol=1e-7)
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter.params, other.params))


@pytest.mark.slow
def test_dropout_acts_on_the_branch_alone_and_by_key(config, params, tokens, perturbed, run) -> None:
    drop = {"rank": 4, "alpha": 3.0, "dropout": 0.5}
    fresh = LoraConfig(**drop).build(jax.random.key(0), config, params)
    base = run(params, tokens)
    np.testing.assert_allclose(run(params, tokens, fresh, jax.random.key(1)), base, rtol=0, atol=1e-5)
    adapter = perturbed(**drop)
    first = run(params, tokens, adapter, jax.random.key(1))
    assert np.array_equal(first, run(params, tokens, adapter, jax.random.key(1)))
    assert not np.array_equal(first, run(params, tokens, adapter, jax.random.key(2)))
    evaluated = run(params, tokens, adapter)
    assert not np.array_equal(first, evaluated)
    without = perturbed(**(drop | {"dropout": 0.0}))
    np.testing.assert_allclose(evaluated, run(params, tokens, without, jax.random.key(1)), rtol=0, atol=1e-5)


def test_configurations_compare_and_hash_by_value() -> None:
    first = LoraConfig(rank=4, alpha=8, target_modules=["q_proj"], alpha_pattern={"q_proj": 1}, layers=[2, 0])
    second = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",), alpha_pattern=[("q_proj", 1.0)], layers=(0, 2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != dataclasses.replace(first, alpha=9)
