"""The adapter as a whole: its start, merging, padding, the scaling rule, dropout, precision, compilation."""

import dataclasses
import itertools
from dataclasses import replace as with_fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.adapters import LoraConfig, count, init, merge, norms, replace, trainable, unmerge
from rora_theory.errors import InputError
from rora_theory.llama import MODULES, Adapter, LlamaConfig, abstract_params, forward, linear
from rora_theory.scaling import alpha_for, scaling_factor

RAGGED = {"layers.1.self_attn.q_proj": 2, "down_proj": 7}


def settings(**changes):
    return {"rank": 4, "alpha": 3.0, "rank_pattern": RAGGED} | changes


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(dora, config, params, tokens, run) -> None:
    adapter = init(jax.random.key(0), LoraConfig(**settings(use_dora=dora)), config, params)
    assert isinstance(adapter, Adapter)
    base, adapted = run(params, tokens), run(params, tokens, adapter)
    # LoRA adds an exact zero, in another program; DoRA multiplies by |W|/|W|, one up to two sums' rounding.
    np.testing.assert_allclose(adapted, base, rtol=0, atol=1e-5)


def test_modules_and_layers_of_one_shape_start_apart(config, params) -> None:
    """Four shapes over seven modules and three layers: no two of one shape share a number of A."""
    adapter = init(jax.random.key(0), LoraConfig(rank=3, alpha=3.0, target_modules="all-linear"), config, params)
    drawn = [np.asarray(layer) for tensors in adapter.params.values() for layer in tensors["lora_A"]]
    pairs = [(a, b) for a, b in itertools.combinations(drawn, 2) if a.shape == b.shape]
    assert len(pairs) > 3 * len(MODULES)
    assert all(not np.any(a == b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_merging_is_applying_and_unmerging_undoes_it(dora, params, tokens, perturbed, run) -> None:
    adapter = perturbed(**settings(use_dora=dora, target_modules="all-linear"))
    applied = run(params, tokens, adapter)
    merged = merge(adapter, params)
    assert np.abs(np.asarray(applied) - np.asarray(run(params, tokens))).max() > 0.1
    # 5e-5 on logits of about 3: merged weights are rounded to float32 again in seven modules of three layers.
    np.testing.assert_allclose(run(merged, tokens), applied, rtol=0, atol=5e-5)
    plain = unmerge(adapter, merged, norms(adapter, params) if dora else None)
    for name in MODULES:
        moved = np.abs(np.asarray(merged["layers"][name]["weight"] - params["layers"][name]["weight"]))
        assert moved.max() > 0.05
        np.testing.assert_allclose(plain["layers"][name]["weight"], params["layers"][name]["weight"], rtol=0, atol=2e-6)
        assert merged["layers"][name]["bias"] is params["layers"][name]["bias"]


@pytest.mark.slow
def test_dora_can_not_be_unmerged_without_its_norms(params, perturbed) -> None:
    adapter = perturbed(**settings(use_dora=True))
    with pytest.raises(InputError, match="norms must not be None for a DoRA adapter"):
        unmerge(adapter, merge(adapter, params))


@pytest.mark.slow
def test_merging_into_bfloat16_rounds_once(params, perturbed) -> None:
    adapter = perturbed(**settings())
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = merge(adapter, low)
    exact = merge(adapter, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low))
    for found, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        assert found.dtype == jnp.bfloat16
        # Half a last place of bfloat16, and float32's rounding in two programs: a second rounding exceeds it.
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_padded_layer_is_the_layer_at_its_own_rank(dora, params, perturbed) -> None:
    """Adding exact zeros: equal to rounding in another order of summation, 1e-6."""
    adapter = perturbed(**settings(use_dora=dora))
    name, layer = "self_attn.q_proj", 1
    target = next(target for target in adapter.targets if target.module == name)
    assert (target.width, target.ranks[layer]) == (4, 2)
    padded = {name: {kind: value[layer] for kind, value in adapter.layers()[name].items()}}
    own = dict(padded[name])
    assert not own["lora_A"][2:].any()
    own |= {"lora_A": own["lora_A"][:2], "lora_B": own["lora_B"][:, :2]}
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    weight, bias = (params["layers"][name][kind][layer] for kind in ("weight", "bias"))
    found = adapter.linear(name, x, weight, bias, padded, key=None)
    np.testing.assert_allclose(
        found, adapter.linear(name, x, weight, bias, {name: own}, key=None), rtol=1e-6, atol=1e-6
    )
    assert np.abs(np.asarray(found - linear(x, weight, bias))).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_layers_left_out_are_the_base_and_learn_nothing(dora, params, tokens, perturbed, run) -> None:
    adapter = perturbed(rank=4, alpha=3.0, layers=[1], use_dora=dora)
    for name, tensors in adapter.params.items():
        assert adapter.scaling[name].tolist() == [0.0, 1.5, 0.0]
        assert not np.asarray(tensors["lora_A"])[[0, 2]].any()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(params, tokens, adapter.replace(p))))))(
        trainable(adapter)
    )
    for tensors in jax.device_get(gradient).values():
        for value in tensors.values():
            assert not value[0].any()
            assert value[1].any()
            assert not value[2].any()


