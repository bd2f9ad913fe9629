"""Series and parallel adapters: against numpy, their files, their counts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from support import numpy_llama

from rora_theory.adapters import BottleneckConfig, count, init, load_peft, merge, save_peft, share, table, unmerge
from rora_theory.adapters.dropout import dropout
from rora_theory.errors import InputError
from rora_theory.llama import LlamaConfig, abstract_params, forward

PLACEMENTS = ("series", "parallel")
ALL = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def perturbed(config, params, placement, **settings):
    """An adapter with random numbers in U too, of a size that reaches the bends of f."""
    adapter = init(jax.random.key(0), BottleneckConfig(placement, 5, init="mam_adapter", **settings), config, params)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    noise = {
        m: t | {"adapter_up": jax.random.normal(next(keys), t["adapter_up"].shape)} for m, t in adapter.params.items()
    }
    return adapter.replace(noise)


def numpy_module(adapter, params, weights):
    """The definition, an adapter of one layer and module at a time."""
    settings = adapter.config

    def module(layer, name, x, z):
        if name not in params:
            return z
        down, up = (np.asarray(params[name][kind][layer], np.float64) for kind in ("adapter_down", "adapter_up"))
        after = settings.placement == "series" and name in ("self_attn.o_proj", "mlp.down_proj")
        change = settings.scaling * numpy_llama.FUNCTIONS[settings.non_linearity]((z if after else x) @ down.T) @ up.T
        if settings.placement == "parallel" or after:
            return z + change
        # before: W (x + change) + b = z + W change
        return z + change @ np.asarray(weights[f"model.layers.{layer}.{name}.weight"], np.float64).T

    return module


def reference(golden, adapter, params):
    weights = golden.base_weights()
    module = numpy_module(adapter, params, weights)
    return numpy_llama.logits(weights, golden.SHAPE, golden.TOKENS, module=module)


def loss_of(params, tokens, config, adapter):
    def loss(trained):
        logits = forward(params, tokens, config, adapter.replace(trained))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_mam_adapter_changes_nothing_and_learns(placement, config, params, tokens, run) -> None:
    adapter = init(jax.random.key(0), BottleneckConfig(placement, 5, init="mam_adapter"), config, params)
    np.testing.assert_allclose(run(params, tokens, adapter), run(params, tokens), rtol=0, atol=1e-5)
    gradient = jax.jit(jax.grad(loss_of(params, tokens, config, adapter)))(adapter.params)
    for name, tensors in gradient.items():
        assert tensors["adapter_up"].any(axis=(1, 2)).all(), name
        assert not tensors["adapter_down"].any(), "no way through U = 0"
        # D as LoRA's A: U(-1/sqrt(n), 1/sqrt(n)), n its inputs.
        down = np.asarray(adapter.params[name]["adapter_down"])
        assert 0.9 < np.abs(down).max() * down.shape[2] ** 0.5 <= 1
        assert len(np.unique(down)) > 0.99 * down.size, "no layer is another's copy"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_adapter_is_drawn_as_published(placement) -> None:
    """Normal, deviation 0.02, both tensors, every layer anew: within 5 standard errors of the deviation."""
    settings = BottleneckConfig(placement, 64, target_modules=("up_proj",))
    adapter = init(jax.random.key(0), settings, LlamaConfig(8, 128, 256, 2, 2, 2, 64), {})
    for tensor in jax.tree.leaves(adapter.params):
        assert abs(np.std(tensor) / 0.02 - 1) < 5 / (2 * tensor.size) ** 0.5
        assert len(np.unique(tensor)) > 0.99 * tensor.size
    assert np.abs(np.corrcoef(*(np.ravel(t)[: 2 * 64 * 128] for t in jax.tree.leaves(adapter.params)))[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("placement", "settings"),
    [
        ("series", {"target_modules": ALL}),
        ("parallel", {"target_modules": ALL}),
        ("series", {"non_linearity": "gelu", "scaling": 0.5}),
        ("parallel", {"non_linearity": "silu", "scaling": 3}),
        ("parallel", {"non_linearity": "relu"}),
    ],
)
def test_agrees_with_numpy(placement, settings, golden, config, params, tokens, run) -> None:
    adapter = perturbed(config, params, placement, **settings)
    found, expected = run(params, tokens, adapter), reference(golden, adapter, adapter.params)
    assert np.abs(expected - np.asarray(run(params, tokens))).max() > 0.5, "the adapter decides"
    # The reference is float64; logits of up to 10 through 3 layers of float32, each with adapters of gain above 1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_is_the_slope_of_the_numpy_loss(placement, golden, config, params, tokens) -> None:
    """In a random direction of every tensor."""
    adapter = perturbed(config, params, placement)
    gradient = jax.jit(jax.grad(loss_of(params, tokens, config, adapter)))(adapter.params)
    random = np.random.default_rng(0)
    for name, tensors in adapter.params.items():
        for kind, tensor in tensors.items():
            along = random.standard_normal(tensor.shape).astype(np.float32)
            losses = []
            for h in (1e-3, -1e-3):
                shifted = adapter.params | {name: tensors | {kind: tensor + h * along}}
                losses.append(numpy_llama.loss(reference(golden, adapter, shifted), golden.TOKENS))
            slope = (losses[0] - losses[1]) / 2e-3
            # Central difference: error of order h^2 by the third derivative, some parts in a thousand here.
            assert float(jnp.sum(gradient[name][kind] * along)) == pytest.approx(slope, rel=5e-3, abs=1e-5), (
                name,
                kind,
            )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropout_acts_on_what_feeds_the_adapter(placement, config, params) -> None:
    adapter = perturbed(config, params, placement, dropout=0.4)
    name = "mlp.up_proj"
    key = jax.random.key(5)
    weight, bias = (params["layers"][name][kind][1] for kind in ("weight", "bias"))
    layer = jax.tree.map(lambda leaf: leaf[1], adapter.layers())
    x = jax.random.normal(jax.random.key(6), (2, 3, weight.shape[1]))
    z = x @ weight.T + jnp.broadcast_to(bias, (2, 3, weight.shape[0]))
    fed = dropout(key, x, 0.4)
    change = jnp.tanh(fed @ layer[name]["adapter_down"].T) @ layer[name]["adapter_up"].T
    expected = z + (change @ weight.T if placement == "series" else change)
    np.testing.assert_allclose(adapter.linear(name, x, weight, bias, layer, key=key), expected, rtol=0, atol=1e-5)
    without = adapter.linear(name, x, weight, bias, layer, key=None)
    assert np.abs(without - expected).max() > 0.1


def test_published_modules_and_table(config) -> None:
    assert set(BottleneckConfig("series").modules(config)) == {"mlp.gate_proj", "mlp.up_proj"}
    assert set(BottleneckConfig("parallel").modules(config)) == {"mlp.up_proj", "mlp.down_proj"}
    row = table(BottleneckConfig("parallel", 7), config)[1]
    assert (row.module, row.layers, row.rank, row.alpha, row.rule, row.scaling) == (
        "mlp.down_proj", "0-2", 7, None, "parallel", 1.0,
    )  # fmt: skip


LLAMA_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
LLAMA_13B = LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128)


@pytest.mark.parametrize(
    ("settings", "model", "percent"),
    [
        # The paper's Table I, from LLM-Adapters: parallel as its protocol says, series as one adapter a layer.
        (BottleneckConfig("parallel"), LLAMA_7B, 3.54),
        (BottleneckConfig("parallel"), LLAMA_13B, 2.89),
        (BottleneckConfig("series", target_modules=("down_proj",)), LLAMA_7B, 0.99),
        (BottleneckConfig("series", target_modules=("down_proj",)), LLAMA_13B, 0.80),
        (BottleneckConfig("series"), LLAMA_7B, 1.95),
        (BottleneckConfig("series"), LLAMA_13B, 1.59),
    ],
)
def test_shares(settings, model, percent) -> None:
    adapter = jax.eval_shape(lambda key: init(key, settings, model, {}), jax.random.key(0))
    assert round(100 * share(adapter, abstract_params(model)), 2) == percent


def test_count_is_of_the_arrays(config, params) -> None:
    adapter = init(jax.random.key(0), BottleneckConfig("series", 5, ("q_proj", "down_proj")), config, params)
    assert count(adapter) == sum(leaf.size for leaf in jax.tree.leaves(adapter.params)) == 3 * 5 * (2 * 16 + 2 * 16)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_files(placement, config, params, tmp_path) -> None:
    """Read back they are the adapter; the tensors have PEFT's kind of names, shapes [out, in]."""
    settings = {"target_modules": ("o_proj", "down_proj"), "non_linearity": "silu", "scaling": 0.25, "dropout": 0.1}
    adapter = perturbed(config, params, placement, **settings)
    save_peft(tmp_path, adapter, base_model="tiny")
    again = load_peft(tmp_path, config)
    assert again.config == adapter.config
    assert again.llama_config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)
    found = safetensors.numpy.load((tmp_path / "adapter_model.safetensors").read_bytes())
    name = "base_model.model.model.layers.{}.mlp.down_proj.{}.weight"
    assert len(found) == 3 * 2 * 2
    assert found[name.format(2, "adapter_down")].shape == (5, 16 if placement == "series" else 24)
    np.testing.assert_array_equal(
        found[name.format(1, "adapter_up")], adapter.params["mlp.down_proj"]["adapter_up"][1], strict=True
    )
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == {"series": "SERIES_ADAPTER", "parallel": "PARALLEL_ADAPTER"}[placement]
    assert (written["base_model_name_or_path"], written["bottleneck_size"]) == ("tiny", 5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bottleneck_size": 0}, r"bottleneck_size .*got 0"),
        ({"bottleneck_size": 6}, r"another model: .*adapter_down.weight .*\[5, 16\]"),
        (
            {"peft_type": "PARALLEL_ADAPTER"},
            r"another model: .*adapter_up.weight .*\[16, 5\]",
        ),
        ({"non_linearity": "sin"}, r"non_linearity .*got 'sin'"),
        ({"init_weights": "zero"}, r"init_weights .*got 'zero'"),
        ({"scaling": 0}, r"scaling .*0"),
        ({"scaling": 10**400}, r"scaling .*10"),
        ({"scaling": True}, r"scaling .*True"),
        ({"adapter_dropout": float("nan")}, r"adapter_dropout .*got nan"),
        ({"adapter_dropout": 1}, r"adapter_dropout .*got 1"),
        ({"bias": "all"}, r"bias is not supported.*'all'"),
        ({"target_modules": "up_proj"}, r"target_modules .*got 'up_proj'"),
        ({"target_modules": ["c_attn"]}, "'c_attn', which matches no module"),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, "select mlp.up_proj .*got layers 1 of 3"),
        ({"target_modules": ["up_proj"]}, "unexpected tensor .*gate_proj.adapter_(up|down).weight"),
        ({"target_modules": ["up_proj", "gate_proj", "o_proj"]}, "missing tensor .*o_proj"),
    ],
)
def test_refuses_files(entries, message, config, params, tmp_path) -> None:
    save_peft(tmp_path, init(jax.random.key(0), BottleneckConfig("series", 5), config, params))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(InputError, match=message) as error:
        load_peft(tmp_path, config)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "before"}, r"placement .*got 'before'"),
        ({"width": 0}, "bottleneck width must .*, got 0"),
        ({"width": True}, "bottleneck width must .*, got True"),
        ({"non_linearity": "sin"}, r"non_linearity .*got 'sin'"),
        ({"init": "zero"}, r"init .*got 'zero'"),
        ({"scaling": float("inf")}, r"scaling .*inf"),
        ({"scaling": 10**400}, r"scaling .*10"),
        ({"scaling": True}, r"scaling .*True"),
        ({"scaling": 0}, r"scaling .*0"),
        ({"dropout": "0.1"}, r"dropout .*got '0.1'"),
        ({"dropout": float("nan")}, r"dropout .*got nan"),
        ({"dropout": 1.0}, r"dropout .*got 1.0"),
        ({"target_modules": "up_proj"}, r"target_modules .*a series adapter, got .*'up_proj'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        BottleneckConfig(**{"placement": "series"} | settings)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_merging(placement, config, params) -> None:
    adapter = perturbed(config, params, placement)
    for undo in (merge, unmerge):
        with pytest.raises(InputError, match=f"a {placement} adapter cannot be merged"):
            undo(adapter, params)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_bfloat16_base_runs_it(placement, config, params, tokens) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapter = perturbed(config, params, placement)
    gradient = jax.jit(jax.grad(loss_of(half, tokens, config, adapter)))(adapter.params)
    assert all(leaf.dtype == jnp.float32 and leaf.any(axis=(1, 2)).all() for leaf in jax.tree.leaves(gradient))
