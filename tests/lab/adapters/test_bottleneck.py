"""Series and parallel adapters: comparison with numpy, their distributions and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import numpy_llama
from support.peft_files import read_config, read_tensors
from support.peft_training import next_token_loss
from support.tiny import WIDE

from rora_theory.lab.adapters import BottleneckConfig, load_peft, save_peft
from rora_theory.lab.adapters.dropout import dropout

PLACEMENTS = ("series", "parallel")
ALL = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def perturbed(config, params, placement, **settings):
    """Return an adapter with numbers large enough to reach the non-linear part of tanh."""
    adapter = BottleneckConfig(placement, 5, **settings).build(jax.random.key(0), config, params)
    large = {
        module: {"adapter_down": 10 * tensors["adapter_down"], "adapter_up": 50 * tensors["adapter_up"]}
        for module, tensors in adapter.params.items()
    }
    return adapter.replace(large)


def reference(golden, adapter, params):
    """Compute the logits by the definition, one layer and module at a time."""
    weights, settings = golden.base_weights(), adapter.config

    def module(layer, name, x, z):
        if name not in params:
            return z
        down, up = (np.asarray(params[name][kind][layer], np.float64) for kind in ("adapter_down", "adapter_up"))
        after = settings.placement == "series" and name in ("self_attn.o_proj", "mlp.down_proj")
        change = np.tanh((z if after else x) @ down.T) @ up.T
        if settings.placement == "parallel" or after:
            return z + change
        # before: W (x + change) + b = z + W change
        return z + change @ np.asarray(weights[f"model.layers.{layer}.{name}.weight"], np.float64).T

    return numpy_llama.logits(weights, golden.SHAPE, golden.TOKENS, module=module)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_initial_values_have_the_published_distribution(placement) -> None:
    """Both tensors are normal with deviation 0.02, within 5 standard errors, and differ between layers."""
    settings = BottleneckConfig(placement, 256, target_modules=("up_proj",))
    adapter = settings.build(jax.random.key(0), WIDE, {})
    for tensor in jax.tree.leaves(adapter.params):
        assert abs(np.std(tensor) / 0.02 - 1) < 5 / (2 * tensor.size) ** 0.5
        assert len(np.unique(tensor)) > 0.99 * tensor.size
    assert np.abs(np.corrcoef(*(np.ravel(t)[: 2 * 64 * 128] for t in jax.tree.leaves(adapter.params)))[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("placement", "settings"),
    [
        ("series", {"target_modules": ALL}),
        ("parallel", {"target_modules": ALL}),
        ("parallel", {}),
    ],
)
def test_agrees_with_numpy(placement, settings, golden, config, params, tokens, run) -> None:
    adapter = perturbed(config, params, placement, **settings)
    expected = reference(golden, adapter, adapter.params)
    assert np.abs(expected - np.asarray(run(params, tokens))).max() > 0.5, "the adapter changes the logits"
    # The reference is float64; logits of up to 10 through 3 layers of float32, each with adapters of gain above 1.
    np.testing.assert_allclose(run(params, tokens, adapter), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_is_the_slope_of_the_numpy_loss(placement, golden, config, params, tokens) -> None:
    """The slope is compared in a random direction of every tensor."""
    adapter = perturbed(config, params, placement)
    loss = next_token_loss(params, tokens, config, adapter)
    gradient, _ = jax.jit(jax.grad(loss, has_aux=True))(adapter.params)
    random = np.random.default_rng(0)
    for name, tensors in adapter.params.items():
        for kind, tensor in tensors.items():
            direction = random.standard_normal(tensor.shape).astype(np.float32)
            losses = []
            for h in (1e-3, -1e-3):
                shifted = adapter.params | {name: tensors | {kind: tensor + h * direction}}
                losses.append(numpy_llama.loss(reference(golden, adapter, shifted), golden.TOKENS))
            slope = (losses[0] - losses[1]) / 2e-3
            # Central difference: error of order h^2 by the third derivative, some parts in a thousand here.
            assert float(jnp.sum(gradient[name][kind] * direction)) == pytest.approx(slope, rel=5e-3, abs=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropout_applies_to_the_input_of_the_adapter(placement, config, params) -> None:
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
    row = BottleneckConfig("parallel", 7).table(config)[1]
    assert tuple(row) == ("mlp.down_proj", "0-2", 7, None, "parallel", None)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_files(placement, config, params, tmp_path) -> None:
    """Reading returns the adapter that was written; the tensors have PEFT's naming scheme and shapes [out, in]."""
    settings = {"target_modules": ("o_proj", "down_proj"), "dropout": 0.1}
    adapter = perturbed(config, params, placement, **settings)
    save_peft(tmp_path, adapter, base_model="tiny")
    again = load_peft(tmp_path, config)
    assert again.config == adapter.config
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)
    assert adapter.count() == again.count() == sum(leaf.size for leaf in jax.tree.leaves(adapter.params))
    tensors = read_tensors(tmp_path)
    name = "base_model.model.model.layers.{}.mlp.down_proj.{}.weight"
    assert len(tensors) == 3 * 2 * 2
    assert tensors[name.format(2, "adapter_down")].shape == (5, 16 if placement == "series" else 24)
    up = adapter.params["mlp.down_proj"]["adapter_up"][1]
    np.testing.assert_array_equal(tensors[name.format(1, "adapter_up")], up, strict=True)
    written = read_config(tmp_path)
    assert written["peft_type"] == {"series": "SERIES_ADAPTER", "parallel": "PARALLEL_ADAPTER"}[placement]
    assert (written["base_model_name_or_path"], written["bottleneck_size"]) == ("tiny", 5)
