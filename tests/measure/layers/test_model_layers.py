"""Gradients and inputs of a LLaMA's modules against autodiff in the weights; a first real step, by hand and by law."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rora_theory import InputError, adapters, llama
from rora_theory.adapters import LoraConfig
from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.data.batches import Batch
from rora_theory.llama import MODULES, LlamaConfig
from rora_theory.measure.layers.model_layers import RealStep, real_tokens, record
from rora_theory.measure.regimes import terms

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=10,
    max_position_embeddings=64,
)
LENGTHS = (9, 5, 12)


def batch(seed: int, *, answer_only: bool = False) -> Batch:
    """Three rows padded on the right to 12; ``answer_only``: the last two targets of each, by position."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 48, (3, 13)).astype(np.int32)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    real = np.arange(12)[None] < np.array(LENGTHS)[:, None]
    inputs[~real] = 0
    if not answer_only:
        return Batch(inputs, targets, real.astype(np.float32), None)
    positions = np.array([[length - 2, length - 1, 0] for length in LENGTHS], np.int32)
    chosen = np.take_along_axis(targets, positions, axis=1)
    weights = np.broadcast_to(np.array([1, 1, 0], np.float32), (3, 3))
    return Batch(inputs, chosen, weights, positions)


@pytest.fixture(scope="module")
def params():
    plain = llama.init_params(jax.random.key(0), CONFIG)
    return jax.tree.map_with_path(lambda path, a: a if path[-1].key.endswith("norm") else 10.0 * a, plain)


@pytest.mark.slow
@pytest.mark.parametrize("answer_only", [False, True])
def test_gradient_is_autodiff_s_in_the_weight(params, answer_only) -> None:
    """Every module of every layer, by the plain formula of the loss; float32 sums of 26 tokens."""
    given = batch(1, answer_only=answer_only)
    found = record(params, CONFIG, given, MODULES)

    def loss(weights: dict) -> jax.Array:
        layers = {**params["layers"], **{name: {"weight": w} for name, w in weights.items()}}
        logits = llama.forward({**params, "layers": layers}, jnp.asarray(given.inputs), CONFIG)
        if given.positions is not None:
            logits = jnp.take_along_axis(logits, jnp.asarray(given.positions)[..., None], axis=1)
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(given.targets))
        return jnp.sum(each * given.weights) / jnp.sum(given.weights)

    value, expected = jax.jit(jax.value_and_grad(loss))({name: params["layers"][name]["weight"] for name in MODULES})
    assert found.loss == pytest.approx(float(value), rel=1e-5)
    for name in MODULES:
        assert found.inputs[name].shape == (2, sum(LENGTHS), CONFIG.module_shape(name)[1])
        for layer in range(2):
            grad = found.gradient(name, layer)
            scale = float(jnp.max(jnp.abs(expected[name][layer])))
            np.testing.assert_allclose(grad, expected[name][layer], rtol=0, atol=2e-5 * scale)


@pytest.mark.slow
def test_inputs_are_the_model_s_without_padding(params) -> None:
    given = batch(1)
    found = record(params, CONFIG, given, ("mlp.down_proj",), gradients=False)
    assert not found.deltas
    _, captured = llama.hidden_states(params, jnp.asarray(given.inputs), CONFIG, capture=("mlp.down_proj",))
    kept = np.asarray(captured["mlp.down_proj"])[:, real_tokens(given)]
    np.testing.assert_allclose(found.inputs["mlp.down_proj"], kept, rtol=1e-6, atol=1e-7)


def test_real_tokens() -> None:
    """All that a row reads before its last target, whether all targets count or the answer's alone."""
    expected = np.arange(12)[None] < np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(real_tokens(batch(1)), expected)
    np.testing.assert_array_equal(real_tokens(batch(1, answer_only=True)), expected)


@pytest.fixture(scope="module")
def stepper(params) -> RealStep:
    return RealStep(params, CONFIG, batch(1), batch(2), ("q_proj", "down_proj"))