@pytest.mark.slow
def test_lora_and_rora_differ_by_gamma_alone(params, tokens, perturbed, run) -> None:
    """The same tensors under either rule, and the same logits where alpha gives the same gamma."""
    lora = perturbed(rank=4, alpha=6.0, rule="lora")
    gamma = scaling_factor("lora", alpha=6.0, rank=4)
    rora = perturbed(rank=4, alpha=alpha_for("rora", scaling=gamma, rank=4), rule="rora")
    assert jax.tree.all(jax.tree.map(np.array_equal, trainable(lora), trainable(rora)))
    np.testing.assert_allclose(run(params, tokens, lora), run(params, tokens, rora), rtol=0, atol=1e-5)
    other = perturbed(rank=4, alpha=6.0, rule="rora")
    assert jax.tree.all(jax.tree.map(np.array_equal, trainable(lora), trainable(other)))
    assert not np.array_equal(run(params, tokens, lora), run(params, tokens, other))


@pytest.mark.parametrize(("rule", "kappa"), [("lora", 1.0), ("rora", 0.5), ("rslora", 0.5), (0.25, 0.25)])
def test_every_layer_has_the_scaling_of_its_own_rank(rule, kappa, config, params) -> None:
    adapter = init(jax.random.key(0), LoraConfig(**settings(rule=rule)), config, params)
    np.testing.assert_allclose(
        adapter.scaling["self_attn.q_proj"], [3 / 4**kappa, 3 / 2**kappa, 3 / 4**kappa], rtol=1e-7
    )
    np.testing.assert_allclose(adapter.scaling["mlp.down_proj"], [3 / 7**kappa] * 3, rtol=1e-7)


@pytest.mark.slow
def test_dropout_acts_on_the_branch_alone_and_by_key(config, params, tokens, perturbed, run) -> None:
    drop = {"rank": 4, "alpha": 3.0, "dropout": 0.5}
    fresh = init(jax.random.key(0), LoraConfig(**drop), config, params)
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


def test_modules_draw_their_own_masks(params, perturbed) -> None:
    """q and up read inputs of one width: with tensors shared between them only the mask, which is the key's, can
    differ. That a model hands each module a key of its own is tested there."""
    adapter = perturbed(rank=4, alpha=3.0, dropout=0.5)
    layer = {name: {kind: value[0] for kind, value in own.items()} for name, own in adapter.layers().items()}
    shared = {"self_attn.q_proj": layer["self_attn.q_proj"], "mlp.up_proj": layer["self_attn.q_proj"]}
    weight = params["layers"]["self_attn.q_proj"]["weight"][0]
    x = jnp.ones((2, 3, 16))
    apply = jax.jit(adapter.linear, static_argnums=0)
    keys = jax.random.split(jax.random.key(3))
    outputs = [apply(name, x, weight, None, shared, key=key) for name, key in zip(shared, keys, strict=True)]
    assert not np.array_equal(*outputs)


