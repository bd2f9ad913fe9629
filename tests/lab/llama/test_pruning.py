"""Structured pruning: statistics and scores; the pruned model computes as the full one with zeros in the rest."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.shapes import SHAPES

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.llama import MODULES, LlamaConfig, count_parameters, hidden_states, linear, pruning
from rora_theory.lab.llama.pruning import KeptParts, PrunedShape, Scores

forward = jax.jit(llama.forward, static_argnames="config")
CONFIG = LlamaConfig(50, 24, 40, 4, 6, 3, 4, attention_bias=True, mlp_bias=True)
SMOLLM = SHAPES["smollm2-135m"]
KEPT_PARTS = KeptParts(np.array([0, 2]), np.array([[0, 2], [1, 2]]), np.stack([np.arange(0, 40, 5), np.arange(3, 11)]))


@pytest.fixture(scope="module")
def params(draw_params):
    return draw_params(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (2, 9), 0, 50)


@pytest.fixture(scope="module")
def statistics(params, tokens):
    return pruning.batch_statistics(params, tokens, CONFIG)


@pytest.mark.slow
def test_statistics_are_sums_over_tokens(params, tokens, statistics) -> None:
    _, inputs = hidden_states(params, tokens, CONFIG, capture=("self_attn.o_proj", "mlp.down_proj"))
    for name, sums in (("self_attn.o_proj", statistics.attended), ("mlp.down_proj", statistics.gated)):
        np.testing.assert_allclose(sums, np.square(np.asarray(inputs[name], np.float64)).sum(axis=(1, 2)), rtol=1e-5)
    assert int(statistics.tokens) == 18
    # The residual stream after each layer: the sum of the branches that end in these two modules.
    stream = [params["embed_tokens"][tokens]]
    for layer in range(4):
        modules = ((inputs[name][layer], params["layers"][name]) for name in inputs)
        outputs = [linear(x, module["weight"][layer], module["bias"][layer]) for x, module in modules]
        stream.append(stream[-1] + outputs[0] + outputs[1])
    unit = [np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True)) for x in stream]
    expected = [np.sum(1 - np.sum(a * b, axis=-1)) for a, b in itertools.pairwise(unit)]
    np.testing.assert_allclose(statistics.influence, expected, rtol=1e-4)


def test_a_score_is_the_change_of_the_module_s_outputs(params, tokens, statistics) -> None:
    scores = pruning.score_parts(params, statistics, CONFIG)
    _, seen = hidden_states(params, tokens, CONFIG, capture=("self_attn.o_proj", "mlp.down_proj"))
    layer, weight = 2, params["layers"]["mlp.down_proj"]["weight"]
    x = seen["mlp.down_proj"][layer]
    for feature in (0, 17):
        lost = linear(x, weight[layer]) - linear(x.at[..., feature].set(0.0), weight[layer])
        assert scores.features[layer, feature] == pytest.approx(float(jnp.linalg.norm(lost)), rel=1e-3)
    weight, x = np.asarray(params["layers"]["self_attn.o_proj"]["weight"]), np.asarray(seen["self_attn.o_proj"])
    by_weight = np.abs(weight[1]) * np.linalg.norm(x[1].reshape(-1, 24), axis=0)[None]  # Wanda's, one a weight
    np.testing.assert_allclose(
        scores.heads[1], [np.linalg.norm(by_weight[:, 8 * group : 8 * group + 8]) for group in range(3)], rtol=1e-5
    )
    np.testing.assert_allclose(scores.layers, np.asarray(statistics.influence) / 18, rtol=1e-6)


@pytest.mark.slow
def test_a_pruned_model_equals_the_original_with_the_other_parts_at_zero(params, tokens) -> None:
    """Query heads 2g and 2g + 1, of width 4, share key/value head g."""
    zeroed = {name: dict(params["layers"][name]) for name in MODULES}
    attend, gate = np.zeros((4, 24)), np.zeros((4, 40))
    for at, layer in enumerate(KEPT_PARTS.layers):
        for group in KEPT_PARTS.heads[at]:
            attend[layer, 8 * group : 8 * group + 8] = 1
        gate[layer, KEPT_PARTS.features[at]] = 1
    for name, mask in (("self_attn.o_proj", attend), ("mlp.down_proj", gate)):
        zeroed[name]["weight"] = zeroed[name]["weight"] * jnp.asarray(mask[:, None], jnp.float32)
        kept_layers = jnp.asarray(np.isin(np.arange(4), KEPT_PARTS.layers), jnp.float32)
        zeroed[name]["bias"] = zeroed[name]["bias"] * kept_layers[:, None]
    expected = forward(params | {"layers": params["layers"] | zeroed}, tokens, CONFIG)
    pruned, config = pruning.prune(params, CONFIG, KEPT_PARTS)
    assert config == LlamaConfig(50, 24, 8, 2, 4, 2, 4, attention_bias=True, mlp_bias=True)
    # Float32 sums with the zeros left out.
    np.testing.assert_allclose(forward(pruned, tokens, config), expected, rtol=0, atol=2e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(pruned)) == count_parameters(config)


def test_the_highest_scores_are_kept_in_order() -> None:
    scores = Scores(
        np.array([0.5, 0.1, 0.9, 0.4]),
        np.array([[1.0, 1.0, 2.0], [0, 0, 0], [3, 2, 1], [0, 0, 0]]),
        np.stack([np.arange(6.0), np.zeros(6), -np.arange(6.0), np.zeros(6)]),
    )
    parts = pruning.choose_parts(scores, PrunedShape(2, 2, 3))
    assert parts.layers.tolist() == [0, 2]
    assert parts.heads.tolist() == [[0, 2], [0, 1]], "among equal scores the earlier"
    assert parts.features.tolist() == [[3, 4, 5], [0, 1, 2]]


QWEN = LlamaConfig(50, 24, 40, 4, 6, 3, 4, model_type="qwen3", sliding_window=3, full_attention_layers=(0, 1))


@pytest.mark.slow
def test_norms_of_heads_and_windows_of_layers_stay_with_their_layers(tokens, draw_params) -> None:
    """Layers 0 and 2 are kept of a model with windows from layer 2 on: the second has a window.

    With all heads and features kept, the result is the model of these two layers.
    """
    params = draw_params(QWEN)
    parts = KeptParts(np.array([0, 2]), np.tile(np.arange(3), (2, 1)), np.tile(np.arange(40), (2, 1)))
    pruned, config = pruning.prune(params, QWEN, parts)
    assert config == dataclasses.replace(QWEN, num_hidden_layers=2, full_attention_layers=(0,))
    jax.tree.map(np.testing.assert_array_equal, pruned["layers"], jax.tree.map(lambda a: a[::2], params["layers"]))
    assert pruning.prune(params, QWEN, parts._replace(layers=np.array([0, 1])))[1].sliding_window is None
    # The stream after all layers is not that of the same weights without a window: statistics see it.
    without = dataclasses.replace(QWEN, sliding_window=None, full_attention_layers=())
    sums, other = (pruning.batch_statistics(params, tokens, config).attended for config in (QWEN, without))
    _, seen = hidden_states(params, tokens, QWEN, capture=("self_attn.o_proj",))
    np.testing.assert_allclose(sums, np.square(seen["self_attn.o_proj"]).sum(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(sums[:2], other[:2], rtol=1e-5)
    assert np.abs(sums[2:] / other[2:] - 1).max() > 1e-2


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 1.0])
def test_a_plan_keeps_at_most_the_share(share) -> None:
    shape = pruning.plan_shape(SMOLLM, share)
    kept_share = count_parameters(pruning.pruned_config(SMOLLM, shape)) / count_parameters(SMOLLM)
    assert share - 0.01 < kept_share <= share
    assert shape.width % 8 == 0
    if share == 1.0:
        assert shape == PrunedShape(30, 3, 1536)
    if share == 0.5:
        assert shape == PrunedShape(18, 2, 904)  # as published


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, "share .* 0.0$"),
        ({"share": 1.5}, "share .* 1.5$"),
        ({"share": 0.1}, "share .*at least 0.21.* 0.1 "),
    ],
)
def test_refuses(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        pruning.plan_shape(SMOLLM, **arguments)