@pytest.mark.slow
def test_real_step_by_hand(params, stepper) -> None:
    """SGD's increment is -eta gamma^2 G A^T A x', from the recorded G and the adapter's own A; and the model's."""
    setting = Setting(4, 8.0, 1e-3, "rora", "sgd")
    key = jax.random.key(5)
    found = stepper.change(setting, key)
    lora = LoraConfig(rank=4, alpha=8.0, rule="rora", target_modules=("q_proj", "down_proj"))
    adapter = adapters.init(key, lora, CONFIG, params)
    names = ("self_attn.q_proj", "mlp.down_proj")
    train = record(params, CONFIG, batch(1), names)
    held_out = record(params, CONFIG, batch(2), names, gradients=False)
    stepped = {}
    for name in names:
        lora_B = np.zeros((2, CONFIG.module_shape(name)[0], 4), np.float32)
        for layer in range(2):
            lora_A = np.asarray(adapter.params[name]["lora_A"][layer])
            lora_B[layer] = -1e-3 * setting.scaling * train.gradient(name, layer) @ lora_A.T
            w = setting.scaling * held_out.inputs[name][layer] @ lora_A.T @ lora_B[layer].T
            assert found.modules[name][layer] == pytest.approx(np.sqrt(np.mean(w**2)), rel=1e-4)
        stepped[name] = {**adapter.params[name], "lora_B": jnp.asarray(lora_B)}
    given, real = batch(2), real_tokens(batch(2))
    for function, value in ((llama.hidden_states, found.hidden), (llama.forward, found.logits)):
        before, after = (
            np.asarray(jax.jit(partial(function, config=CONFIG))(params, jnp.asarray(given.inputs), adapter=each))[real]
            for each in (None, adapters.replace(adapter, stepped))
        )
        # Differences of float32 states: 1e-7 of the state against a change of about 1e-3 of it.
        assert value == pytest.approx(np.sqrt(np.mean((after - before) ** 2)), rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "power"), [("momentum", 2), ("adamw", 1)])
def test_power_of_gamma(stepper, optimizer, power) -> None:
    """The real step, of one A, follows gamma^2 under SGD and gamma under Adam, and the rate in both."""
    key = jax.random.key(0)
    one = Setting(4, 4.0, 1e-4, "lora", optimizer)
    plain = stepper.change(one, key).modules
    scaled = stepper.change(replace(one, alpha=12.0, learning_rate=2e-4), key).modules
    for name, values in plain.items():
        # Adam's epsilon, 1e-8 against gradients of about 1e-4 and more, is the largest departure.
        np.testing.assert_allclose(scaled[name], 2 * 3**power * values, rtol=5e-3)


@pytest.mark.slow
def test_a_transfer_keeps_the_real_step(params, stepper) -> None:
    """Rank 2 to 8 with the measured linear terms, 40 draws: each module's rms comes back; else it grows as told."""
    old = Setting(2, 8.0, 1e-4, "lora", "adamw")
    names = ("self_attn.q_proj", "mlp.down_proj")
    train = record(params, CONFIG, batch(1), names)
    held_out = record(params, CONFIG, batch(2), names, gradients=False)
    linear_terms = {
        f"model.layers.{layer}.{name}": terms.terms(
            train.gradient(name, layer), held_out.inputs[name][layer], optimizer="adam"
        )
        .crossing()
        .linear_term
        for name in names
        for layer in range(2)
    }
    found = transfer(old, 8, linear_terms)

    def size(setting: Setting, pattern: dict[str, float]) -> dict[str, np.ndarray]:
        draws = [stepper.change(setting, jax.random.key(seed), pattern).modules for seed in range(40)]
        return {name: np.sqrt(np.mean([draw[name] ** 2 for draw in draws], axis=0)) for name in names}

    before = size(old, {})
    after = size(replace(found.unchanged, alpha=found.alpha), found.alpha_pattern("module"))
    unchanged = size(found.unchanged, {})
    for name in names:
        # One draw's mean square has a relative deviation of about 0.8 at rank 2, 0.5 at rank 8: 0.08 of the ratio's rms
        # over 40 draws; four sigma.
        np.testing.assert_allclose(after[name] / before[name], 1, atol=0.32)
        expected = [found.step_ratios(found.unchanged)[f"model.layers.{layer}.{name}"] for layer in range(2)]
        np.testing.assert_allclose(unchanged[name] / before[name] / expected, 1, atol=0.32)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(params, stepper) -> None:
    broken = {**params, "norm": params["norm"] * jnp.float32(np.nan)}
    with pytest.raises(InputError, match=r"loss .* nan"):
        record(broken, CONFIG, batch(1), ("mlp.up_proj",))
    with pytest.raises(InputError, match=r"capture .*'q_proj'"):
        record(params, CONFIG, batch(1), ("q_proj",), gradients=False)
    with pytest.raises(InputError, match=r"alpha_pattern .*'k_proj'"):
        stepper.change(Setting(2, 8.0, 1e-4), jax.random.key(0), {"k_proj": 3.0})