@pytest.mark.slow
def test_bfloat16_base_with_float32_adapter(config, params, tokens, perturbed) -> None:
    """Gradients are float32 arrays; logits are the float32 model's to bfloat16's 8 bits over three layers."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    adapter = perturbed(**settings(use_dora=True))

    @jax.jit
    def differentiate(trained, weights):
        def loss(trained):
            logits = forward(weights, tokens, config, adapter.replace(trained))
            return jnp.mean(jnp.square(logits)), logits

        return jax.value_and_grad(loss, has_aux=True)(trained)

    (_, found), gradient = differentiate(trainable(adapter), low)
    (_, exact), expected = differentiate(trainable(adapter), high)
    scale = np.abs(np.asarray(exact)).max()
    assert 1e-5 < np.abs(np.asarray(found - exact)).max() / scale < 0.05
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        # Cosine of the two gradients: their difference is rounding, uncorrelated with either.
        a, b = np.asarray(ours, np.float64).ravel(), np.asarray(theirs, np.float64).ravel()
        assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def test_new_values_compile_nothing(config, params, tokens, perturbed) -> None:
    """One compilation for all values of the tensors and of the scaling."""
    traces = []

    @jax.jit
    def step(adapter):
        traces.append(1)
        return forward(params, tokens, config, adapter)

    adapter = perturbed(**settings())
    for _ in range(2):
        step(adapter)
        adapter = replace(adapter, jax.tree.map(lambda leaf: 1.1 * leaf, trainable(adapter)))
    scaled = with_fields(adapter, scaling=jax.tree.map(lambda leaf: 2 * leaf, adapter.scaling))
    assert not jnp.array_equal(step(scaled), step(adapter))
    assert len(traces) == 1


def test_a_pytree_of_arrays_with_a_hashable_rest(config, params) -> None:
    adapter = init(jax.random.key(0), LoraConfig(**settings()), config, params)
    leaves, tree = jax.tree.flatten(adapter)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert hash(tree) == hash(jax.tree.structure(adapter))
    assert len(leaves) == 5 * 2 + 5


@pytest.mark.parametrize("dora", [False, True])
def test_counts_the_published_llama_7b(dora) -> None:
    """LLaMA-7B, rank 32 on q, k, v, up, down: 0.83% of all under LoRA, 0.84% under DoRA, as published."""
    llama = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
    built = jax.eval_shape(
        lambda key, params: init(key, LoraConfig(rank=32, alpha=64, use_dora=dora), llama, params),
        jax.random.key(0),
        abstract_params(llama, jnp.bfloat16),
    )
    per_layer = 3 * 32 * (4096 + 4096) + 2 * 32 * (4096 + 11008) + dora * (4 * 4096 + 11008)
    assert count(built) == 32 * per_layer
    assert round(100 * count(built) / (6_738_415_616 + count(built)), 2) == (0.84 if dora else 0.83)


def test_count_is_of_true_ranks(config, params) -> None:
    adapter = init(
        jax.random.key(0), LoraConfig(**settings(target_modules=["q_proj"], rank_pattern=())), config, params
    )
    assert count(adapter) == 3 * 4 * 32
    ragged = {"layers.1.self_attn.q_proj": 2}
    adapter = init(
        jax.random.key(0),
        LoraConfig(**settings(target_modules=["q_proj"], rank_pattern=ragged)),
        config,
        params,
    )
    assert count(adapter) == (4 + 2 + 4) * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"rank .*0"),
        ({"alpha": -1.0}, r"alpha .*-1.0"),
        ({"alpha": float("nan")}, r"alpha .*nan"),
        ({"alpha": 10**400}, r"alpha .*10"),
        ({"dropout": 10**400}, r"dropout .*got 10"),
        ({"dropout": 1.0}, r"dropout .*got 1.0"),
        ({"dropout": -0.1}, r"dropout .*got -0.1"),
    ],
)
def test_refuses(changes, message) -> None:
    with pytest.raises(InputError, match=message):
        LoraConfig(**settings(**changes))


def test_configurations_compare_and_hash_by_value() -> None:
    first = LoraConfig(rank=4, alpha=8, target_modules=["q_proj"], alpha_pattern={"q_proj": 1}, layers=[2, 0])
    second = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",), alpha_pattern=[("q_proj", 1.0)], layers=(0, 2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != dataclasses.replace(first, alpha=9)
